"""Writers that are models: one on this machine, or any OpenAI-compatible endpoint, which is asked only where the user
names it.

Not for checking what they write (questions.py). An answer that holds no JSON object is said to be none.
"""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tunelet.domain.questions import Prompt, Unwritten
from tunelet.errors import TuneletError

KEYS = ("TUNELET_API_KEY", "OPENAI_API_KEY")
TIMEOUT = 120
MOST = 4_000_000  # bytes of an answer


def parsed(text: str) -> Mapping[str, Any]:
    """The first JSON object in a model's answer; words and code fences around it are passed by. A bare list is taken
    for its questions. Raises Unwritten where there is none."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    decoder = json.JSONDecoder()
    for match in re.finditer(r"[{\[]", text):
        try:
            found, _ = decoder.raw_decode(text, match.start())
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(found, list) and found and all(isinstance(one, dict) for one in found):
            return {"questions": found}
        if isinstance(found, dict):
            return found if "questions" in found else {"questions": [found]} if "question" in found else found
    raise Unwritten("no JSON object in the answer" if text.strip() else "the answer is empty")


class EngineWriter:
    """A local model through infer's TorchEngine, which must have a renderer; sampled a little warmer at a retry."""

    def __init__(self, engine: Any, name: str, *, max_new_tokens: int = 700):
        self._engine, self.name, self._most = engine, name, max_new_tokens

    def write(self, prompt: Prompt, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        from tunelet.data.examples import Message

        engine = self._engine
        if engine.tokenizer.chat_template:
            ids = engine.renderer.prompt([Message("user", prompt.text)])
        else:
            ids = engine.renderer.raw(prompt.text + "\n\nJSON:\n")
        if engine.max_length and len(ids) >= engine.max_length:
            raise Unwritten("the passage is longer than the model reads")
        warm = 0.7 if prompt.complaint else 0.0
        [done] = engine.generate([ids], max_new_tokens=self._most, temperature=warm, top_p=0.95, seed=prompt.seed)
        return parsed(done.text)


class UrlWriter:
    """An OpenAI-compatible chat endpoint. url: up to and without /chat/completions, `#MODEL` behind it names the
    model; the key comes from TUNELET_API_KEY or OPENAI_API_KEY, and is sent nowhere else."""

    def __init__(self, url: str, model: str = ""):
        base, _, named = url.partition("#")
        parts = urlsplit(base)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise TuneletError(f"--writer {url}: is no address", fix="for example: http://127.0.0.1:8080/v1#my-model")
        if parts.username is not None:
            raise TuneletError("--writer: an address with a name or password in it", fix=f"put the key into {KEYS[0]}")
        self._key = next((os.environ[name] for name in KEYS if os.environ.get(name)), "")
        local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        if self._key and parts.scheme == "http" and not local:
            raise TuneletError(
                f"--writer {url}: the key would be sent in the open",
                why="the address begins with http://, and is not on this machine",
                fix=f"take https://, or unset {' and '.join(KEYS)}",
            )
        base = base.rstrip("/").removesuffix("/chat/completions")
        self._url, self._model = f"{base}/chat/completions", model or named or "default"
        self.name = f"{parts.hostname}{f':{parts.port}' if parts.port else ''} {self._model}"
        # A redirect would take the documents and the key to where the user did not send them.
        self._open = urllib.request.build_opener(_NoRedirect).open
        self._plain = self._answered = False

    def write(self, prompt: Prompt, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """Raises Unwritten for an answer that cannot be used, TuneletError where the endpoint cannot be reached or
        refuses the key: going on would fail for every chunk."""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt.text}],
            "temperature": 0.7 if prompt.complaint else 0.2,
            "seed": prompt.seed,
        }
        if not self._plain:
            told = {"name": "exam", "schema": dict(schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": told}
        status, answer = self._post(body)
        if status == 400 and not self._plain:  # many servers know no structured output: the prompt asks for JSON too
            self._plain = True
            del body["response_format"]
            status, answer = self._post(body)
        if status != 200:
            raise Unwritten(f"the endpoint answered {status}")
        try:
            text = json.loads(answer)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise Unwritten("the endpoint's answer is not OpenAI-compatible") from error
        if not isinstance(text, str):
            raise Unwritten("the answer is empty")
        return parsed(text)

    def _post(self, body: Mapping[str, Any]) -> tuple[int, bytes]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = json.dumps(body, ensure_ascii=False).encode()
        request = urllib.request.Request(self._url, data=data, headers=headers, method="POST")
        try:
            with self._open(request, timeout=TIMEOUT) as reply:
                self._answered = True
                return reply.status, reply.read(MOST)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404) or 300 <= error.code < 400:
                raise TuneletError(
                    f"{self._url}: answered {error.code} {error.reason}",
                    fix=f"check the address, the model's name behind # and the key in {KEYS[0]}",
                ) from error
            return error.code, b""
        except TimeoutError as error:
            raise Unwritten(f"no answer within {TIMEOUT} s") from error
        except (urllib.error.URLError, ConnectionError) as error:
            if self._answered:  # it was there: what is written so far is not thrown away for a dropped connection
                raise Unwritten("the endpoint can't be reached any more") from error
            raise TuneletError(
                f"{self._url}: can't be reached",
                why=str(getattr(error, "reason", error)),
                fix="start the server, or write without a model: --writer cloze",
            ) from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *given: Any) -> None:
        return None

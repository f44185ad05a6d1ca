"""A model behind an OpenAI-compatible URL: one chat client for all who ask one, with the rules for keys in one place.

Not for what is asked nor for reading what comes back (domain/writers.py, evals/judge.py). Nothing is asked but the
address that the user names; a key goes nowhere else, and never in the open.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from tunelet.errors import TuneletError

KEYS = ("TUNELET_API_KEY", "OPENAI_API_KEY")
LOCAL = ("127.0.0.1", "localhost", "::1")
TIMEOUT = 120  # seconds without a byte
MOST = 4_000_000  # bytes of an answer
BUSY = (429, 503)  # too many requests, not now: asked again
RETRIES = 4
LONGEST_WAIT = 30.0  # seconds before a retry; a server that wants more is not waited for


class Unanswered(Exception):
    """This one request has no usable answer; the next one may have."""


@dataclass(frozen=True, slots=True)
class Reply:
    """finish: the server's reason, "stop" or "length" with most. tokens: of the answer; None where the server does not
    count them. logprobs: as the server gives them; None where they were not asked for."""

    text: str
    finish: str = ""
    tokens: int | None = None
    logprobs: Any = None


def is_url(name: str) -> bool:
    """Whether a model's name is an endpoint's address, and no folder or hub id."""
    return name.startswith(("http://", "https://"))


class Endpoint:
    """url: up to and without /chat/completions; `#MODEL` behind it names the model. The key comes from TUNELET_API_KEY
    or OPENAI_API_KEY. May be used from several threads at once: how many requests are in flight is the caller's choice.

    flag: what the user named it with, for messages; instead: what else they could do where it can't be reached.
    Raises TuneletError for an address that is none, or that a key would be sent to in the open.
    """

    def __init__(self, url: str, *, flag: str = "--model", instead: str = ""):
        base, _, model = url.partition("#")
        try:
            parts = urlsplit(base)
            host, port = parts.hostname, parts.port
        except ValueError:  # a bracket or a port that is none
            host = None
        if not host or parts.scheme not in ("http", "https"):
            raise TuneletError(f"{flag} {url}: is no address", fix="for example: http://127.0.0.1:8080/v1#my-model")
        if parts.username is not None:
            raise TuneletError(f"{flag}: an address with a name or password in it", fix=f"put the key into {KEYS[0]}")
        self._key = _key()
        local = host in LOCAL
        if self._key and parts.scheme == "http" and not local:
            raise TuneletError(
                f"{flag} {url}: the key would be sent in the open",
                why="the address begins with http://, and is not on this machine",
                fix=f"take https://, or unset {' and '.join(KEYS)}",
            )
        base = base.rstrip("/").removesuffix("/chat/completions")
        self.url, self.model, self._instead = f"{base}/chat/completions", model or "default", instead
        self.name = f"{host}{f':{port}' if port else ''} {self.model}"
        # A redirect would take what is sent, and the key, to where the user did not send them; so would a proxy what
        # is meant for this machine.
        direct = [urllib.request.ProxyHandler({})] if local else []
        self._open = urllib.request.build_opener(_NoRedirect, *direct).open
        self._plain = self._answered = False

    def check(self) -> None:
        """One short request, before much work is done for many. Raises TuneletError as `chat` does; an answer that
        cannot be used is none of its business."""
        try:
            self.chat([{"role": "user", "content": "Hi"}], max_tokens=1)
        except Unanswered:
            return

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        top_logprobs: int | None = None,
        schema: Mapping[str, Any] | None = None,
        heard: Callable[[str], None] | None = None,
    ) -> Reply:
        """The answer to `messages` (dicts with role and content). What is None is left to the server. top_logprobs: ask
        for log-probabilities, of so many alternatives to each token. schema: a JSON schema the answer is to have, left
        out for a server that does not know such: the messages should ask for it, too. heard: is given the answer's text
        piece by piece, as the server sends it; what it raises ends the request.

        A server that is busy (429, 503) is asked again, RETRIES times, after what it says (Retry-After) or 1, 2, 4, ...
        seconds. Raises Unanswered for an answer that cannot be used, TuneletError where the endpoint can't be reached
        or refuses the key: going on would fail for every request.
        """
        asked = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
        body: dict[str, Any] = {"model": self.model, "messages": [dict(message) for message in messages]}
        body |= {name: value for name, value in asked.items() if value is not None}
        if stop:
            body["stop"] = list(stop)
        if top_logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        if schema is not None and not self._plain:
            told = {"name": "answer", "schema": dict(schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": told}
        if heard:
            body["stream"] = True
        status, answer = self._patiently(body, heard)
        if status == 400 and "response_format" in body:  # many servers know no structured output
            self._plain = True
            del body["response_format"]
            status, answer = self._patiently(body, heard)
        if status != 200:
            raise Unanswered(f"the endpoint answered {status}{_told(answer)}")
        return _reply(answer)

    def _patiently(self, body: Mapping[str, Any], heard: Callable[[str], None] | None) -> tuple[int, bytes]:
        for tried in range(RETRIES + 1):
            status, answer, wait = self._post(body, heard)
            wait = 2.0**tried if wait is None else wait
            if status not in BUSY or tried == RETRIES or wait > LONGEST_WAIT:
                return status, answer
            time.sleep(wait)
        raise AssertionError("the last try returns")

    def _post(self, body: Mapping[str, Any], heard: Callable[[str], None] | None) -> tuple[int, bytes, float | None]:
        """(status, body, seconds that the server asks to wait) of one request."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")  # a lone surrogate is no text
        request = urllib.request.Request(self.url, data=data, headers=headers, method="POST")
        try:
            with self._open(request, timeout=TIMEOUT) as reply:
                self._answered = True
                answer = _streamed(reply, heard) if heard else reply.read(MOST + 1)
        except urllib.error.HTTPError as error:
            self._answered = True
            if error.code in (401, 403, 404) or 300 <= error.code < 400:
                raise TuneletError(
                    f"{self.url}: answered {error.code} {error.reason}",
                    why=_told(_read(error)).removeprefix(": "),
                    fix=f"check the address, the model's name behind # and the key in {KEYS[0]}",
                ) from error
            return error.code, _read(error), _wait(error.headers.get("Retry-After"))
        except TimeoutError as error:
            raise Unanswered(f"no answer within {TIMEOUT} s") from error
        except (urllib.error.URLError, ConnectionError, http.client.HTTPException) as error:
            if self._answered:  # it was there: what is done so far is not thrown away for a dropped connection
                raise Unanswered("the endpoint can't be reached any more") from error
            raise TuneletError(
                f"{self.url}: can't be reached",
                why=str(getattr(error, "reason", error)),
                fix="start the server, or check the address" + (f"; or {self._instead}" if self._instead else ""),
            ) from error
        if len(answer) > MOST:
            raise Unanswered(f"the answer is longer than {MOST} bytes")
        return reply.status, answer, None


def _key() -> str:
    key = next((found for name in KEYS if (found := os.environ.get(name, "").strip())), "")
    if not (key.isascii() and key.isprintable()):  # it would not do as a header; and it is not to be shown
        raise TuneletError(f"the key in {' or '.join(KEYS)} is none", fix="copy it once more: letters, digits, signs")
    return key


def _reply(answer: bytes) -> Reply:
    try:
        whole = json.loads(answer)
        choice = whole["choices"][0]
        text, finish, counted = choice["message"]["content"], choice.get("finish_reason"), whole.get("usage")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise Unanswered("the endpoint's answer is not OpenAI-compatible") from error
    if not isinstance(text, str):
        raise Unanswered("the answer is empty")
    tokens = counted.get("completion_tokens") if isinstance(counted, dict) else None
    return Reply(
        text,
        finish if isinstance(finish, str) else "",
        tokens if isinstance(tokens, int) else None,
        choice.get("logprobs"),
    )


def _streamed(reply: Any, heard: Callable[[str], None]) -> bytes:
    """The whole answer, as a server gives it that does not stream, of server-sent events whose text `heard` is told."""
    if "text/event-stream" not in reply.headers.get("Content-Type", ""):  # it does not stream
        answer = reply.read(MOST + 1)
        heard(_reply(answer).text)
        return answer
    text, finish, usage, size = [], None, None, 0
    for line in reply:
        size += len(line)
        field, _, data = line.partition(b":")
        if size > MOST or data.strip() == b"[DONE]":
            break
        if field != b"data":
            continue
        try:
            chunk = json.loads(data)
            choice = (chunk.get("choices") or [{}])[0]
            piece = choice.get("delta", {}).get("content") or ""
            finish, usage = choice.get("finish_reason") or finish, chunk.get("usage") or usage
        except (ValueError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise Unanswered("the endpoint's answer is not OpenAI-compatible") from error
        if "error" in chunk:
            raise Unanswered(f"the endpoint ended its answer{_told(data)}")
        if piece:
            text.append(piece)
            heard(piece)
    if size > MOST:
        return bytes(MOST + 1)
    choices = [{"message": {"content": "".join(text)}, "finish_reason": finish}]
    return json.dumps({"choices": choices, "usage": usage}).encode()


def _read(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read(MOST)
    except (OSError, http.client.HTTPException):  # its status says enough
        return b""


def _told(answer: bytes) -> str:
    """': ' and what the server says of its refusal, where it says anything."""
    try:
        said = json.loads(answer)["error"]
        said = said["message"] if isinstance(said, dict) else said
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f": {said[:200]}" if isinstance(said, str) and said else ""


def _wait(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which gives them or a date (RFC 9110, 10.2.3); None for anything else."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *given: Any) -> None:
        return None

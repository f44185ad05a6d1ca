"""Writers that are models: one on this machine, or any OpenAI-compatible endpoint, which is asked only where the user
names it.

Not for checking what they write (questions.py). An answer that holds no JSON object is said to be none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tunelet.domain.questions import Prompt, Unwritten
from tunelet.infer.endpoint import Endpoint, Unanswered


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
    """An OpenAI-compatible endpoint, `URL#MODEL` (infer/endpoint.py has its rules)."""

    def __init__(self, url: str):
        self._endpoint = Endpoint(url, flag="--writer", instead="write without a model: --writer cloze")
        self.name = self._endpoint.name

    def write(self, prompt: Prompt, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """Raises Unwritten for an answer that cannot be used, TuneletError where going on would fail for every
        chunk."""
        asked = [{"role": "user", "content": prompt.text}]
        try:
            reply = self._endpoint.chat(
                asked, temperature=0.7 if prompt.complaint else 0.2, seed=prompt.seed, schema=schema
            )
        except Unanswered as error:
            raise Unwritten(str(error)) from error
        return parsed(reply.text)

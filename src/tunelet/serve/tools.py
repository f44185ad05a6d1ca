"""Calls of tools in answers, in the model's own format: which that is, what a grammar for it looks like, reading it.

Not for showing tools to a model: its chat template does that. The format is not looked up by the model's name: a
call is rendered through the template, and what stands around it there is what answers are searched for.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunelet.data.examples import Message
from tunelet.data.render import Renderer
from tunelet.errors import TuneletError
from tunelet.infer import stops

NAME, KEY, VALUE = "zq_name", "zq_key", "zq_value"
# As json.dumps and templates write it: where any blanks are allowed, small models write nothing else.
SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
PROBE = {"id": "zq000call", "type": "function", "function": {"name": NAME, "arguments": {KEY: VALUE}}}


@dataclass(frozen=True)
class Format:
    """begin, end: what stands around a call ("" : nothing); arguments: the key of the call's object that holds them;
    listed: whether calls stand in a list."""

    begin: str = "<tool_call>\n"
    end: str = "\n</tool_call>"
    arguments: str = "arguments"
    listed: bool = False

    def grammar(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """That exactly one call of one of these functions is written, in llguidance's Lark."""
        schemas = []
        for tool in tools:
            function = tool["function"]
            schemas.append(
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": function["name"]},
                        self.arguments: function.get("parameters") or {"type": "object"},
                    },
                    "required": ["name", self.arguments],
                    "additionalProperties": False,
                }
            )
        schema: dict[str, Any] = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        if self.listed:
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
        schema["x-guidance"] = SPACES
        parts = [json.dumps(self.begin)] * bool(self.begin) + ["call"] + [json.dumps(self.end)] * bool(self.end)
        return f"%llguidance {{}}\nstart: {' '.join(parts)}\ncall: %json {json.dumps(schema)}"


def format_of(renderer: Renderer) -> Format:
    """How the template writes a call; Hermes' format (Qwen's and SmolLM's too) where it writes none or another way."""
    turns = [Message("user", "Hi"), Message("assistant", "", tool_calls=(PROBE,))]
    try:
        before = renderer.string(turns[:1], add_generation_prompt=True)
        after = renderer.string(turns)
    except TuneletError:
        return Format()
    answer = after[len(before) :] if after.startswith(before) else after
    place = answer.find(NAME)
    if place < 0:
        return Format()
    for start in range(place, -1, -1):
        if answer[start] not in "[{":
            continue
        try:
            found, end = json.JSONDecoder().raw_decode(answer, start)
        except ValueError:
            continue
        while start and answer[start - 1] == "[" and isinstance(found, dict):  # the list that the object stands in
            start -= 1
            found, end = json.JSONDecoder().raw_decode(answer, start)
        listed, one = isinstance(found, list), found[0] if isinstance(found, list) else found
        key = next((key for key, value in one.items() if value == {KEY: VALUE}), None)
        if one.get("name") != NAME or key is None:
            return Format()
        return Format(answer[:start], _end(renderer, answer[end:]), key, listed)
    return Format()


def _end(renderer: Renderer, rest: str) -> str:
    """What stands behind a call, up to the end of the turn."""
    ends = [renderer.tokenizer.convert_ids_to_tokens(id_) for id_ in renderer.stop_ids]
    return stops.cut(rest, [end for end in ends if end]).rstrip()


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str

    def as_dict(self) -> dict[str, Any]:
        told = {"name": self.name, "arguments": self.arguments}
        return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": told}


class Reader:
    """The text of an answer as it comes; `push` gives text to show and whole calls, in their order. What looks like a
    call and is none (no JSON, a name that was not offered) stays text: nothing that was written is lost, but for blanks
    around calls."""

    def __init__(self, shape: Format, names: Sequence[str]):
        self.shape, self.names = shape, frozenset(names)
        self.begin, self.end = shape.begin.strip(), shape.end.strip()
        self.bare = not self.begin  # JSON alone: a call where the whole answer is one
        self.begin = self.begin or ("[" if shape.listed else "{")
        self._held, self._blanks = "", ""  # not told yet; of it, what stood before what may be a call
        self._inside = self._told = self._called = False

    def push(self, text: str, final: bool = False) -> Iterator[str | Call]:
        self._held += text
        while True:
            if self._inside:
                found = self._whole(final)
                if found is None:
                    return
                self._inside = False
                yield from found
                continue
            place = -1 if self.bare and self._told else self._held.find(self.begin)
            if self.bare and self._held[: max(place, 0)].strip():
                place = -1
            if place >= 0:
                shown = len(self._held[:place].rstrip())
                self._blanks = self._held[shown:place]
                yield from self._text(place, shown)
                self._inside = True
                continue
            blank = not self._held.strip()
            sure = len(self._held) if final else len(stops.sure(self._held, [self.begin]).rstrip())
            yield from self._text(sure, 0 if blank and self._called else sure)
            return

    def _text(self, most: int, shown: int) -> Iterator[str]:
        text, self._held = self._held[:shown], self._held[most:]
        if text:
            self._told = self._told or bool(text.strip())
            yield text

    def _whole(self, final: bool) -> list[str | Call] | None:
        """The call that is held, once its end is there; None: not yet."""
        start = 0 if self.bare else len(self.begin)
        if self.end:
            close = self._held.find(self.end, start)
            if close < 0 and not final:
                return None
            inner = self._held[start : close if close >= 0 else None]
            whole = self._held[: close + len(self.end)] if close >= 0 else self._held
        else:
            try:
                _, stop = json.JSONDecoder().raw_decode(self._held, start + _blanks(self._held[start:]))
            except (ValueError, RecursionError):
                if not final:
                    return None
                stop = len(self._held)
            inner, whole = self._held[start:stop], self._held[:stop]
        self._held = self._held[len(whole) :]
        calls = self._calls(inner)
        self._told, self._called = True, self._called or bool(calls)
        return list(calls) if calls else [self._blanks + whole]

    def _calls(self, inner: str) -> list[Call]:
        try:
            found = json.loads(inner)
        except (ValueError, RecursionError):
            return []
        out = []
        for one in found if isinstance(found, list) else [found]:
            if not isinstance(one, dict) or one.get("name") not in self.names:
                return []
            arguments = one.get(self.shape.arguments, {})
            told = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            out.append(Call(one["name"], told))
        return out


def _blanks(text: str) -> int:
    return len(text) - len(text.lstrip())

"""Stop texts: where an answer ends before its stop token, noticed while it is written.

Not for stop tokens (data/render.py knows a template's) and not for the decoding (engine.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what decoders put for bytes that are no whole character


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the stop text that is complete first; the longest of those that end at the same place."""
    found = [(at + len(end), at) for end in stop if end and (at := text.find(end)) >= 0]
    return text[: min(found)[1]] if found else text


def sure(text: str, stop: Sequence[str]) -> str:
    """The text without an end that may be the beginning of a stop text."""
    for held in range(min(max(map(len, stop), default=0) - 1, len(text)), 0, -1):
        if any(end.startswith(text[-held:]) for end in stop):
            return text[:-held]
    return text


class Watch:
    """The answers of some prompts, token by token: `push` says whether one has come to a stop text.

    Only an answer's last tokens are decoded at each step, as many as a stop text can have; where one shows there the
    whole answer is decoded to make sure, because decoders look at what stands before.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]):
        self.tokenizer, self.stop = tokenizer, tuple(end for end in stop if end)
        # A token is a byte or more of text, but for special ones, which are skipped, and spaces that are tidied away.
        self.tail = 2 * max((len(end.encode()) for end in self.stop), default=0) + 2
        self.special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self.ids: dict[int, list[int]] = {}
        self.ends: dict[int, bool] = {}  # token -> may a stop text end in it?

    def push(self, index: int, token: int) -> bool:
        if not self.stop or token in self.special:
            return False
        ids = self.ids.setdefault(index, [])
        ids.append(token)
        return self._may_end(token) and self._in(ids[-self.tail :]) and (len(ids) <= self.tail or self._in(ids))

    def _may_end(self, token: int) -> bool:
        if token not in self.ends:
            text = self.tokenizer.decode([token], skip_special_tokens=True)
            # alone, a token may lose the space before it, and part of a character is none
            unsure = not text or BROKEN in text or any(end[-1] == " " for end in self.stop)
            self.ends[token] = unsure or any(end[-1] in text for end in self.stop)
        return self.ends[token]

    def _in(self, ids: Sequence[int]) -> bool:
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return any(end in text for end in self.stop)

"""Token ids to text as they come, in whole characters: a Korean syllable or an emoji split over tokens is held until
it is whole.

Not for templates or special tokens' meaning (data/render.py).
"""

from __future__ import annotations

from typing import Any

BROKEN = "\ufffd"  # what decoders put for bytes that are no whole character


class TextStream:
    """`push` ids one at a time; every call gives the new text that is certain. All pieces together are `text`."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""
        self.start = self.shown = 0  # ids[start:shown] is context already shown: decoders look at neighbours (spaces)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self._new(final=False)

    def finish(self) -> str:
        """What is still held back at the end, broken bytes as U+FFFD."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        before = self._decode(self.ids[self.start : self.shown])
        now = self._decode(self.ids[self.start :])
        if len(now) <= len(before) or (now.endswith(BROKEN) and not final):
            return ""
        piece = now[len(before) :]
        self.start, self.shown = self.shown, len(self.ids)
        self.text += piece
        return piece

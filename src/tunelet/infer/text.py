"""Token ids to text as they come, in whole characters: a Korean syllable or an emoji split over tokens is held until
it is whole; and up to a stop string, of which nothing is shown.

Not for templates or special tokens' meaning (data/render.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunelet.infer import stops
from tunelet.infer.stops import BROKEN


class TextStream:
    """`push` ids one at a time; every call gives the new text that is certain. All pieces together are `text`.

    stop: texts before which it ends; `stopped` says whether one has come.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self.text = ""
        self.stopped = False
        self._held = ""  # decoded, and perhaps the beginning of a stop string
        self._start = self._shown = 0  # ids[start:shown] is decoded already: decoders look at neighbours (spaces)

    def push(self, token: int) -> str:
        self.ids.append(token)
        return self._new(final=False)

    def finish(self) -> str:
        """What is still held back at the end, broken bytes as U+FFFD."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        piece = self._held + self._decoded(final)
        before = stops.cut(piece, self.stop)
        if len(before) < len(piece):
            self.stopped, piece, self._held = True, before, ""
        elif not final:
            piece = stops.sure(piece, self.stop)
            self._held = before[len(piece) :]
        self.text += piece
        return piece

    def _decoded(self, final: bool) -> str:
        """Text of ids not decoded before; "" while the last character is not whole."""
        before = self._decode(self.ids[self._start : self._shown])
        now = self._decode(self.ids[self._start :])
        if len(now) <= len(before) or (now.endswith(BROKEN) and not final):
            return ""
        self._start, self._shown = self._shown, len(self.ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

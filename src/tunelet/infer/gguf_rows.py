"""The rows that a GGUF file and its model are compared on: token ids, and where the answer begins.

Not for comparing (gguf_gate.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tunelet.errors import TuneletError

ROWS = 24  # rows compared on, at least
CUT = 256  # tokens of a row
BUILT_IN = "built-in rows in English and Korean"


@dataclass(frozen=True)
class Row:
    """ids of a whole row; start: index of the first token of its answer, at least 1."""

    ids: tuple[int, ...]
    start: int


def of_tokens(rows: Iterable[Any]) -> list[Row]:
    """Rendered rows (data.examples.Tokens) -> Row. The answer is what is trained; of plain text, all behind its first
    quarter."""
    found = []
    for row in rows:
        row = row.only(0) if row.branches else row
        text = all(role == "text" for _, _, role in row.spans)
        first = len(row.ids) // 4 if text else next((n for n, on in enumerate(row.mask) if on), 0)
        if 0 < first < len(row.ids):
            found.append(Row(tuple(int(id_) for id_ in row.ids), first))
    return found


def built_in(tokenizer: Any) -> list[Row]:
    """The starter's conversations in the tokenizer's own chat template, its texts where there is none or it refuses
    them."""
    from tunelet.data import formats
    from tunelet.data.examples import Text
    from tunelet.data.render import Renderer

    renderer = Renderer(tokenizer)
    if tokenizer.chat_template:
        with contextlib.suppress(TuneletError):
            chats = formats.load(["starter"], want="chat", split="test", limit=4 * ROWS).examples
            return of_tokens(renderer.chats(chats))
    texts = [one for one in formats.load(["starter"], want="text", split="test", limit=2 * ROWS).examples]
    rows = [renderer.raw(text.text) for text in texts if isinstance(text, Text)]
    return [Row(tuple(ids), max(1, len(ids) // 4)) for ids in rows if len(ids) > 1]


def choose(rows: Sequence[Row], positions: int, context: int) -> list[Row]:
    """The first rows whose answers have `positions` tokens together and are at least ROWS, cut to what fits CUT and
    `context` (0: no limit)."""
    most = min(CUT, context or CUT)
    chosen: list[Row] = []
    found = 0
    for row in rows:
        if len(chosen) >= ROWS and found >= positions:
            break
        if row.start < most - 1:
            chosen.append(Row(row.ids[:most], row.start))
            found += len(chosen[-1].ids) - row.start
    return chosen


def enough(rows: Sequence[Row], rows_from: str, tokenizer: Any, positions: int, context: int) -> tuple[list[Row], str]:
    """`rows`, filled up with built-in ones where they are too few, and what they are in words."""
    given = choose(rows, positions, context)
    if len(given) >= ROWS and sum(len(row.ids) - row.start for row in given) >= positions:
        return given, rows_from
    more = choose([*given, *built_in(tokenizer)], positions, context)
    return more, f"{rows_from}, and {BUILT_IN}" if given else BUILT_IN

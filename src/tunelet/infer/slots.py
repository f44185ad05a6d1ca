"""The KV cache of a batch whose rows come and go: every row ends in the same column, so that one step writes them all.

Not for deciding who comes and goes (continuous.py). Rows are aligned on the right: a row of n tokens fills the columns
[at - n, at). A longer one that joins moves the others to the right; when the room is used up all move to the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

FIRST_ROOM = 256  # columns that are there at first; doubled as they are needed
Pairs = list[tuple[torch.Tensor, torch.Tensor]]  # of each layer: keys, values [heads, columns, head_dim]


class SlotLayer(DynamicLayer):
    """Keys and values [slots, heads, room, head_dim] of one layer; the model sees its `owner`'s rows and columns."""

    def __init__(self, owner: SlotCache):
        super().__init__()
        self.owner = owner
        self.is_initialized = True
        self.room: list[torch.Tensor] = []

    def begin(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Room for rows like these, [heads, columns, head_dim]."""
        of = self.owner
        self.room = [x.new_zeros(of.slots, x.shape[0], of.room, x.shape[2]) for x in (keys, values)]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        of = self.owner
        end = of.at + key_states.shape[-2]
        for buffer, new in zip(self.room, (key_states, value_states), strict=True):
            buffer[: of.rows, :, of.at : end] = new
        keys, values = (buffer[: of.rows, :, of.low : end] for buffer in self.room)
        return keys, values

    def get_seq_length(self) -> int:
        return self.owner.at - self.owner.low


class SlotCache:
    """slots: most rows; longest: most columns of a row. rows: how many there are, the first ones of the buffers; at:
    the column that is written next; starts: the first column of each row; cache: what transformers is given."""

    def __init__(self, layers: int, slots: int, longest: int):
        self.slots, self.longest = slots, longest
        self.room = min(FIRST_ROOM, self._most)
        self.rows = self.at = 0
        self.starts: list[int] = []
        self.layers = [SlotLayer(self) for _ in range(layers)]
        self.cache = DynamicCache()
        self.cache.layers = self.layers

    @property
    def _most(self) -> int:
        return self.longest + FIRST_ROOM

    @property
    def low(self) -> int:
        """The first column that any row has."""
        return min(self.starts, default=self.at)

    def join(self, pairs: Pairs) -> None:
        """A row more, with these keys and values."""
        columns = pairs[0][0].shape[1]
        if not self.layers[0].room:
            for layer, pair in zip(self.layers, pairs, strict=True):
                layer.begin(*pair)
        if not self.rows:
            self.at = 0
        if columns > self.at:
            self._move(columns - self.at, max(self.room, min(self._most, 2 * columns)))
        for layer, pair in zip(self.layers, pairs, strict=True):
            for buffer, new in zip(layer.room, pair, strict=True):
                buffer[self.rows, :, self.at - columns : self.at] = new
        self.starts.append(self.at - columns)
        self.rows += 1

    def leave(self, row: int) -> None:
        """The row goes, and the last one takes its place."""
        last = self.rows - 1
        if row != last:
            here = slice(self.starts[last], self.at)
            for layer in self.layers:
                for buffer in layer.room:
                    buffer[row, :, here] = buffer[last, :, here]
        self.starts[row] = self.starts[last]
        self.starts.pop()
        self.rows -= 1

    def pairs(self, row: int, columns: int) -> Pairs:
        """Copies of the first `columns` of a row."""
        here = slice(self.starts[row], self.starts[row] + columns)
        return [(keys[row, :, here].clone(), values[row, :, here].clone()) for keys, values in self._rooms()]

    def before_step(self) -> torch.Tensor:
        """Make room for a column. [rows, columns] int64: 1 where a row has something to see, the new one included."""
        if self.at + 1 > self.room:
            self._move(-self.low, self.room if self.low else min(2 * self.room, self._most))
        columns = torch.arange(self.low, self.at + 1)
        return (columns >= torch.tensor(self.starts)[:, None]).long()

    def after_step(self) -> None:
        self.at += 1

    def _rooms(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(layer.room[0], layer.room[1]) for layer in self.layers]

    def _move(self, by: int, room: int) -> None:
        """All rows `by` columns to the right (below 0: to the left), in buffers of `room` columns."""
        low, at = self.low, self.at
        for layer in self.layers:
            for number, buffer in enumerate(layer.room):
                held = buffer[: self.rows, :, low:at].clone()
                if room > self.room:
                    buffer = buffer.new_zeros(*buffer.shape[:2], room, buffer.shape[3])
                    layer.room[number] = buffer
                buffer[: self.rows, :, low + by : at + by] = held
        self.room = room
        self.at += by
        self.starts = [start + by for start in self.starts]


class Prefixes:
    """Keys and values of what was read before, by its tokens: the longest beginning that a new prompt shares is not
    computed again. most_mb: what they may take; those used longest ago go first."""

    def __init__(self, most_mb: float):
        self.most = most_mb * 1e6
        self.kept: dict[tuple[int, ...], Pairs] = {}

    def find(self, ids: Sequence[int]) -> tuple[int, Pairs | None]:
        """(how many tokens at the beginning, the row that has them)"""
        best, key = 0, None
        for tokens in self.kept:
            if (n := shared(ids, tokens)) > best:
                best, key = n, tokens
        if key is None:
            return 0, None
        self.kept[key] = self.kept.pop(key)  # the last one now
        return best, self.kept[key]

    def keep(self, ids: Sequence[int], pairs: Pairs) -> None:
        new = tuple(ids)
        if any(shared(new, tokens) == len(new) for tokens in self.kept):
            return
        for tokens in [tokens for tokens in self.kept if shared(new, tokens) == len(tokens)]:
            del self.kept[tokens]  # the new one begins with it
        self.kept[new] = pairs
        while self.kept and sum(map(_bytes, self.kept.values())) > self.most:
            del self.kept[next(iter(self.kept))]


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences have in common at the beginning."""
    most = min(len(a), len(b))
    if list(a[:most]) == list(b[:most]):
        return most
    low, high = 0, most  # a[:low] is shared, a[:high] is not
    while high - low > 1:
        middle = (low + high) // 2
        if list(a[low:middle]) == list(b[low:middle]):
            low = middle
        else:
            high = middle
    return low


def _bytes(pairs: Pairs) -> int:
    return sum(x.numel() * x.element_size() for pair in pairs for x in pair)

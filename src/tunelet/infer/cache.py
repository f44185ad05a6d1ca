"""A KV cache layer with room reserved in advance: each step writes its token in place.

Not a cache of its own: one layer kind for transformers' DynamicCache, whose own layer copies all keys and values at
every step
(most of the time of a decoding step with many rows).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Keys and values [rows, heads, length, head_dim] as views of buffers of `capacity` tokens; grows by doubling
    past it.
    """

    def __init__(self, capacity: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.capacity = capacity
        self.room: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self._reserve(key_states, value_states)

    def _reserve(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Buffers with the rows and heads of `keys` and `values`, holding what the layer holds now."""
        held = self.get_seq_length()
        room = []
        for like, old in ((keys, self.keys), (values, self.values)):
            rows, heads, _, width = like.shape
            buffer = like.new_empty(rows, heads, self.capacity, width)
            buffer[:, :, :held] = old
            room.append(buffer)
        self.room = (room[0], room[1])
        self._show(held)

    def _show(self, length: int) -> None:
        assert self.room is not None
        self.keys, self.values = self.room[0][:, :, :length], self.room[1][:, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if end > self.capacity:
            self.capacity = max(end, 2 * self.capacity)
            self._reserve(key_states, value_states)
        assert self.room is not None
        self.room[0][:, :, start:end] = key_states
        self.room[1][:, :, start:end] = value_states
        self._show(end)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.keys.shape[-2] if self.is_initialized else 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.get_seq_length() > 0:
            held = self.get_seq_length()
            keys, values = self.keys[indices], self.values[indices]
            self.keys, self.values = keys, values
            self._reserve(keys, values)
            assert self.get_seq_length() == held

    def crop(self, tokens_to_remove: int) -> None:
        self._show(self.get_seq_length() - abs(tokens_to_remove))

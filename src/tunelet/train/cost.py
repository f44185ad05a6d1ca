"""What a training costs per token, layer and parameter, in seconds and bytes.

Not the prediction (train/plan.py adds these up over a run's own rows) and not the measuring (train/measure.py). Time is
linear in a row's tokens but for attention, whose share of a token grows with the length of its row: so rows of a few
lengths are measured, and between them a token's cost is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tunelet.data import pack
from tunelet.data.examples import Tokens


@dataclass(frozen=True)
class Probe:
    """A made-up micro-batch: the lengths of its rows, the last `targets` tokens in all of which are trained."""

    lengths: tuple[int, ...]
    targets: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Curve:
    """const + for each row its length x what a token of a row of that length costs, between `lengths` interpolated and
    beyond them extrapolated (attention's part of a token is linear in the length)."""

    const: float
    lengths: tuple[float, ...]
    per_token: tuple[float, ...]

    def __call__(self, rows: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray = (0,)) -> np.ndarray:
        """[micro-batches]: the cost of each. rows: lengths, one micro-batch after the other; they begin at `starts`."""
        n = np.asarray(rows, dtype=np.float64)
        tokens = np.add.reduceat(n, starts)
        return self.const + np.add.reduceat(n * self.token(n), starts) * filled(tokens) / tokens

    def token(self, n: np.ndarray) -> np.ndarray:
        """[rows]: what a token of each costs."""
        at, cost = np.asarray(self.lengths), np.asarray(self.per_token)
        out = np.interp(n, at, cost)
        if len(at) > 1:
            slope = max(0.0, (cost[-1] - cost[-2]) / (at[-1] - at[-2]))
            out = np.where(n > at[-1], cost[-1] + slope * (n - at[-1]), out)
        return out


def filled(tokens: Any) -> Any:
    """A stream is filled up to a multiple (data/pack.py)."""
    return -(-tokens // pack.MULTIPLE) * pack.MULTIPLE


@dataclass(frozen=True)
class Cost:
    """Of the whole model, at its full depth. Seconds are of the clock, on an otherwise idle machine.

    seconds_layers: of all layers, forward and backward of a micro-batch; seconds_rest: (of a micro-batch, of each
    target); seconds_update: of one optimizer step; seconds_sum: of adding a micro-batch's gradients up; evaluation_*:
    the same forward only. cpu_per_second: CPU seconds per second of the clock.
    bytes_*: weights (base and adapter), optimizer state, gradients, sums of gradients (where a step has several
    micro-batches); saved: what a forward keeps for the backward; at_top, at_bottom: what a backward holds beside that
    when it begins, and beside the gradients when it ends; at_head: beside `saved`, (const, of each target up to
    head_chunk), and head_most where there are more; bytes_update: of an optimizer step;
    evaluation_body, evaluation_head: of a forward without gradients. watts: None where no counter can be read.
    busy: cores that this training and other programs wanted while it was measured, for each that there is.
    """

    parameters: int
    trained: int
    seconds_layers: Curve
    seconds_rest: tuple[float, float]
    seconds_update: float
    seconds_sum: float
    evaluation_layers: Curve
    evaluation_rest: tuple[float, float]
    cpu_per_second: float
    bytes_weights: int
    bytes_state: int
    bytes_gradients: int
    bytes_sums: int
    bytes_checkpoint: int
    bytes_update: int
    saved: Curve
    at_top: Curve
    at_bottom: Curve
    at_head: tuple[float, float]
    head_chunk: int
    head_most: int
    evaluation_body: Curve
    evaluation_head: tuple[float, float]
    watts: float | None
    busy: float
    seconds: float  # that measuring took

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Cost:
        """Raises KeyError, TypeError or ValueError where `told` is not what `to_json` gave."""
        made = dict(told)
        for name, kind in cls.__annotations__.items():
            if kind == "Curve":
                curve = made[name]
                made[name] = Curve(float(curve["const"]), tuple(curve["lengths"]), tuple(curve["per_token"]))
            elif kind.startswith("tuple"):
                first, second = made[name]
                made[name] = (float(first), float(second))
        return cls(**made)


@dataclass(frozen=True)
class Batches:
    """Micro-batches: `lengths` of all their rows, those of each from `starts` on; `targets` of each."""

    lengths: np.ndarray
    starts: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, batches: Sequence[Sequence[Tokens]]) -> Batches:
        sizes = [len(batch) for batch in batches]
        return cls(
            np.array([len(row.ids) for batch in batches for row in batch], dtype=np.int64),
            np.cumsum([0, *sizes])[:-1].astype(np.int64),
            np.array([sum(int(row.trained) for row in batch) for batch in batches], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def tokens(self) -> np.ndarray:
        """[micro-batches]"""
        return np.add.reduceat(self.lengths, self.starts)

    def cost(self, curve: Curve) -> np.ndarray:
        """[micro-batches]"""
        return curve(self.lengths, self.starts)

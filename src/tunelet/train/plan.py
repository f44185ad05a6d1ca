"""What a training will take, foretold by the training itself after its first few steps: plan.json's "predicted".

Not the plan before a run, which must predict without training anything. This only extrapolates: the seconds for each
token of the steps so far, the most memory held so far, the power drawn so far. It leaves out the time that checkpoints
take to write and memory that only a later, longer batch will need, and takes every step to be trained (no early
stopping). Disk is counted from the parameters: the model, and what is kept of checkpoints.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunelet.data.examples import Tokens
from tunelet.models import device
from tunelet.recipe import Recipe
from tunelet.runs.record import Run
from tunelet.train import energy

STEPS = 5  # after so many steps it is told, or before the last one; the first, which warms up, is left out
CHECKPOINT_BYTES = 12  # for each trained parameter: fp32 weight and two moments


@dataclass
class Forecast:
    """`with Forecast(...) as forecast:` around the steps, `forecast.step(...)` after each. Writes plan.json once; a run
    that goes on keeps the prediction it has."""

    recipe: Recipe
    run: Run
    model: Any
    rows: Sequence[Tokens]
    choice: device.Choice
    total: int
    stored_dtype: str | None  # None: an adapter, as it is
    evaluation: float = 0.0  # seconds of one held-out evaluation; 0: none

    def __post_init__(self):
        self.paces: list[float] = []  # seconds for each token, step by step
        self.open = self.run.read_json("plan.json", {}).get("predicted") is None
        self.meter = energy.Meter(self.choice.device, counters=None if self.open else {})

    def __enter__(self) -> Forecast:
        self.meter.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.meter.__exit__(*error)
        if self.open and error[0] is None:
            self.run.plan(None, reason="it had too few steps to extrapolate from")

    def step(self, step: int, seconds: float, tokens: int, spent: float) -> None:
        """`step` is done, it took `seconds` for `tokens`; `spent`: seconds of the training so far."""
        if not self.open or step == self.total:
            return
        self.paces.append(seconds / tokens)
        if len(self.paces) < 2 or (len(self.paces) < STEPS and step < self.total - 1):
            return
        settings = self.recipe.train
        mean_length = sum(len(row.ids) for row in self.rows) / len(self.rows)
        step_tokens = mean_length * min(settings.batch_size * settings.gradient_accumulation, len(self.rows))
        at = settings.eval_steps
        evaluations = 1 if not at else self.total // at - step // at + bool(self.total % at)
        left = statistics.median(self.paces[1:]) * step_tokens * (self.total - step) + self.evaluation * evaluations
        figures = self.meter.reading()
        self.run.plan(
            {
                "seconds": spent + left,
                "peak_mb": device.peak_mb(self.choice.device),
                "disk_mb": self._disk_mb(),
                "energy_wh": figures["energy_wh"] / figures["seconds"] * (spent + left),
            },
            reason=f"extrapolated after {len(self.paces)} steps of {self.total}",
        )
        self.open = False

    def _disk_mb(self) -> float:
        settings, dtype = self.recipe.train, self.stored_dtype
        trained = [p for p in self.model.parameters() if p.requires_grad]
        stored = trained if dtype is None else list(self.model.parameters())
        size = sum(p.numel() * (p.element_size() if dtype is None else getattr(torch, dtype).itemsize) for p in stored)
        saves = -(-self.total // settings.save_steps) if settings.save_steps else 1
        kept = min(saves, settings.keep_checkpoints) * CHECKPOINT_BYTES + (4 if settings.early_stopping else 0)
        return (size + kept * sum(p.numel() for p in trained)) / 1e6

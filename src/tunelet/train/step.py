"""One optimizer step: its rows cut into micro-batches, forward and backward of each, one update.

Not the loop around it (train/loop.py), the formulas (methods/) or the update's arithmetic (train/optimizer.py). However
a step's rows are cut, its loss is the sum over all its targets divided by their number, and so is its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tunelet.data import pack
from tunelet.data.examples import Batch, Tokens
from tunelet.errors import TuneletError
from tunelet.methods import losses
from tunelet.recipe import Recipe, TrainSection
from tunelet.train import distributed, schedule
from tunelet.train.optimizer import AdamW


@dataclass(frozen=True)
class Done:
    """What one optimizer step did. loss: mean over `targets`; norm: of the gradient before clipping."""

    loss: float
    norm: float
    learning_rate: float
    tokens: int
    targets: int


def micro_batches(rows: Sequence[Tokens], settings: TrainSection) -> list[list[Tokens]]:
    """A step's rows in groups of `batch_size`, and a group of more than `tokens_per_batch` tokens cut into even parts
    of rows of similar length. A row that is longer alone stays whole."""
    out: list[list[Tokens]] = []
    for at in range(0, len(rows), settings.batch_size):
        group = list(rows[at : at + settings.batch_size])
        tokens = sum(len(row.ids) for row in group)
        parts = math.ceil(tokens / settings.tokens_per_batch) if settings.tokens_per_batch else 1
        if parts == 1:
            out.append(group)
            continue
        group.sort(key=lambda row: -len(row.ids))
        part: list[Tokens] = []
        held = 0
        for row in group:
            if part and held + len(row.ids) / 2 > tokens / parts:
                out.append(part)
                part, held = [], 0
            part.append(row)
            held += len(row.ids)
        out.append(part)
    return out


def optimizer_for(model: Any, settings: TrainSection) -> AdamW:
    """The optimizer of a training with these settings, over the parameters of `model` that are trained."""
    return AdamW(
        model.named_parameters(),
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        state="float32" if settings.optimizer_state == "auto" else settings.optimizer_state,
    )


@dataclass
class Stepper:
    """`stepper(rows, step, total)` makes optimizer step number `step` (from 0) of `total` on `rows`."""

    model: Any
    optimizer: AdamW
    recipe: Recipe
    device: str
    sharded: bool = False  # a layer computes only where every process computes it

    def __post_init__(self):
        self.loss_of: Callable[..., torch.Tensor] = losses()[self.recipe.method]

    def __call__(self, rows: Sequence[Tokens], step: int, total: int) -> Done:
        """Raises TuneletError where no row has a trained token. Nothing is updated where loss or norm is not finite."""
        settings, world = self.recipe.train, distributed.world()
        targets = sum(row.trained for row in rows)
        if not targets:
            raise TuneletError(
                f"Step {step + 1} has no trained token.",
                why=f"no token of {rows[0].origin} is a target",
                fix="Drop rows without an answer: tunelet data doctor.",
            )
        # dropout, a function of (seed, step, process)
        torch.manual_seed(settings.seed * 1_000_003 + step + (world.rank << 40))
        divided = [micro_batches(part, settings) for part in distributed.divide(rows, world.size)]
        batches = [pack.make_batch(part) for part in divided[world.rank]]
        loss = 0.0
        for number, batch in enumerate(batches):
            if len(batches) > 1 or world.size > 1:
                self.optimizer.accumulate(number)
            loss += self._backward(batch.to(self.device), targets)
        if self.sharded:
            for number in range(len(batches), max(map(len, divided))):
                self.optimizer.accumulate(number)
                self._take_part(rows)
        if world.size > 1:
            self.optimizer.add_up(world.add_up)
            loss = world.sums(loss)[0]
        rate = schedule.learning_rate(
            step,
            total,
            peak=settings.learning_rate,
            schedule=settings.schedule,
            warmup=settings.warmup,
            min_ratio=settings.min_lr_ratio,
        )
        norm = self.optimizer.step(rate, settings.max_grad_norm) if math.isfinite(loss) else loss
        return Done(loss, norm, rate, sum(len(row.ids) for row in rows), targets)

    def _backward(self, batch: Batch, targets: int) -> float:
        part = self.loss_of(self.model, batch, targets)
        part.backward()
        return float(part.detach())

    def _take_part(self, rows: Sequence[Tokens]) -> None:
        """A forward and backward that adds nothing, while other processes still have some to make."""
        batch = pack.make_batch([min((row for row in rows if row.trained), key=lambda row: len(row.ids))])
        (self.loss_of(self.model, batch.to(self.device), 1) * 0.0).backward()

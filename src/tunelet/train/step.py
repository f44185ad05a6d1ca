"""One optimizer step: its rows cut into micro-batches, forward and backward of each, one update.

Not the loop around it (train/loop.py), the formulas (methods/) or the update's arithmetic (train/optimizer.py). However
a step's rows are cut, its loss is the sum over all its targets divided by their number, and so is its gradient.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from tunelet.data import pack
from tunelet.data.examples import Batch, Tokens
from tunelet.errors import TuneletError
from tunelet.methods import Totals, losses
from tunelet.models import sequences
from tunelet.recipe import PREFERENCE, Recipe, TrainSection
from tunelet.train import distributed, schedule
from tunelet.train.optimizer import AdamW


@dataclass(frozen=True)
class Done:
    """What one optimizer step did. loss: mean over `weight` targets, or rows where rows are compared; norm: of the
    gradient before clipping; told: what the method says of the step's rows, means over them."""

    loss: float
    norm: float
    learning_rate: float
    tokens: int
    targets: int
    weight: int
    told: dict[str, float]


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


def optimizer_for(model: Any, settings: TrainSection, rates: Sequence[tuple[str, float]] = ()) -> AdamW:
    """The optimizer of a training with these settings, over the parameters of `model` that are trained; rates: as in
    AdamW."""
    return AdamW(
        model.named_parameters(),
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        state="float32" if settings.optimizer_state == "auto" else settings.optimizer_state,
        rates=rates,
    )


@dataclass
class Stepper:
    """`stepper(rows, step, total)` makes optimizer step number `step` (from 0) of `total` on `rows`; `held_out(rows)`
    is the same loss without one."""

    model: Any
    optimizer: AdamW
    recipe: Recipe
    device: str
    sharded: bool = False  # a layer computes only where every process computes it

    def __post_init__(self):
        self._loss: Callable[..., tuple[torch.Tensor, dict[str, float]]] = losses()[self.recipe.method.name]
        self._kto = self.recipe.method.name == "kto"

    def loss_of(self, batch: Batch, totals: Totals) -> tuple[torch.Tensor, dict[str, float]]:
        """The share of a micro-batch (on the CPU yet) in the loss of its step, and sums over its rows for the log."""
        return self._loss(self.model, batch.to(self.device), totals, self.recipe.method)

    def __call__(self, rows: Sequence[Tokens], step: int, total: int) -> Done:
        """Raises TuneletError where no row has a trained token. Nothing is updated where loss or norm is not finite."""
        settings, world = self.recipe.train, distributed.world()
        totals = Totals.of(rows)
        if not totals.targets:
            raise TuneletError(
                f"Step {step + 1} has no trained token.",
                why=f"no token of {rows[0].origin} is a target",
                fix="Drop rows without an answer: tunelet data doctor.",
            )
        # dropout, a function of (seed, step, process)
        torch.manual_seed(settings.seed * 1_000_003 + step + (world.rank << 40))
        divided = [micro_batches(part, settings) for part in distributed.divide(rows, world.size)]
        totals = self.with_kl(totals, divided)
        batches = [self.batch(part) for part in divided[world.rank]]
        loss, told = 0.0, Counter()
        for number, batch in enumerate(batches):
            if len(batches) > 1 or world.size > 1:
                self.optimizer.accumulate(number)
            part, said = self.loss_of(batch, totals)
            part.backward()
            loss += float(part.detach())
            told.update(said)
        if self.sharded:
            for number in range(len(batches), max(map(len, divided))):
                self.optimizer.accumulate(number)
                self._take_part(rows)
        if world.size > 1:
            self.optimizer.add_up(world.add_up)
        loss, told = self._together(loss, told, rows)
        rate = schedule.learning_rate(
            step,
            total,
            peak=settings.learning_rate,
            schedule=settings.schedule,
            warmup=settings.warmup,
            min_ratio=settings.min_lr_ratio,
        )
        norm = self.optimizer.step(rate, settings.max_grad_norm) if math.isfinite(loss) else loss
        weight = len(rows) if self.recipe.method.name in PREFERENCE else totals.targets
        return Done(loss, norm, rate, sum(len(row.ids) for row in rows), totals.targets, weight, told)

    @torch.no_grad()
    def held_out(self, rows: Sequence[Tokens]) -> tuple[float, dict[str, float]]:
        """(loss of `rows`, what the method says of them, means over rows); nan where nothing is a target. Several
        processes take turns with the batches; each makes as many forwards as the others, as sharded layers need."""
        world, size = distributed.world(), self.recipe.train.batch_size
        by_length = sorted((row for row in rows if row.trained), key=lambda row: len(row.ids))
        if not by_length:
            return float("nan"), {}
        parts = [by_length[at : at + size] for at in range(0, len(by_length), size)]
        was_training = self.model.training
        self.model.eval()
        totals = self.with_kl(Totals.of(by_length), [parts[rank :: world.size] for rank in range(world.size)])
        loss, told = 0.0, Counter()
        for at in range(0, len(parts), world.size):
            mine = at + world.rank
            part, said = self.loss_of(self.batch(parts[min(mine, len(parts) - 1)]), totals)
            if mine < len(parts):
                loss += float(part)
                told.update(said)
        self.model.train(was_training)
        return self._together(loss, told, by_length)

    def batch(self, rows: Sequence[Tokens]) -> Batch:
        return pack.make_batch([row.only(0) for row in rows] if self._kto else rows)

    def with_kl(self, totals: Totals, divided: Sequence[Sequence[Sequence[Tokens]]]) -> Totals:
        """The totals of a step with KTO's reference point, of answers given to other prompts."""
        if not self._kto:
            return totals
        world = distributed.world()
        mine, excess = divided[world.rank], 0.0
        for number in range(max(map(len, divided))):  # sharded layers need every process at every forward
            batch = pack.make_batch([row.only(1) for row in (mine[number] if number < len(mine) else divided[0][0])])
            if number < len(mine):
                scored = sequences.scored(self.model, batch.to(self.device))
                excess += sum(total for total, _ in scored) - float(batch.reference.sum())
            elif self.sharded:
                sequences.scored(self.model, batch.to(self.device))
        return replace(totals, kl=max(0.0, world.sums(excess)[0] / totals.rows))

    def _together(
        self, loss: float, told: Mapping[str, float], rows: Sequence[Tokens]
    ) -> tuple[float, dict[str, float]]:
        """Sums of all processes; `told` as means over rows."""
        names = distributed.world().told(sorted(told))  # process 0 always has rows
        loss, *sums = distributed.world().sums(loss, *(told.get(name, 0.0) for name in names))
        return loss, {name: value / len(rows) for name, value in zip(names, sums, strict=True)}

    def _take_part(self, rows: Sequence[Tokens]) -> None:
        """A forward and backward that adds nothing, while other processes still have some to make."""
        batch = self.batch([min((row for row in rows if row.trained), key=lambda row: len(row.ids))])
        (self.loss_of(batch, Totals(1, 1, 1))[0] * 0.0).backward()

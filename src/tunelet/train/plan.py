"""What a training will take: seconds, memory, disk and energy, added up over the micro-batches that it will have.

Not the measuring (train/measure.py) and not what to change where it does not fit (train/fit.py). The lengths of all
rows and their order are known before the run, so nothing is guessed but what train/cost.py says of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunelet.data.examples import Tokens
from tunelet.models.device import Choice
from tunelet.recipe import PREFERENCE, REFERENCED, Recipe
from tunelet.train import energy, loop, reference, step
from tunelet.train.cost import Batches, Cost, filled

MOST_ROWS = 50_000  # rows looked at one by one; of a longer training evenly spread steps stand for all
# glibc's heap has holes: of tensors that come and go it holds more than is ever used at once (docs/notebook.md)
# and oneDNN keeps the code of the products that it has seen. (MB, share of what is used, MB at most): after batches of
# a few lengths, and after so many lengths that no more is added.
HOLES_FEW, HOLES_MANY, MANY = (0, 0.45, 320), (110, 1.2, 640), 25
OTHER_FILES_MB = 0.5  # log, report, masks and the like


@dataclass(frozen=True)
class Work:
    """What a training computes. train: the micro-batches of the steps that were looked at, `share` of all; several:
    whether a step has more than one; evaluation: of one of `evaluations`."""

    steps: int
    train: Batches
    share: float
    several: bool
    evaluation: Batches | None
    evaluations: int
    checkpoints: int
    reference: Batches | None = None  # of the pass under the start model, where the method measures from there


@dataclass(frozen=True)
class Prediction:
    """As plan.json has it (PLAN_KEYS of runs/record.py), and of what it is made.

    seconds: training with evaluations and checkpoints, as `seconds` of a finished run; start_seconds: loading before
    it. peak_mb: None where the device tells no memory. parts_mb: what is held when most is held.
    """

    seconds: float
    peak_mb: float
    disk_mb: float
    energy_wh: float
    energy_kind: str
    tokens: int
    parts_seconds: dict[str, float]
    parts_mb: dict[str, float]

    def figures(self) -> dict[str, float]:
        """For plan.json."""
        return {"seconds": self.seconds, "peak_mb": self.peak_mb, "disk_mb": self.disk_mb, "energy_wh": self.energy_wh}


def work(recipe: Recipe, train_rows: Sequence[Tokens], eval_rows: Sequence[Tokens]) -> Work:
    """Cuts the rows as the run will. recipe: with train.tokens_per_batch as it will be used."""
    settings = recipe.train
    total = loop.total_steps(recipe, len(train_rows))
    size = min(settings.batch_size * settings.gradient_accumulation, len(train_rows))
    each = max(1, round(total * size / MOST_ROWS))
    cut = [
        step.micro_batches(rows, settings)
        for number, rows in enumerate(loop.step_rows(train_rows, recipe, 0, total))
        if number % each == 0
    ]
    by_length = sorted((row for row in eval_rows if row.trained), key=lambda row: len(row.ids))
    held_out = [by_length[at : at + settings.batch_size] for at in range(0, len(by_length), settings.batch_size)]
    every = loop.evaluate_every(recipe, total)
    between = -(-total // every) - 1 if every else 0
    return Work(
        steps=total,
        train=Batches.of([batch for parts in cut for batch in parts]),
        share=len(cut) / total,
        several=any(len(parts) > 1 for parts in cut),
        evaluation=Batches.of(held_out) if held_out else None,
        evaluations=2 + between if held_out else 0,
        checkpoints=-(-total // settings.save_steps) if settings.save_steps else 1,
        reference=_reference(recipe, train_rows, eval_rows, total),
    )


def _reference(recipe: Recipe, train_rows: Sequence[Tokens], eval_rows: Sequence[Tokens], total: int) -> Batches | None:
    if recipe.method.name not in REFERENCED:
        return None
    rows = [*(train_rows[place] for place in loop.places_of(recipe, train_rows, total)), *eval_rows]
    return Batches.of([[rows[place] for place in places] for places in reference.batches(rows)])


def predict(
    recipe: Recipe,
    cost: Cost,
    todo: Work,
    choice: Choice,
    *,
    base_mb: float,
    disk_mb_per_second: float,
    stored_bytes: int | None,
) -> Prediction:
    """base_mb: what the process holds without the model; stored_bytes: of a saved weight, None for an adapter."""
    seconds = _seconds(cost, todo, disk_mb_per_second, choice.processes)
    total = sum(seconds.values())
    memory = _memory(cost, todo, base_mb, choice)
    peak = sum(memory.values())
    spent = energy.reading(choice.device, total, total * cost.cpu_per_second, peak / 1e3, {})
    measured = cost.watts is not None
    return Prediction(
        seconds=total,
        peak_mb=peak,
        disk_mb=_disk_mb(recipe, cost, todo, stored_bytes),
        energy_wh=cost.watts * total / 3600 if cost.watts is not None else spent["energy_wh"],
        energy_kind="measured" if measured else "estimated",
        tokens=round(int(todo.train.tokens.sum()) / todo.share),
        parts_seconds=seconds,
        parts_mb=memory,
    )


def step_seconds(cost: Cost, batches: Batches, several: bool) -> np.ndarray:
    """[micro-batches]: seconds of the forward and backward of each."""
    const, each = cost.seconds_rest
    return batches.cost(cost.seconds_layers) + const + each * batches.targets + (cost.seconds_sum if several else 0.0)


def _seconds(cost: Cost, todo: Work, disk_mb_per_second: float, processes: int) -> dict[str, float]:
    evaluation = 0.0
    if todo.evaluation:
        const, each = cost.evaluation_rest
        held_out = todo.evaluation
        evaluation = float((held_out.cost(cost.evaluation_layers) + const + each * held_out.targets).sum())
    before = 0.0
    if todo.reference:
        const, each = cost.evaluation_rest
        before = float((todo.reference.cost(cost.evaluation_layers) + const + each * todo.reference.targets).sum())
    return {
        **({"reference": before / processes} if before else {}),
        "forward and backward": float(step_seconds(cost, todo.train, todo.several).sum()) / todo.share / processes,
        "optimizer": cost.seconds_update * todo.steps,
        "evaluation": evaluation * todo.evaluations / processes,
        "checkpoints": todo.checkpoints * cost.bytes_checkpoint / 1e6 / disk_mb_per_second,
    }


def _memory(cost: Cost, todo: Work, base_mb: float, choice: Choice) -> dict[str, float]:
    saved, targets = todo.train.cost(cost.saved), todo.train.targets
    gradients = 0 if todo.several else cost.bytes_gradients
    at_head = np.where(targets > cost.head_chunk, cost.head_most, cost.at_head[0] + cost.at_head[1] * targets)
    phases = [
        saved + todo.train.cost(cost.at_top),
        saved + at_head,
        gradients + todo.train.cost(cost.at_bottom),
        np.array([gradients + cost.bytes_update]),
    ]
    if todo.evaluation:
        const, each = cost.evaluation_head
        phases.append(todo.evaluation.cost(cost.evaluation_body))
        phases.append(const + each * np.minimum(todo.evaluation.targets, cost.head_chunk))
    passing = max(float(phase.max()) for phase in phases)
    parts = {
        "program": base_mb,
        "weights": cost.bytes_weights / 1e6,
        "optimizer state": cost.bytes_state / 1e6,
        **({"sums of gradients": cost.bytes_sums / 1e6} if todo.several else {}),
        "activations and gradients": passing / 1e6,
    }
    if choice.device == "cpu":
        used = sum(parts.values()) - base_mb
        few, many = (min(most, const + share * used) for const, share, most in (HOLES_FEW, HOLES_MANY))
        lengths = len(np.unique(filled(todo.train.tokens)))
        parts["holes between them"] = few + (many - few) * min(1.0, lengths / MANY)
    return {name: size * choice.processes for name, size in parts.items()}


def _disk_mb(recipe: Recipe, cost: Cost, todo: Work, stored_bytes: int | None) -> float:
    settings, guarded = recipe.train, recipe.method.name in PREFERENCE and recipe.method.guard == "stop"
    weight = 4 if settings.optimizer_state == "float32" else cost.bytes_gradients // max(1, cost.trained)
    kept = min(todo.checkpoints, settings.keep_checkpoints) * cost.bytes_checkpoint
    kept += cost.trained * weight if settings.early_stopping or (guarded and todo.evaluation) else 0
    saved = cost.trained * weight if stored_bytes is None else cost.parameters * stored_bytes
    return (kept + saved) / 1e6 + OTHER_FILES_MB

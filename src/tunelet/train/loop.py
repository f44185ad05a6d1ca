"""The training loop: batches in a fixed order, forward and backward, one optimizer step, log, evaluate, checkpoint; and
going on after a stop.

Not for reading data (train/prepare.py), loss formulas (methods/) or files of the run (runs/record.py,
train/checkpoint.py). Everything random is a function of (seed, epoch) or (seed, step), so that a resumed run ends
bit-identical to one that never stopped.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunelet.data import pack
from tunelet.data.examples import Tokens
from tunelet.errors import TuneletError
from tunelet.methods import by_label
from tunelet.models import adapters, device, head, virtual
from tunelet.recipe import PREFERENCE, REFERENCED, Recipe
from tunelet.runs.record import Run
from tunelet.train import checkpoint, distributed, guard, progress, reference, sharding, step
from tunelet.train.watch import Watch


@dataclass(frozen=True)
class Trained:
    """How a training ended. seconds are of training, evaluation included, over all its stops; tokens counts every token
    seen."""

    steps: int
    best_loss: float | None
    held_out_loss: float | None
    tokens: int
    seconds: float
    peak_mb: float | None
    stopped: str = ""  # by the guard: what was going wrong


@dataclass
class Progress:
    """All counters that a checkpoint carries. `window_*` run since the last log line."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    held_out_loss: float | None = None
    best_loss: float | None = None
    best_step: int = 0
    evaluations_without_better: int = 0
    kept_loss: float | None = None
    stopped: str = ""
    said: list[str] = field(default_factory=list)  # kinds of remarks that are made once
    window_loss: float = 0.0
    window_weight: int = 0
    window_told: dict[str, float] = field(default_factory=dict)
    window: dict[str, float] = field(default_factory=lambda: {"tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0})


def total_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of a training over `rows` rows."""
    per_epoch = math.ceil(rows / (recipe.train.batch_size * recipe.train.gradient_accumulation))
    return recipe.train.max_steps or max(1, math.ceil(recipe.train.epochs * per_epoch))


def step_places(rows: Sequence[Tokens], recipe: Recipe, first_step: int, total: int) -> Iterator[list[int]]:
    """Which rows each optimizer step takes from `first_step` on, in the order in which `batch_size` of them make a
    batch."""
    size = recipe.train.batch_size * recipe.train.gradient_accumulation
    lengths = [len(row.ids) for row in rows]
    per_epoch = math.ceil(len(rows) / size)
    epoch, batches = -1, []
    for number in range(first_step, total):
        if number // per_epoch != epoch:
            epoch = number // per_epoch
            batches = pack.batches(lengths, size, recipe.train.seed, epoch)
        yield batches[number % per_epoch]


def step_rows(rows: Sequence[Tokens], recipe: Recipe, first_step: int, total: int) -> Iterator[list[Tokens]]:
    """The same, the rows themselves."""
    for places in step_places(rows, recipe, first_step, total):
        yield [rows[i] for i in places]


def evaluate_every(recipe: Recipe, total: int) -> int:
    """Steps between held-out evaluations; 0: none but at the start and the end. A method that compares answers can
    damage a model in a few steps, so it is looked at ten times where the recipe does not say."""
    looked_at = recipe.method.name in PREFERENCE and recipe.method.guard != "off"
    return recipe.train.eval_steps or (math.ceil(total / 10) if looked_at else 0)


def places_of(recipe: Recipe, rows: Sequence[Tokens], total: int) -> list[int]:
    """Which rows `total` steps come to."""
    return sorted(set(itertools.chain.from_iterable(step_places(rows, recipe, 0, total))))


def with_reference(
    recipe: Recipe, model: Any, rows: Sequence[Tokens], held: Sequence[Tokens], total: int, choice: Any, console: Any
) -> tuple[list[Tokens], list[Tokens]]:
    """Training and held-out rows with what the model says of them now, where the method measures from there. Only the
    rows that `total` steps come to."""
    if recipe.method.name not in REFERENCED:
        return list(rows), list(held)
    places = places_of(recipe, rows, total)
    found = reference.attached(model, [*(rows[place] for place in places), *held], choice, console)
    out = list(rows)
    for place, row in zip(places, found, strict=False):
        out[place] = row
    return out, found[len(places) :]


def train(
    recipe: Recipe,
    run: Run | None,
    *,
    model: Any,
    tokenizer: Any,
    train_rows: Sequence[Tokens],
    eval_rows: Sequence[Tokens],
    choice: device.Choice,
    console: Any,
) -> Trained:
    """Train `model` in place on `train_rows`; on return its weights are the final (with early stopping: the best) ones.

    Goes on from the run's newest checkpoint where there is one. Raises Interrupted after Ctrl-C (a checkpoint is
    saved), TuneletError where the loss is no longer a number or the disk fails; the last checkpoint then stays whole.
    With several processes each calls this with the same rows; `run` is None but in process 0, where alone the model is
    whole on return.
    """
    settings, world = recipe.train, distributed.world()
    total = total_steps(recipe, len(train_rows))
    world.spread(model.parameters())
    started = time.perf_counter()
    train_rows, eval_rows = with_reference(recipe, model, train_rows, eval_rows, total, choice, console)
    watch = Watch.of(recipe, model, tokenizer, eval_rows)
    before = time.perf_counter() - started
    shards = sharding.shard_if_wanted(model, settings, choice.device, world, console)
    optimizer = step.optimizer_for(shards or model, settings, adapters.rates(recipe.adapter))
    if shards:
        shards.connect(optimizer)
    stepper = step.Stepper(model, optimizer, recipe, choice.device, sharded=shards is not None)
    checkpoints = checkpoint.Checkpoints(run, optimizer, world, shards)
    now = Progress(seconds=before)
    state = checkpoints.go_on()
    if state is not None:
        now = Progress(**{key: state[key] for key in asdict(now)})
        console.print(f"Going on from step {now.step} of {total}.")
        if watch:
            watch.go_on(world.told(run.log_rows() if run else None), now.step)
    if run:
        run.truncate_log(now.step if state else -1)

    def evaluate() -> bool:
        """Log the held-out loss, and what is said of it; False when early stopping or the guard says enough."""
        optimizer.settle()
        now.held_out_loss, told = stepper.held_out(eval_rows)
        told = {f"held_out/{name}": value for name, value in by_label(told).items()} | (
            watch.look(model) if watch else {}
        )
        optimizer.refresh()
        remarks = watch.judge(now.step, told) if watch else []
        if run:
            row = {"step": now.step, "held_out_loss": now.held_out_loss, **told}
            run.log(row | ({"remarks": [asdict(remark) for remark in remarks]} if remarks else {}))
        bar.evaluated(now.step, now.held_out_loss, told)
        for remark in remarks:
            console.print(str(remark), markup=False, highlight=False, soft_wrap=True)
        if any(remark.severity == "stop" for remark in remarks):
            now.stopped = next(remark.kind for remark in remarks if remark.severity == "stop")
            return False
        better = now.best_loss is None or now.held_out_loss < now.best_loss
        if better:
            now.best_loss, now.best_step, now.evaluations_without_better = now.held_out_loss, now.step, 0
        else:
            now.evaluations_without_better += 1
        if better if settings.early_stopping else guarded:  # the best weights, or the last that were sound
            checkpoints.save_best(now.step)
            now.kept_loss = now.held_out_loss
        return not settings.early_stopping or now.evaluations_without_better < settings.early_stopping

    model.train()
    soft = virtual.of(head.causal_lm(model))
    every, guarded = evaluate_every(recipe, total), watch is not None and recipe.method.guard == "stop"
    enough = settings.early_stopping and now.evaluations_without_better >= settings.early_stopping
    enough = enough or bool(now.stopped)
    with progress.stop_signals() as stop, progress.bar(console, total, now.step) as bar:
        clock = _Clock(now)
        if now.step == 0 and eval_rows:
            evaluate()
            clock.tick(now, 0)
        for rows in step_rows(train_rows, recipe, now.step, total if not enough else 0):
            done = stepper(rows, now.step, total)
            if not (math.isfinite(done.loss) and math.isfinite(done.norm)):
                raise _not_a_number(run, now.step + 1, done)
            now.step += 1
            now.tokens, now.trained_tokens = now.tokens + done.tokens, now.trained_tokens + done.targets
            now.window_loss, now.window_weight = (
                now.window_loss + done.loss * done.weight,
                now.window_weight + done.weight,
            )
            for name, value in done.told.items():
                now.window_told[name] = now.window_told.get(name, 0.0) + value * done.weight
            clock.tick(now, done.tokens)
            bar.advance(now.step, now.window_loss / now.window_weight, now.window)
            if now.step % settings.log_steps == 0 or now.step == total:
                row = _log_row(now, done, soft, choice)
                remark = guard.still(row, now.step / total, now.said) if soft else None
                if remark:
                    now.said.append(remark.kind)
                    console.print(str(remark), markup=False, highlight=False, soft_wrap=True)
                if run:
                    run.log(row | ({"remarks": [asdict(remark)]} if remark else {}))
                bar.logged(row)
                now.window_loss, now.window_weight, now.window_told, now.window = 0.0, 0, {}, Progress().window
            stopping = world.sums(stop.asked)[0] > 0  # a signal reaches each process at its own time
            go_on = True
            if eval_rows and (now.step == total or (every and now.step % every == 0)):
                go_on = evaluate()
                clock.tick(now, 0)
            if (
                (settings.save_steps and now.step % settings.save_steps == 0)
                or now.step == total
                or not go_on
                or stopping
            ):
                checkpoints.save(now.step, asdict(now), settings.keep_checkpoints)
                clock.tick(now, 0)
            if not go_on:
                break
            if stopping and now.step < total:
                raise progress.Interrupted(run.folder if run else Path(), now.step, total)
    if (settings.early_stopping or now.stopped) and now.kept_loss is not None:
        checkpoints.load_best()
        now.held_out_loss = now.kept_loss
    checkpoints.finish()
    model.eval()
    return Trained(now.step, now.best_loss, now.held_out_loss, now.tokens, now.seconds, _peak_mb(choice), now.stopped)


class _Clock:
    """Adds the time that has passed to the counters."""

    def __init__(self, now: Progress):
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def tick(self, now: Progress, tokens: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        passed = wall - self.wall
        now.seconds += passed
        if tokens:  # an evaluation counts as time of the run, not against the tokens per second of training
            now.window["tokens"] += tokens
            now.window["seconds"] += passed
            now.window["cpu_seconds"] += cpu - self.cpu
        self.wall, self.cpu = wall, cpu


def _log_row(now: Progress, done: step.Done, soft: virtual.Virtual | None, choice: device.Choice) -> dict[str, Any]:
    peak = _peak_mb(choice)
    cpu_seconds = distributed.world().sums(now.window["cpu_seconds"])[0]
    return {
        "step": now.step,
        "loss": now.window_loss / now.window_weight,
        **by_label({name: value / now.window_weight for name, value in now.window_told.items()}),
        **({} if soft is None else {"prompt_norm": soft.norm(), "prompt_moved": soft.moved()}),
        "learning_rate": done.learning_rate,
        "grad_norm": done.norm,
        "tokens": now.tokens,
        "trained_tokens": now.trained_tokens,
        "tokens_per_second": round(now.window["tokens"] / max(now.window["seconds"], 1e-9), 1),
        "tokens_per_cpu_second": round(now.window["tokens"] / max(cpu_seconds, 1e-9), 1),
        "peak_mb": None if peak is None else round(peak, 1),
        "elapsed_seconds": round(now.seconds, 3),
    }


def _peak_mb(choice: device.Choice) -> float | None:
    """Of all processes together."""
    peak = device.peak_mb(choice.device)
    return None if peak is None else distributed.world().sums(peak)[0]


def _not_a_number(run: Run | None, number: int, done: step.Done) -> TuneletError:
    name = checkpoint.latest(run) if run else None
    return TuneletError(
        f"Training stopped at step {number}: the loss is {done.loss}, the gradient's norm {done.norm}.",
        why=f"a learning rate of {done.learning_rate:.1e} is too high for this model and data, "
        "or the weights were damaged before",
        fix=f"Lower train.learning_rate (try a third of it) or raise train.warmup. "
        f"The last checkpoint, {name or 'none yet'}, is untouched.",
    )

"""The training loop: batches in a fixed order, forward and backward, one optimizer step, log, evaluate, checkpoint; and
going on after a stop.

Not for reading data (train/prepare.py), loss formulas (methods/) or files of the run (runs/record.py,
train/checkpoint.py). Everything random is a function of (seed, epoch) or (seed, step), so that a resumed run ends
bit-identical to one that never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tunelet.data import pack
from tunelet.data.examples import Tokens
from tunelet.errors import TuneletError
from tunelet.models import device, head
from tunelet.recipe import Recipe
from tunelet.runs.record import Run
from tunelet.train import checkpoint, distributed, progress, sharding, step


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
    window_loss: float = 0.0
    window_targets: int = 0
    window: dict[str, float] = field(default_factory=lambda: {"tokens": 0, "seconds": 0.0, "cpu_seconds": 0.0})


def total_steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of a training over `rows` rows."""
    per_epoch = math.ceil(rows / (recipe.train.batch_size * recipe.train.gradient_accumulation))
    return recipe.train.max_steps or max(1, math.ceil(recipe.train.epochs * per_epoch))


def step_rows(rows: Sequence[Tokens], recipe: Recipe, first_step: int, total: int) -> Iterator[list[Tokens]]:
    """The rows of each optimizer step from `first_step` on, in the order in which `batch_size` of them make a batch."""
    size = recipe.train.batch_size * recipe.train.gradient_accumulation
    lengths = [len(row.ids) for row in rows]
    per_epoch = math.ceil(len(rows) / size)
    epoch, batches = -1, []
    for number in range(first_step, total):
        if number // per_epoch != epoch:
            epoch = number // per_epoch
            batches = pack.batches(lengths, size, recipe.train.seed, epoch)
        yield [rows[i] for i in batches[number % per_epoch]]


@torch.no_grad()
def held_out(model: Any, rows: Sequence[Tokens], batch_size: int, on: str) -> float:
    """Mean negative log-likelihood of all targets of `rows`, in nats per token. Several processes take turns with the
    batches; each makes as many forwards as the others, as sharded layers need."""
    world = distributed.world()
    was_training = model.training
    model.eval()
    nll, targets = 0.0, 0
    by_length = sorted((row for row in rows if row.trained), key=lambda row: len(row.ids))
    batches = [by_length[at : at + batch_size] for at in range(0, len(by_length), batch_size)]
    for at in range(0, len(batches), world.size):
        mine = at + world.rank
        batch = pack.make_batch(batches[min(mine, len(batches) - 1)]).to(on)
        value = float(head.nll_sum(model, batch))
        if mine < len(batches):
            nll += value
            targets += len(batch.targets)
    model.train(was_training)
    nll, targets = world.sums(nll, targets)
    return nll / targets if targets else float("nan")


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
    shards = sharding.shard_if_wanted(model, settings, choice.device, world, console)
    optimizer = step.optimizer_for(shards or model, settings)
    if shards:
        shards.connect(optimizer)
    stepper = step.Stepper(model, optimizer, recipe, choice.device, sharded=shards is not None)
    checkpoints = checkpoint.Checkpoints(run, optimizer, world, shards)
    now = Progress()
    state = checkpoints.go_on()
    if state is not None:
        now = Progress(**{key: state[key] for key in asdict(now)})
        console.print(f"Going on from step {now.step} of {total}.")
    if run:
        run.truncate_log(now.step if state else -1)

    def evaluate() -> bool:
        """Log the held-out loss; False when early stopping says enough."""
        optimizer.settle()
        now.held_out_loss = held_out(model, eval_rows, settings.batch_size, choice.device)
        optimizer.refresh()
        if run:
            run.log({"step": now.step, "held_out_loss": now.held_out_loss})
        bar.evaluated(now.step, now.held_out_loss)
        if now.best_loss is None or now.held_out_loss < now.best_loss:
            now.best_loss, now.best_step, now.evaluations_without_better = now.held_out_loss, now.step, 0
            if settings.early_stopping:
                checkpoints.save_best(now.step)
        else:
            now.evaluations_without_better += 1
        return not settings.early_stopping or now.evaluations_without_better < settings.early_stopping

    model.train()
    enough = settings.early_stopping and now.evaluations_without_better >= settings.early_stopping
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
            now.window_loss, now.window_targets = (
                now.window_loss + done.loss * done.targets,
                now.window_targets + done.targets,
            )
            clock.tick(now, done.tokens)
            bar.advance(now.step, now.window_loss / now.window_targets, now.window)
            if now.step % settings.log_steps == 0 or now.step == total:
                row = _log_row(now, done, choice)
                if run:
                    run.log(row)
                bar.logged(row)
                now.window_loss, now.window_targets, now.window = 0.0, 0, Progress().window
            stopping = world.sums(stop.asked)[0] > 0  # a signal reaches each process at its own time
            go_on = True
            if eval_rows and (now.step == total or (settings.eval_steps and now.step % settings.eval_steps == 0)):
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
    if settings.early_stopping and now.best_loss is not None:
        checkpoints.load_best()
        now.held_out_loss = now.best_loss
    checkpoints.finish()
    model.eval()
    return Trained(now.step, now.best_loss, now.held_out_loss, now.tokens, now.seconds, _peak_mb(choice))


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


def _log_row(now: Progress, done: step.Done, choice: device.Choice) -> dict[str, Any]:
    peak = _peak_mb(choice)
    cpu_seconds = distributed.world().sums(now.window["cpu_seconds"])[0]
    return {
        "step": now.step,
        "loss": now.window_loss / now.window_targets,
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

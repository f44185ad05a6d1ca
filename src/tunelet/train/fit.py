"""What the recipe leaves open ("auto", 0) is settled here before a run starts: the mildest that fits in memory.

Not the prediction (train/plan.py) and not the measuring (train/measure.py). In this order: micro-batches of fewer
tokens (the same result), gradient checkpointing, optimizer state in bfloat16, in float8. batch_size and
gradient_accumulation are never touched, quantization and the kind of adapter only named as advice: they change what is
trained.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunelet import machine
from tunelet.data.examples import Tokens
from tunelet.errors import TuneletError
from tunelet.models import device, load, weights
from tunelet.models.device import Choice
from tunelet.recipe import Recipe
from tunelet.runs.environment import memory_mb
from tunelet.train import calibrate, energy, plan
from tunelet.train.cost import Cost
from tunelet.train.plan import Prediction, Work
from tunelet.train.progress import duration

MARGIN = 0.95  # of what is free: the prediction may err, and other programs may grow
SIZES = (512, 1024, 2048, 4096)  # tokens of a micro-batch to choose from, beside whole batches
SLOWER = 0.03  # so much slower than the fastest size is still as good
MILDEST_FIRST = (("off", "float32"), ("on", "float32"), ("on", "bfloat16"), ("on", "float8"))
STATE_COUNTS = 0.05  # a smaller optimizer state is tried where the state is this share of the memory, at least
SETTLED = ("train.tokens_per_batch", "train.gradient_checkpointing", "train.optimizer_state")


@dataclass(frozen=True)
class Room:
    """Memory for this training, MB: free now (with what this process holds already), and in the whole machine; of the
    disk where the run goes. None: the system does not tell."""

    free_mb: float | None
    total_mb: float | None
    disk_mb: float | None

    def fits(self, peak_mb: float) -> bool:
        return self.free_mb is None or peak_mb <= MARGIN * self.free_mb


@dataclass(frozen=True)
class Plan:
    """recipe: with nothing left open; origins: the reason of each key in it that was; advice: a change (as arguments of
    the command line) that makes it fit, where it does not."""

    recipe: Recipe
    origins: dict[str, str]
    prediction: Prediction
    cost: Cost
    work: Work
    room: Room
    advice: str = ""
    measured_seconds: float = 0.0
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def settled(self) -> tuple[str, ...]:
        """Keys that may be left open."""
        return SETTLED

    @property
    def impossible(self) -> bool:
        """Not even the whole machine has so much memory."""
        return self.room.total_mb is not None and self.prediction.peak_mb > self.room.total_mb

    @property
    def fits(self) -> bool:
        return self.room.fits(self.prediction.peak_mb)

    @property
    def fits_disk(self) -> bool:
        return self.room.disk_mb is None or self.prediction.disk_mb <= self.room.disk_mb


def make(
    recipe: Recipe, choice: Choice, tokenizer: Any, train_rows: Sequence[Tokens], eval_rows: Sequence[Tokens], out: Path
) -> Plan:
    """The recipe settled for this machine as it is now, with its prediction. Raises TuneletError where a value that is
    asked for cannot be."""
    started = time.perf_counter()
    config = calibrate.config_of(recipe, tokenizer)
    whole = plan.work(_with(recipe, tokens_per_batch=0), train_rows, eval_rows)
    room, base = _room(choice.device, out), device.held_mb(choice.device)
    stored = _stored(recipe, choice)
    speed = disk_mb_per_second(out)
    best: Plan | None = None

    def tried(asked: Recipe) -> Iterator[Plan]:
        for checkpointing, state in _modes(asked):
            mode = _with(asked, tokens_per_batch=0, gradient_checkpointing=checkpointing, optimizer_state=state)
            cost = calibrate.cost_of(mode, choice, config, whole.train, whole.steps)
            if state != "float32" and asked.train.optimizer_state == "auto" and not _state_counts(best):
                return
            rates, plans = _sizes(asked, cost, whole), {}
            for tokens in rates:
                made = _with(mode, tokens_per_batch=tokens)
                todo = plan.work(made, train_rows, eval_rows)
                told = plan.predict(
                    made, cost, todo, choice, base_mb=base, disk_mb_per_second=speed, stored_bytes=stored
                )
                plans[tokens] = Plan(made, {}, told, cost, todo, room)
            for tokens, why in _mildest_first(plans, rates):
                yield replace(plans[tokens], origins=_origins(asked, plans[tokens].recipe, why))

    for found in tried(recipe):
        if best is None or found.prediction.peak_mb < best.prediction.peak_mb:
            best = found
        if found.fits:
            break
    assert best is not None
    advice = "" if best.fits else _advice(recipe, best, tried)
    return replace(best, advice=advice, measured_seconds=time.perf_counter() - started, notes=_notes(best))


def _with(recipe: Recipe, **values: Any) -> Recipe:
    made = recipe.model_copy(deep=True)
    for key, value in values.items():
        setattr(made.train, key, value)
    return made


def _modes(recipe: Recipe) -> list[tuple[str, str]]:
    """(gradient_checkpointing, optimizer_state) that the recipe leaves open, mildest first."""
    asked = recipe.train.gradient_checkpointing, recipe.train.optimizer_state
    return list(
        dict.fromkeys(
            tuple(mine if given == "auto" else given for given, mine in zip(asked, mode, strict=True))
            for mode in MILDEST_FIRST
        )
    )


def _state_counts(best: Plan | None) -> bool:
    return best is None or best.cost.bytes_state / 1e6 >= STATE_COUNTS * best.prediction.peak_mb


def _sizes(recipe: Recipe, cost: Cost, whole: Work) -> dict[int, float]:
    """tokens_per_batch to choose from -> tokens a second; the largest leaves the batches whole."""
    if recipe.train.tokens_per_batch:
        return {recipe.train.tokens_per_batch: 1.0}
    tokens = whole.train.tokens
    mean, share = float(tokens.mean()), float(whole.train.targets.sum() / tokens.sum())
    per_token = float((whole.train.cost(cost.seconds_layers) - cost.seconds_layers.const).sum() / tokens.sum())
    per_token += cost.seconds_rest[1] * share
    const = cost.seconds_layers.const + cost.seconds_rest[0]

    def rate(size: float, several: bool) -> float:
        return size / (const + (cost.seconds_sum if several else 0.0) + per_token * size)

    return {size: rate(size, True) for size in SIZES if size < mean} | {int(tokens.max()): rate(mean, whole.several)}


def _mildest_first(plans: Mapping[int, Plan], rates: Mapping[int, float]) -> list[tuple[int, str]]:
    """(tokens_per_batch, why): of the fast ones the one that takes least memory, then the others, the fastest first."""
    best = max(rates.values())
    quick = [size for size, rate in rates.items() if rate >= (1 - SLOWER) * best]
    first = min(quick, key=lambda size: (plans[size].prediction.peak_mb, size))
    why = f"of those within {SLOWER:.0%} of the fastest, least memory" if len(rates) > 1 else ""
    whole = "whole batches" + (f": {why}" if why else "")
    others = sorted(rates.keys() - {first}, key=lambda size: -rates[size])
    return [(first, whole if first == max(rates) else why), *((size, "slower, to fit in memory") for size in others)]


def _origins(asked: Recipe, made: Recipe, why_tokens: str) -> dict[str, str]:
    out = {}
    if not asked.train.tokens_per_batch:
        out["train.tokens_per_batch"] = f"default: {why_tokens}"
    for key, mild in (("gradient_checkpointing", "off"), ("optimizer_state", "float32")):
        if getattr(asked.train, key) == "auto":
            needed = getattr(made.train, key) != mild
            out[f"train.{key}"] = "default: needed to fit in memory" if needed else "default: it fits in memory"
    return out


def _advice(recipe: Recipe, best: Plan, tried: Any) -> str:
    """The smallest change that makes it fit, as arguments; "" where there is none among those known."""
    free = _with(recipe, tokens_per_batch=0, gradient_checkpointing="auto", optimizer_state="auto")
    wider: list[tuple[str, Recipe]] = [("", free)]
    if recipe.adapter.kind == "none" and recipe.model.path:
        lora = free.model_copy(deep=True)
        lora.adapter.kind = "lora"
        wider.append(("--adapter lora", lora))
    base = wider[-1][1]
    if base.adapter.kind != "none":
        for kind in ("int8", "int4"):
            if recipe.model.quantization == "none" or (recipe.model.quantization, kind) == ("int8", "int4"):
                small = base.model_copy(deep=True)
                small.model.quantization = kind
                extra = "--adapter lora " if recipe.adapter.kind == "none" else ""
                wider.append((f"{extra}--set model.quantization={kind}", small))
    for words, asked in wider:
        for found in tried(asked):
            if found.fits:
                changed = [
                    f"--set {key}={getattr(found.recipe.train, key.partition('.')[2])}"
                    for key in SETTLED
                    if _asked_for(recipe, key) and _value(recipe, key) != _value(found.recipe, key)
                ]
                return " ".join([*([words] if words else []), *changed])
    return ""


def _value(recipe: Recipe, key: str) -> Any:
    return getattr(recipe.train, key.partition(".")[2])


def _asked_for(recipe: Recipe, key: str) -> bool:
    return _value(recipe, key) not in ("auto", 0)


def _notes(best: Plan) -> tuple[str, ...]:
    notes = []
    if best.cost.busy > calibrate.BUSY:
        notes.append("other programs are at work here: the times may be off, and are measured again next time")
    if best.recipe.train.compile:
        notes.append("train.compile is on: the times are without it, and its minute or two at the start come on top")
    return tuple(notes)


# -- the machine ------------------------------------------------------------------------------------------------------


def _room(on: str, out: Path) -> Room:
    if on == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        return Room(free / 1e6 + device.held_mb(on), total / 1e6, _disk_free_mb(out))
    available = machine.available_memory_mb()
    held = device.held_mb()
    return Room(None if available is None else available + held, memory_mb(), _disk_free_mb(out))


def _place(out: Path) -> Path:
    """The nearest folder that exists."""
    return next(folder for folder in [out.absolute(), *out.absolute().parents] if folder.is_dir())


def _disk_free_mb(out: Path) -> float:
    return shutil.disk_usage(_place(out)).free / 1e6


def disk_mb_per_second(out: Path, size_mb: int = 32) -> float:
    """Measured by writing and syncing one small file; 200 where the folder cannot be written (that is told later)."""
    import tempfile

    block = os.urandom(2**20)
    try:
        with tempfile.TemporaryFile(dir=_place(out)) as file:
            started = time.perf_counter()
            for _ in range(size_mb):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            return size_mb * 2**20 / 1e6 / max(time.perf_counter() - started, 1e-6)
    except OSError:
        return 200.0


def _stored(recipe: Recipe, choice: Choice) -> int | None:
    """Bytes of a saved weight; None for an adapter, whose weights are saved as the optimizer has them."""
    if recipe.adapter.kind != "none":
        return None
    name = weights.stored_dtype(load.resolve(recipe.model.path)) if recipe.model.path else choice.dtype
    return {"float32": 4}.get(name, 2)


# -- telling ----------------------------------------------------------------------------------------------------------


def settled_as(recipe: Recipe, began: Recipe) -> Recipe:
    """`recipe` with what `began` has settled."""
    return _with(recipe, **{key.partition(".")[2]: _value(began, key) for key in SETTLED})


def lines(made: Plan) -> list[str]:
    """The prediction and what was settled, for people, in a few lines."""
    told, settings = made.prediction, made.recipe.train
    out = [
        f"Predicted: {duration(told.seconds)} of training, at most {told.peak_mb:,.0f} MB of memory, "
        f"{told.disk_mb:,.0f} MB of disk, {energy.label({'energy_wh': told.energy_wh, 'kind': 'estimated'})}"
    ]
    if made.origins:
        words = {
            "train.tokens_per_batch": f"{settings.tokens_per_batch:,} tokens per batch",
            "train.gradient_checkpointing": f"gradient checkpointing {settings.gradient_checkpointing}",
            "train.optimizer_state": f"optimizer state {settings.optimizer_state}",
        }
        reasons: dict[str, list[str]] = {}
        for key, why in made.origins.items():
            reasons.setdefault(why.removeprefix("default: "), []).append(words[key])
        out.append("Chosen: " + "; ".join(f"{', '.join(what)} ({why})" for why, what in reasons.items()))
    if not made.fits:
        out.append(
            f"Warning: {made.room.free_mb or 0:,.0f} MB of memory are free. "
            + (f"It would fit with: {made.advice}" if made.advice else "Close other programs, or it may be stopped.")
        )
    if not made.fits_disk:
        out.append(f"Warning: only {made.room.disk_mb or 0:,.0f} MB of disk are free there.")
    return [*out, *(f"Note: {note}" for note in made.notes)]


def too_large(made: Plan) -> TuneletError:
    """What is said where even the smallest does not fit in the whole machine."""
    return TuneletError(
        f"This training would hold {made.prediction.peak_mb:,.0f} MB of memory (predicted).",
        why=f"the machine has {made.room.total_mb or 0:,.0f} MB",
        fix=f"Add to the command: {made.advice}" if made.advice else "Take a smaller model or data.max_length.",
    )

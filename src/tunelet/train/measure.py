"""Measures in seconds what a training costs, on its architecture cut down to a few layers with made-up weights, through
the code that trains.

Not the prediction (train/plan.py) and not a benchmark. The cut model gets the recipe's adapter, quantization,
checkpointing and optimizer state, but is never compiled: that would take a minute. Two depths are measured: their
difference is what a layer costs, the rest is embedding and head. Bytes are counted, not sampled: every allocation
passes torch's allocator, which a profiler reads out (on a GPU the allocator's own peak).
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tunelet.data.examples import Origin, Tokens
from tunelet.machine import Crowding
from tunelet.methods import Totals
from tunelet.models import adapters, cut, head, ready
from tunelet.models.device import Choice
from tunelet.recipe import PREFERENCE, Recipe
from tunelet.train import energy, step
from tunelet.train.cost import Cost, Curve, Probe, filled

REPEATS = 2  # timed runs of each probe; the faster one counts, because other programs only ever add time


@dataclass
class _Reading:
    """Of one probe at one depth. Seconds of each repetition: (clock, CPU). Bytes are above what lies still (weights,
    state)."""

    saved: int
    top: int
    bottom: int
    head: int
    evaluation_body: int
    evaluation_head: int
    train: list[tuple[float, float]] = field(default_factory=list)
    evaluation: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class _Depth:
    """The cut model with `layers` layers and what was read of it."""

    layers: int
    stepper: step.Stepper
    readings: list[_Reading] = field(default_factory=list)
    update: list[tuple[float, float]] = field(default_factory=list)
    summing: list[tuple[float, float]] = field(default_factory=list)
    bytes_update: int = 0

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.stepper.model.parameters() if p.requires_grad]

    def held(self) -> dict[str, int]:
        """Sizes that grow with the number of layers and nothing else."""
        optimizer, model = self.stepper.optimizer, self.stepper.model
        still, state = [*model.parameters(), *model.buffers()], optimizer.state().values()
        trained = sum(p.numel() for p in self.parameters)
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "trained": trained,
            "bytes_weights": _bytes(still),
            "bytes_state": _bytes([*still, *state]) - _bytes(still),
            "bytes_gradients": sum(p.numel() * p.element_size() for p in self.parameters),
            "bytes_sums": trained * (4 if optimizer.state_dtype == "float32" else 2),
            "bytes_checkpoint": sum(t.numel() * t.element_size() for t in state),
        }


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the memory behind them, shared memory once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(recipe: Recipe, choice: Choice, config: Any, probes: Sequence[Probe], depths: tuple[int, int]) -> Cost:
    """Measure the probes on the recipe's architecture at two depths and carry the result to its full depth.

    config: the model's transformers config; recipe: without "auto". The first two probes have rows of one length and
    differ in their number (so the cost of a micro-batch beside its tokens is known); further ones have rows of other
    lengths.
    """
    began = time.perf_counter()
    text = config.get_text_config()
    batches = [_rows(probe, text.vocab_size, recipe.method.name) for probe in probes]
    made = [_Depth(layers, _stepper(recipe, choice, config, layers)) for layers in depths]
    for one in made:
        one.readings = [_count(one.stepper, batch, choice.device) for batch in batches]
    with energy.Meter(choice.device) as meter, Crowding(choice.threads) as crowd:
        for repeat in range(REPEATS):  # in turns, so that other work on the machine falls on all of them
            for number, batch in enumerate(batches):
                for one in made:
                    _time(one.stepper, one.readings[number].train, batch, choice.device)
                    if not repeat:
                        _time_evaluation(one.stepper, one.readings[number].evaluation, batch, choice.device)
    used = meter.reading()
    for one in made:
        _update(one, recipe.train.max_grad_norm, choice.device)
    chunk, most = 2**31, 0
    if head.is_plain(made[0].stepper.model):
        chunk, largest = head.CHUNK_ELEMENTS // text.vocab_size, max(batches, key=lambda rows: Totals.of(rows).targets)
        most = _many_chunks(made[0].stepper, largest, chunk, text.vocab_size, choice.device)
    figures = _carried(made[0], made[1], probes, text.num_hidden_layers, chunk, choice)
    for one in made:
        one.stepper.optimizer.finish()  # its hooks and the parameters hold each other
    return Cost(
        **figures,
        head_chunk=chunk,
        head_most=most,
        busy=crowd.wanted if choice.device == "cpu" else 1.0,
        watts=used["energy_wh"] * 3600 / used["seconds"] if used["kind"] == "measured" else None,
        seconds=time.perf_counter() - began,
    )


def _rows(probe: Probe, vocabulary: int, method: str) -> list[Tokens]:
    """Rows of the probe's lengths; where answers are compared, half of a row's targets belongs to each of two."""
    draw = np.random.default_rng(0)
    fewest = 2 if method in PREFERENCE else 1
    rows, left = [], probe.targets
    for length in probe.lengths:
        length = max(length, fewest + 1)
        trained = max(fewest, min(length - 1, round(probe.targets * length / probe.tokens), left))
        left -= trained
        ids, mask = draw.integers(0, vocabulary, length).tolist(), [i >= length - trained for i in range(length)]
        row = Tokens(tuple(ids), tuple(mask), ((0, length, "text"),), Origin("plan", 1))
        if method in PREFERENCE:
            row = replace(row, branches=(length - trained, length - trained // 2), reference=(0.0, 0.0))
        rows.append(row)
    return rows


def _stepper(recipe: Recipe, choice: Choice, config: Any, layers: int) -> step.Stepper:
    model = cut.build(config, layers, choice.device, choice.dtype, recipe.model.trust_remote_code)
    if recipe.model.quantization != "none":
        cut.quantize(model, recipe.model.quantization)
    if recipe.adapter.kind != "none":
        model = adapters.add(model, recipe.adapter, recipe.train.seed)
    model = ready.make_ready(model, checkpointing=recipe.train.gradient_checkpointing == "on")
    model.train()
    return step.Stepper(model, step.optimizer_for(model, recipe.train), recipe, choice.device)


def _count(stepper: step.Stepper, rows: list[Tokens], device: str) -> _Reading:
    """Run once, which also warms up, and count bytes."""
    model = stepper.model
    head.is_plain(model)  # looks at the model once, and remembers
    batch, totals = stepper.batch(rows).to(stepper.device), Totals.of(rows)
    with _Allocations(device) as made:
        loss = stepper.loss_of(batch, totals)[0]
        made.mark()
        loss.backward()
        del loss
    _clear(model)
    model.eval()
    with torch.no_grad():
        with _Allocations(device) as body:
            head.hidden_states(model, batch)
            body.mark()
        with _Allocations(device) as evaluated:
            stepper.loss_of(batch, totals)
            evaluated.mark()
    model.train()
    half = (len(made.after) + 1) // 2
    return _Reading(
        saved=made.at_mark,
        top=max(made.after[:half]) - made.at_mark,
        bottom=max(made.after[half:] or made.after) - made.after[-1],
        head=max(made.before) - made.at_mark,
        evaluation_body=max(body.before),
        evaluation_head=max(evaluated.before),
    )


def _many_chunks(stepper: step.Stepper, rows: list[Tokens], chunk: int, vocabulary: int, device: str) -> int:
    """Bytes beside what is saved while the head is at work on one of several chunks of `chunk` targets: carried on from
    two smaller ones, as the probe has too few targets for chunks of that size."""
    batch, kept, peaks = stepper.batch(rows), head.CHUNK_ELEMENTS, []
    sizes = [max(1, len(batch.targets) // part) for part in (4, 2)]
    for size in sizes:
        head.CHUNK_ELEMENTS = size * vocabulary
        try:
            with _Allocations(device) as made:
                loss = stepper.loss_of(batch, Totals.of(rows))[0]
                made.mark()
        finally:
            head.CHUNK_ELEMENTS = kept
        del loss
        peaks.append(max(made.before) - made.at_mark)
    each = (peaks[1] - peaks[0]) / max(1, sizes[1] - sizes[0])
    return round(peaks[1] + each * (chunk - sizes[1]))


class _Allocations:
    """`with _Allocations(device) as made: ...; made.mark(); ...`: bytes held above the beginning, after each allocation
    and release, in `before` and `after` the mark; on a GPU the peak and the end of each only."""

    MARK = "tunelet.mark"

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.before, self.after, self.at_mark = [0], [0], 0

    def __enter__(self) -> _Allocations:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:  # of torch's profilers the one that reports memory without a second of set-up and lines on the terminal
            kind, none = torch.autograd.ProfilerState.CPU, torch._C._profiler._ExperimentalConfig()
            torch.autograd._enable_profiler_legacy(
                torch.autograd.ProfilerConfig(kind, False, True, False, False, False, none)
            )
        return self

    def mark(self) -> None:
        if self.cuda:
            self.before = self._read()
            torch.cuda.reset_peak_memory_stats()
        else:
            with torch.autograd.profiler.record_function(self.MARK):
                pass

    def _read(self) -> list[int]:
        return [torch.cuda.max_memory_allocated() - self.start, torch.cuda.memory_allocated() - self.start]

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.after, self.at_mark = self._read(), self.before[-1]
            return
        held, curve = 0, self.before
        for record in itertools.chain.from_iterable(torch.autograd._disable_profiler_legacy()):
            if record.kind() == "memory_alloc":
                held += record.cpu_memory_usage()
                curve.append(held)
            elif record.name() == self.MARK and record.kind() == "push":
                self.at_mark, curve = held, self.after
                curve[0] = held


def _time(stepper: step.Stepper, into: list[tuple[float, float]], rows: list[Tokens], device: str) -> None:
    with _timed(into, device):
        totals = stepper.with_kl(Totals.of(rows), [[rows]])
        stepper.loss_of(stepper.batch(rows), totals)[0].backward()
    _clear(stepper.model)


def _time_evaluation(stepper: step.Stepper, into: list[tuple[float, float]], rows: list[Tokens], device: str) -> None:
    stepper.model.eval()
    with _timed(into, device), torch.no_grad():
        stepper.loss_of(stepper.batch(rows), Totals.of(rows))
    stepper.model.train()


def _clear(model: Any) -> None:
    for p in model.parameters():
        p.grad = None


@contextlib.contextmanager
def _timed(into: list[tuple[float, float]], device: str) -> Iterator[None]:
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    if device == "cuda":
        torch.cuda.synchronize()
    into.append((time.perf_counter() - wall, time.process_time() - cpu))


def _update(one: _Depth, max_grad_norm: float, device: str) -> None:
    """The optimizer's step, and adding up gradients of several micro-batches."""
    optimizer = one.stepper.optimizer
    for number in range(1 + REPEATS):
        for p in one.parameters:
            p.grad = p.detach().clone()
        optimizer.accumulate(0)
        with _timed(one.summing, device):
            for p in one.parameters:
                optimizer.take(p)
        optimizer.accumulating = False
        for bucket in optimizer.buckets:
            bucket.accumulated = None
        for p in one.parameters:
            p.grad = p.detach().clone()
        if number:
            with _timed(one.update, device):
                optimizer.step(0.0, max_grad_norm)
        else:
            kept = [p.grad for p in one.parameters]  # the profiler complains about what it did not see coming
            with _Allocations(device) as made:
                made.mark()
                optimizer.step(0.0, max_grad_norm)
            del kept
            one.bytes_update = max(made.after)


# -- from two depths to the whole -------------------------------------------------------------------------------------


def _carried(
    short: _Depth, deep: _Depth, probes: Sequence[Probe], layers: int, chunk: int, choice: Choice
) -> dict[str, Any]:
    def to_full(a: float, b: float) -> float:
        return a + (layers - short.layers) * (b - a) / (deep.layers - short.layers)

    def seconds(of: Callable[[_Reading], list[tuple[float, float]]]) -> tuple[list[float], list[float]]:
        """(of all layers, of the rest), probe by probe."""
        pairs = [
            (_typical(of(a), choice), _typical(of(b), choice))
            for a, b in zip(short.readings, deep.readings, strict=True)
        ]
        one_layer = [max(0.0, b - a) / (deep.layers - short.layers) for a, b in pairs]
        rest = [max(0.0, a - short.layers * each) for (a, _), each in zip(pairs, one_layer, strict=True)]
        return [layers * each for each in one_layer], rest

    of_layers, rest = seconds(lambda reading: reading.train)
    evaluation_layers, evaluation_rest = seconds(lambda reading: reading.evaluation)
    held = {key: round(to_full(value, deep.held()[key])) for key, value in short.held().items()}
    more = held["trained"] / sum(p.numel() for p in deep.parameters)
    targets = [probe.targets for probe in probes]
    chunked = [min(chunk, number) for number in targets]
    every = [pair for reading in deep.readings for pair in reading.train]
    return {
        **held,
        "seconds_layers": _curve(probes, of_layers),
        "seconds_rest": _line(targets, rest),
        "seconds_update": _typical(deep.update, choice) * more,
        "seconds_sum": _typical(deep.summing, choice) * more,
        "evaluation_layers": _curve(probes, evaluation_layers),
        "evaluation_rest": _line(targets, evaluation_rest),
        "cpu_per_second": max(cpu / wall for wall, cpu in every),
        "bytes_update": deep.bytes_update,
        "saved": _curve(
            probes, [to_full(a.saved, b.saved) for a, b in zip(short.readings, deep.readings, strict=True)]
        ),
        "at_top": _curve(probes, [reading.top for reading in deep.readings]),
        "at_bottom": _curve(probes, [reading.bottom for reading in deep.readings]),
        "at_head": _line(chunked, [reading.head for reading in deep.readings]),
        "evaluation_body": _curve(probes, [reading.evaluation_body for reading in deep.readings]),
        "evaluation_head": _line(chunked, [reading.evaluation_head for reading in deep.readings]),
    }


def _typical(pairs: Sequence[tuple[float, float]], choice: Choice) -> float:
    """The fastest. One thread's CPU time is what the clock would say on an idle machine."""
    of = 1 if choice.device == "cpu" and choice.threads == 1 else 0
    return min(pair[of] for pair in pairs)


def _line(at: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(const, slope) through the values, neither negative."""
    if len(set(at)) == 1:
        return 0.0, values[0] / max(1, at[0])
    slope, const = np.polyfit(at, values, 1)
    if const < 0:
        return 0.0, float(np.dot(at, values) / np.dot(at, at))
    return (float(const), float(slope)) if slope > 0 else (float(np.mean(values)), 0.0)


def _curve(probes: Sequence[Probe], values: Sequence[float]) -> Curve:
    """From the first two probes what a micro-batch costs without tokens; from all but the first what a token costs."""
    tokens = [float(filled(probe.tokens)) for probe in probes]
    const = 0.0
    if len(probes) > 1 and tokens[0] != tokens[1]:
        const = (values[0] * tokens[1] - values[1] * tokens[0]) / (tokens[1] - tokens[0])
        const = min(max(const, 0.0), *values[:2])
    points = {
        probe.tokens / len(probe.lengths): max(0.0, value - const) / number
        for probe, value, number in list(zip(probes, values, tokens, strict=True))[-(len(probes) - 1) or None :]
    }
    at = sorted(points)
    return Curve(const, tuple(at), tuple(points[length] for length in at))

"""`python -m benchmarks train`: tunelet and the peer take turns on the same rows; rates, ratios of each pair and their
medians, peaks of memory, and the fraction of the matrix-product peak that each step reaches.

Not a test: nothing here passes or fails on a time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import ours, peer, process, rows, shapes
from benchmarks.measure import machine, versions
from benchmarks.process import show
from tunelet.errors import TuneletError

OURS = "tunelet"
UNSHARED = "tunelet-unshared"  # prompts read once for each answer, to see what reading them once is worth
PEERS = {"trl": ("trl-default", "trl-best")}
METHODS = ("sft", "lora", "dpo")
RANK = 16


def run(options: Namespace) -> int:
    """The verb: measures, writes options.json after every pair, prints the table."""
    names = contestants(options)
    if OURS in names:
        ours.recipe({**work(options), "device": options.device, "threads": options.threads, "model": "starter"})
    scratch = process.scratch(options)
    base = {"device": options.device, "threads": options.threads, "scratch": str(scratch)}
    model = process.checkpoint(base, options.shape)
    pairs: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for number in range(options.pairs):
        at = f"pair {number + 1} of {options.pairs}"
        gemm = process.measure({**base, "task": "gemm"}, f"{at}, bf16 product")
        show(f"{at}, bf16 product of 2048 x 2048: {gemm['gflops_per_cpu_second']:.0f} GFLOP/CPU-s")
        pair: dict[str, Any] = {"gemm": gemm}
        for name in names if number % 2 == 0 else reversed(names):  # who comes first changes: noise hits all alike
            spec = {**base, **work(options), "task": "step", "model": model, "contestant": name, "variant": name}
            pair[name] = process.measure(spec, f"{at}, {name}")
            show(f"{at}, {name}: {line(pair[name], gemm)}")
        check_same_work([pair[name] for name in names])
        pairs.append(pair)
        result = {**setting(options), **summary(pairs, names), "pairs": pairs}
        if options.json:
            write(Path(options.json), result)
    print(table(result))
    return 0


def contestants(options: Namespace) -> list[str]:
    """Who is measured. Raises TuneletError where the method is not there yet or the peer is not installed."""
    if options.peer and importlib.util.find_spec(options.peer) is None:
        raise TuneletError(
            f"{options.peer} is not installed.",
            why="peers are an extra, which nothing in tunelet needs",
            fix="make install-parity, or leave --peer out to measure tunelet alone.",
        )
    ours_ = [OURS, UNSHARED] if options.method == "dpo" else [OURS]
    chosen = [*ours_, *(PEERS[options.peer] if options.peer else ())]
    if options.only:
        unknown = sorted(set(options.only) - set(chosen))
        if unknown:
            raise TuneletError(f"There is no contestant {unknown[0]} here.", fix=f"There are {', '.join(chosen)}.")
        chosen = [name for name in chosen if name in options.only]
    given = work(options)["peer_set"]
    for name in (name for name in chosen if name not in ours_):
        settings = peer.settings(name, options.rows, options.batch_size, given, options.device)
        rows_of_step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        if rows_of_step != options.batch_size:
            raise TuneletError(
                f"--peer-set makes a step of {rows_of_step} rows, and tunelet's has {options.batch_size}.",
                why="per_device_train_batch_size x gradient_accumulation_steps is the step's size",
                fix="Set both, or --batch-size.",
            )
    return chosen


def work(options: Namespace) -> dict[str, Any]:
    """The part of a worker's SPEC that says what is trained."""
    return {
        "method": "sft" if options.method == "lora" else options.method,
        "shape": options.shape,
        "rows": options.rows,
        "warm": options.warm,
        "steps": options.steps,
        "batch_size": options.batch_size,
        "rank": RANK if options.method == "lora" else 0,
        "seed": options.seed,
        "set": [*(["train.compile=true"] if options.compile else []), *options.set],
        "peer_set": dict(setting_of(pair) for pair in options.peer_set),
    }


def setting_of(pair: str) -> tuple[str, Any]:
    """("key", value) of a --peer-set KEY=JSON; raises TuneletError where it is not one."""
    key, equals, value = pair.partition("=")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError as error:
        raise TuneletError(
            f"--peer-set {pair} is not KEY=JSON.",
            why=str(error) if equals else "there is no =",
            fix="For example: --peer-set gradient_checkpointing=false",
        ) from error


def setting(options: Namespace) -> dict[str, Any]:
    """What was measured on what, for the JSON."""
    return {
        "benchmark": "train",
        "method": options.method,
        "peer": options.peer,
        "device": options.device,
        "threads": options.threads,
        "machine": machine(),
        "versions": versions(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "work": {**work(options), "row_kind": rows.KINDS[options.rows], "parameters": shapes.parameters(options.shape)},
        "pairs_asked": options.pairs,
    }


def summary(pairs: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The stable keys, over all pairs: medians of each pair's ratios, of the rates and of the peaks.

    ratio_default, ratio_best: tunelet's tokens per CPU-second over the peer's at its default, at its best.
    gemm_fraction: FLOPs the step needs (shapes.flops) per CPU-second over the bf16 peak measured before the pair.
    peak_ratio: tunelet's peak of memory over that of the peer's default. ratio_shared: of dpo, over tunelet's own rate
    with prompts read once for each answer. None where one of the two was not measured.
    """

    def median(values: list[float]) -> float | None:
        return statistics.median(values) if values else None

    def ratios(key: str, peer: str) -> list[float]:
        return [pair[OURS][key] / pair[peer][key] for pair in pairs if OURS in pair and peer in pair]

    rate, fractions = "tokens_per_cpu_second", {}
    for name in names:
        fractions[name] = [p[name]["gflops_per_cpu_second"] / p["gemm"]["gflops_per_cpu_second"] for p in pairs]
    out: dict[str, Any] = {
        "ratio_default": median(ratios(rate, "trl-default")),
        "ratio_best": median(ratios(rate, "trl-best")),
        "gemm_fraction": median(fractions.get(OURS, [])),
        "peak_ratio": median(ratios("peak_mb", "trl-default")),
        "peak_ratio_best": median(ratios("peak_mb", "trl-best")),
        "ratio_shared": median(ratios(rate, UNSHARED)),
        "pairs_done": len(pairs),
        "ratios": {"default": ratios(rate, "trl-default"), "best": ratios(rate, "trl-best")},
        "gemm_gflops_per_cpu_second": median([p["gemm"]["gflops_per_cpu_second"] for p in pairs]),
        "contestants": {},
    }
    for name in names:
        keys = (rate, "tokens_per_second", "cpu_seconds_per_step", "gflops_per_cpu_second", "peak_mb")
        got = {key: median([pair[name][key] for pair in pairs]) for key in keys}
        work_, flops = [pair[name]["flops"] for pair in pairs], median(fractions[name])
        without = [1 - part["attention"] / part["total"] for part in work_]
        out["contestants"][name] = {
            **got,
            "gemm_fraction": flops,
            "gemm_fraction_without_attention": flops * median(without),
            "facts": pairs[-1][name]["facts"],
        }
    return out


def check_same_work(results: Sequence[dict[str, Any]]) -> None:
    """Raises AssertionError where two contestants trained on different rows, or lost differently on them (more than 2 %
    of the mean over their first steps): the benchmark itself is wrong then."""
    digests = {result["timed"]["digest"] for result in results}
    losses = [result["facts"]["loss"] for result in results]
    if len(digests) > 1:
        raise AssertionError(f"contestants were timed on different rows: {digests}")
    if max(losses) - min(losses) > 0.02 * abs(max(losses)):
        raise AssertionError(f"contestants lost differently on the same rows: {losses}")


def line(result: dict[str, Any], gemm: dict[str, float]) -> str:
    fraction = result["gflops_per_cpu_second"] / gemm["gflops_per_cpu_second"]
    return (
        f"{result['tokens_per_cpu_second']:.0f} tokens/CPU-s, {fraction:.0%} of the bf16 peak, "
        f"{result['peak_mb']:.0f} MB, loss {result['facts']['loss']:.4f}"
    )


def table(result: dict[str, Any]) -> str:
    """What is printed at the end."""
    unit = "s" if result["device"] == "cuda" else "CPU-s"
    lines = [f"{'':<14}{'tokens/' + unit:>15}{'% of bf16 peak':>17}{'peak MB':>10}"]
    for name, got in result["contestants"].items():
        share = f"{100 * got['gemm_fraction']:.0f}"
        lines.append(f"{name:<14}{got['tokens_per_cpu_second']:>15.0f}{share:>17}{got['peak_mb']:>10.0f}")
    for key, what in (
        ("ratio_default", "x the peer's default"),
        ("ratio_best", "x the peer's best"),
        ("peak_ratio", "x the memory of its default"),
    ):
        if result[key] is not None:
            lines.append(f"{result[key]:.2f} {what} (median of {result['pairs_done']} pairs)")
    return "\n".join(lines)


def write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_name(f".{path.name}.{os.getpid()}")
    making.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    making.replace(path)

"""`python -m benchmarks ladder`: how rate and peak of memory of tunelet's step grow with the model's size, the way it
is trained, the lengths of rows and the rows of a step. One process for each rung; results are added to a JSON file.

Not beside a peer: that is train.py.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import ours, process, rows, train
from benchmarks.measure import machine, versions
from benchmarks.process import show
from tunelet.errors import TuneletError

# Ways to train: rank of the adapter (0: every weight), and recipe keys. Those of --set come after them.
MODES: dict[str, tuple[int, tuple[str, ...]]] = {
    "full": (0, ("train.optimizer_state=float32",)),
    "full-checkpointed": (0, ("train.optimizer_state=float32", "train.gradient_checkpointing=on")),
    "full-small": (
        0,
        ("train.optimizer_state=bfloat16", "train.gradient_checkpointing=on", "train.tokens_per_batch=1024"),
    ),
    "full-smallest": (
        0,
        ("train.optimizer_state=float8", "train.gradient_checkpointing=on", "train.tokens_per_batch=512"),
    ),
    "lora": (train.RANK, ()),
    "lora-checkpointed": (train.RANK, ("train.gradient_checkpointing=on",)),
    "lora-int8": (train.RANK, ("model.quantization=int8",)),
    "lora-int8-small": (
        train.RANK,
        ("model.quantization=int8", "train.gradient_checkpointing=on", "train.tokens_per_batch=512"),
    ),
    "lora-int4": (train.RANK, ("model.quantization=int4",)),
}
# What makes two rungs the same rung: measured again, the newer takes the older's place.
KEY = ("shape", "mode", "rows", "batch_size", "set", "device", "threads")


def run(options: Namespace) -> int:
    """The verb: measures every combination asked for, adds each to options.json as it is done, prints the table."""
    path = Path(options.json) if options.json else None
    for kind in options.rows:
        known(kind)
    scratch = process.scratch(options)
    base = {"device": options.device, "threads": options.threads, "scratch": str(scratch)}
    found = read(path)
    specs = list(rungs(options))
    for spec in specs:
        ours.recipe({**spec, "device": options.device, "threads": options.threads, "model": "starter"})
    failed = 0
    for number, spec in enumerate(specs, 1):
        at = f"rung {number} of {len(specs)}, {spec['shape']} {spec['mode']} {spec['rows']} x{spec['batch_size']}"
        try:
            model = process.checkpoint(base, spec["shape"])
            gemm = process.measure({**base, "task": "gemm"}, at)
            got = process.measure({**base, **spec, "task": "step", "model": model}, at)
        except TuneletError as error:
            if len(specs) == 1:
                raise
            show(str(error))
            failed += 1
            continue
        show(f"{at}: {train.line(got, gemm)}")
        rung = {key: {**base, **spec}[key] for key in KEY}
        rung |= {"steps": spec["steps"], "gemm": gemm, **got}
        rung["gemm_fraction"] = got["gflops_per_cpu_second"] / gemm["gflops_per_cpu_second"]
        rung["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        rung |= {"machine": machine(), "versions": versions()}
        found = merged(found, rung)
        if path:
            train.write(path, {"benchmark": "ladder", "rungs": found})
    print(table(found))
    return 1 if failed else 0


def rungs(options: Namespace) -> Iterator[dict[str, Any]]:
    """The part of a worker's SPEC for every combination asked for, small models first."""
    for shape, mode, kind, batch_size in product(options.shape, options.mode, options.rows, options.batch_size):
        rank, sets = MODES[mode]
        yield {
            "contestant": train.OURS,
            "variant": mode,
            "mode": mode,
            "method": "sft",
            "shape": shape,
            "rows": kind,
            "warm": options.warm,
            "steps": options.steps,
            "batch_size": batch_size,
            "rank": rank,
            "seed": options.seed,
            "set": [*sets, *options.set],
            "peer_set": {},
        }


def known(kind: str) -> None:
    """Raises TuneletError where rows of this kind cannot be made."""
    if kind not in rows.KINDS and not (kind.isdigit() and 8 <= int(kind) <= 8192):
        raise TuneletError(
            f"There are no rows '{kind}'.",
            fix=f"Give {', '.join(rows.KINDS)}, or a number of tokens from 8 to 8192 that every row has.",
        )


def read(path: Path | None) -> list[dict[str, Any]]:
    """The rungs of a results file, none where it is not there yet. Raises TuneletError where it is something else."""
    if path is None or not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["benchmark"] == "ladder":
            return content["rungs"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        pass
    raise TuneletError(f"{path} holds no ladder.", why="results are added to it", fix="Name another file.")


def merged(found: list[dict[str, Any]], rung: dict[str, Any]) -> list[dict[str, Any]]:
    """`found` with `rung` in place of the one with the same KEY, or at the end."""
    same = [[old[key] for key in KEY] == [rung[key] for key in KEY] for old in found]
    if any(same):
        return [rung if match else old for old, match in zip(found, same, strict=True)]
    return [*found, rung]


def table(found: list[dict[str, Any]]) -> str:
    """What is printed at the end."""
    lines = [f"{'shape':<7}{'mode':<19}{'rows':<7}{'a step':>7}{'tokens/CPU-s':>14}{'% of peak':>11}{'peak MB':>9}"]
    for rung in found:
        share = f"{100 * rung['gemm_fraction']:.0f}"
        lines.append(
            f"{rung['shape']:<7}{rung['mode']:<19}{rung['rows']:<7}{rung['batch_size']:>7}"
            f"{rung['tokens_per_cpu_second']:>14.1f}{share:>11}{rung['peak_mb']:>9.0f}"
        )
    return "\n".join(lines)

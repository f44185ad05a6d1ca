"""`python -m benchmarks.worker SPEC`: one contestant, one measurement, in a process of its own, so that the peak of
memory is its own too.

Prints one line of JSON to standard output; exit code 2 and {"error"} for a user's mistake. What libraries print goes to
SPEC's "log"; standard error gets progress only.

Nothing here imports tunelet: that sets OpenMP and oneDNN up for training, and a peer must run as it does without.

SPEC, JSON: {"task": "gemm" | "checkpoint" | "step" | "eval", "device", "threads", "scratch", "log", ...}; for "eval"
see eval_work.py, for "step" also {"contestant", "method", "variant", "shape", "model" (folder), "rows" (kind), "warm",
"steps", "batch_size", "rank" (0: all weights), "seed", "set" (recipe keys for ours), "peer_set" (settings for the
peer)}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import eval_work, measure, rows, shapes


def contestants() -> dict[str, dict[str, Callable[..., Any]]]:
    """method -> contestant -> function(spec, warm, timed, tell) -> (Reading, facts)."""
    from benchmarks import ours, peer

    return {
        "sft": {"tunelet": ours.sft, "trl-default": peer.sft, "trl-best": peer.sft},
        "dpo": {
            "tunelet": ours.dpo,
            "tunelet-unshared": ours.dpo,
            "trl-default": peer.dpo,
            "trl-best": peer.dpo,
        },
    }


def step(spec: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """The figures of one contestant; see `figures` for the keys."""
    vocabulary = shapes.SHAPES[spec["shape"]]["vocab_size"]
    first, count = spec["warm"] * spec["batch_size"], (spec["warm"] + spec["steps"]) * spec["batch_size"]
    every = rows.make(spec["rows"], count, spec["seed"], vocabulary, preferences=spec["method"] == "dpo")
    warm, timed = every[:first], every[first:]
    reading, facts = contestants()[spec["method"]][spec["contestant"]](spec, warm, timed, tell)
    return figures(spec, timed, reading, facts)


def figures(
    spec: dict[str, Any], timed: list[rows.Row], reading: measure.Reading, facts: dict[str, Any]
) -> dict[str, Any]:
    """Rates from a reading. On a GPU "cpu_seconds" in the rates is the clock's time: its work is not the CPU's."""
    counted = rows.count(timed)
    seconds = reading.wall if spec["device"] == "cuda" else reading.cpu
    lengths = [length for row in timed for length in row.lengths]
    twice = sum(row.prompt for row in timed if row.rejected)  # prompts that no one needs to read a second time
    work = shapes.flops(
        spec["shape"], lengths, counted["targets"], spec["rank"], twice, reference=spec.get("method") == "dpo"
    )
    return {
        "contestant": spec["contestant"],
        "tokens_per_cpu_second": counted["tokens"] / seconds,
        "tokens_per_second": counted["tokens"] / reading.wall,
        "cpu_seconds_per_step": seconds / spec["steps"],
        "gflops_per_cpu_second": work["total"] / 1e9 / seconds,
        "peak_mb": measure.peak_mb(spec["device"]),
        "reading": asdict(reading),
        "flops": work,
        "timed": counted,
        "facts": facts,
    }


def main(path: str) -> int:
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    out, err = os.dup(1), os.dup(2)
    with open(spec["log"], "w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)

    def tell(text: str) -> None:
        os.write(err, f"{text}\n".encode())

    if spec["task"] == "checkpoint":
        result: dict[str, Any] = {"model": str(shapes.write(spec["shape"], Path(spec["scratch"])))}
    else:
        try:
            measure.set_up(spec["device"], spec["threads"])
            if spec["task"] == "eval":
                result = eval_work.run(spec, tell)
            else:
                result = measure.gemm(spec["device"]) if spec["task"] == "gemm" else step(spec, tell)
        except Exception as error:
            if getattr(error, "exit_code", None) != 2:  # TuneletError, which is not imported: see the top
                raise
            os.write(out, json.dumps({"error": str(error)}).encode())
            return 2
    os.write(out, (json.dumps(result) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

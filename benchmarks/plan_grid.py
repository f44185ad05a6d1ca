"""`python -m benchmarks plan`: predicted and actual seconds a step and peak of memory of tunelet over a grid of sizes,
ways to train and rows. One process for each configuration, which predicts, then trains; results are added to a JSON
file, and what is there already is not measured again, so it can be run in parts.

Not a benchmark of speed. It is kept short (about 25 minutes on two cores) by few steps of few rows: 3 steps, of 8 rows
at 135M, 4 at 360M, 2 at 1.7B, whose full tuning is left out. The first step, which warms up, does not count. With one
thread seconds a step are those of the CPU, which other programs disturb less.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import process, rows, shapes, train
from benchmarks.measure import machine, versions
from benchmarks.process import show
from tunelet.errors import TuneletError

BATCH = {"tiny": 4, "135M": 8, "360M": 4, "1.7B": 2}  # rows of a step
MODES = {"full": (), "lora": ("adapter.kind=lora",), "lora-int8": ("adapter.kind=lora", "model.quantization=int8")}
TIME, MEMORY = 0.20, 0.15  # what counts as right
HARD = {("1.7B", "full")}  # 1.7B x 16 bytes do not fit in 24 GB


def run(options: Namespace) -> int:
    """The verb: every configuration that options.json does not hold yet; prints the table and the shares."""
    path = Path(options.json) if options.json else None
    scratch = process.scratch(options)
    found = read(path)
    for config in grid(options):
        if any(old["config"] == config for old in found):
            continue
        model = process.checkpoint(
            {"device": "cpu", "threads": options.threads, "scratch": str(scratch)}, config["shape"]
        )
        started = time.perf_counter()
        got = measured({**config, "model": str(model), "scratch": str(scratch)})
        took = time.perf_counter() - started
        found.append({"config": config, **got, "took": took, "machine": machine(), "versions": versions()})
        show(line(found[-1]) + f"  ({took:.0f} s)")
        if path:
            train.write(path, {"benchmark": "plan", "runs": found, **shares(found)})
    print("\n".join([HEAD, *map(line, found)]))
    told = shares(found)
    print(
        f"time within {TIME:.0%}: {told['time_right']:.0%}, memory within {MEMORY:.0%}: {told['memory_right']:.0%}",
        end="",
    )
    print(f" of {len(found)} configurations")
    return 0


def grid(options: Namespace) -> list[dict[str, Any]]:
    """Small models first."""
    return [
        {
            "shape": shape,
            "mode": mode,
            "rows": kind,
            "checkpointing": checkpointing,
            "batch_size": BATCH[shape],
            "steps": options.steps,
            "threads": options.threads,
        }
        for shape, mode, kind, checkpointing in product(options.shape, options.mode, options.rows, ("off", "on"))
        if (shape, mode) not in HARD
    ]


def read(path: Path | None) -> list[dict[str, Any]]:
    """The runs of a results file. Raises TuneletError where it is something else."""
    if path is None or not path.exists():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["benchmark"] == "plan":
            return content["runs"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        pass
    raise TuneletError(f"{path} holds no plans.", why="results are added to it", fix="Name another file.")


def measured(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Predict and train in a process of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(process.ROOT), str(process.ROOT / "src")])
    env["XDG_CACHE_HOME"] = str(Path(spec["scratch"]) / "plan-cache")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_grid", json.dumps(spec)],
        cwd=process.ROOT, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        end = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise TuneletError(f"{spec['shape']} {spec['mode']} failed (exit code {done.returncode}).", why=end)
    return json.loads(done.stdout.strip().splitlines()[-1])


HEAD = (
    f"{'shape':<6}{'mode':<10}{'rows':<6}{'ckpt':<5}{'s/step':>8}{'was':>8}{'error':>7}{'total s':>9}{'was':>8}"
    f"{'peak MB':>9}{'was':>8}{'error':>7}"
)


def line(run: Mapping[str, Any]) -> str:
    config, told, was = run["config"], run["predicted"], run["actual"]
    return (
        f"{config['shape']:<6}{config['mode']:<10}{config['rows']:<6}{config['checkpointing']:<5}"
        f"{told['step_seconds']:>8.2f}{was['step_seconds']:>8.2f}{off(run, 'step_seconds'):>+7.0%}"
        f"{told['seconds']:>9.1f}{was['seconds']:>8.1f}"
        f"{told['peak_mb']:>9.0f}{was['peak_mb']:>8.0f}{off(run, 'peak_mb'):>+7.0%}"
    )


def off(run: Mapping[str, Any], key: str) -> float:
    return run["predicted"][key] / run["actual"][key] - 1


def shares(found: list[dict[str, Any]]) -> dict[str, float]:
    """Of the runs whose prediction was right."""
    right = {"time_right": ("step_seconds", TIME), "memory_right": ("peak_mb", MEMORY)}
    return {
        name: sum(abs(off(run, key)) <= limit for run in found) / max(1, len(found))
        for name, (key, limit) in right.items()
    }


# -- in the process of one configuration ------------------------------------------------------------------------------


def child(spec: dict[str, Any]) -> dict[str, Any]:
    """{"predicted", "actual"}: {"step_seconds", "seconds", "peak_mb"} each; and the prediction's parts."""
    from types import SimpleNamespace

    import numpy as np
    from rich.console import Console

    from tunelet import recipe_io
    from tunelet.data.examples import Origin, Tokens
    from tunelet.models import device
    from tunelet.runs.record import Run
    from tunelet.train import fit, loop, plan, step
    from tunelet.train.run import load_for_training

    vocabulary = shapes.SHAPES[spec["shape"]]["vocab_size"]
    drawn = rows.make(spec["rows"], spec["batch_size"] * spec["steps"], 0, vocabulary)
    train_rows = [
        Tokens(row.ids, np.arange(len(row.ids)) >= row.prompt, ((0, len(row.ids), "text"),), Origin("rows", at))
        for at, row in enumerate(drawn, 1)
    ]
    own = {
        "model.path": spec["model"],
        "model.device": "cpu",
        "model.threads": spec["threads"],
        "train.batch_size": spec["batch_size"],
        "train.learning_rate": 2e-5,
        "train.gradient_checkpointing": spec["checkpointing"],
        "train.optimizer_state": "float32",
        "train.log_steps": 1,
    }
    asked = recipe_io.load(sets=[*(f"{key}={value}" for key, value in own.items()), *MODES[spec["mode"]]]).recipe
    choice = device.choose("cpu", "auto", spec["threads"])
    device.apply(choice)
    with tempfile.TemporaryDirectory(dir=spec["scratch"]) as folder:
        made = fit.make(asked, choice, None, train_rows, [], Path(folder))
        told, work = made.prediction, made.work
        run = Run.create(Path(folder) / "run", made.recipe)
        model = load_for_training(made.recipe, SimpleNamespace(tokenizer=()), choice)
        device.start_peak(choice.device)
        console = Console(quiet=True)
        trained = loop.train(
            made.recipe, run, model=model, tokenizer=None, train_rows=train_rows, eval_rows=[], choice=choice,
            console=console,
        )  # fmt: skip
        log = [row for row in run.log_rows() if "loss" in row]
        peak = device.peak_since_mb(choice.device)
    each = plan.step_seconds(made.cost, work.train, work.several)
    # one thread's CPU time is what the clock would say on an idle machine
    rate = "tokens_per_cpu_second" if spec["threads"] == 1 else "tokens_per_second"
    first = len(step.micro_batches(next(loop.step_rows(train_rows, made.recipe, 0, work.steps)), made.recipe.train))
    return {
        "predicted": {
            "step_seconds": float(each[first:].sum()) / (work.steps - 1) + made.cost.seconds_update,
            "seconds": told.seconds,
            "peak_mb": told.peak_mb,
        },
        "actual": {
            "step_seconds": float(np.mean(np.diff([row["tokens"] for row in log]) / [row[rate] for row in log[1:]])),
            "seconds": trained.seconds,
            "peak_mb": peak,
        },
        "parts_mb": told.parts_mb,
        "parts_seconds": told.parts_seconds,
        "tokens_per_batch": made.recipe.train.tokens_per_batch,
        "calibration_seconds": made.measured_seconds,
        "busy": made.cost.busy,
    }


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))

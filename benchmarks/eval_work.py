"""Inside a contestant's own process: scoring the items of SPEC with tunelet, or with lm-eval. `python -m
benchmarks.worker` calls it for the task "eval".

Nothing at the top imports tunelet: that sets OpenMP and oneDNN up, and a peer must run as it does without.

SPEC has "contestant" ("tunelet", "lm-eval"), "model" (folder), "dtype", "batch_size" (sequences of one forward), and
what it scores: for tunelet "tasks" (the arguments of suite.prepare); for lm-eval "rows", a file with the prepared
items as JSON (benchmarks/evals.py `hand_over`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import measure

WARM = 2  # items scored before the clock starts


def run(spec: dict[str, Any], tell: Callable[[str], None]) -> dict[str, Any]:
    """{"cpu_seconds", "wall_seconds", "peak_mb", "items", "results": {task: {"acc,none": ..., ...}}}, and in the file
    SPEC["scores"] {task: [[(log-likelihood, greedy), ...], ...]}; the clock runs from texts to figures, without loading
    the model."""
    clock, scores, results = CONTESTANTS[spec["contestant"]](spec, tell)
    reading = clock.stop()
    # not in what is printed: a pipe that no one reads yet holds 64 KB
    Path(spec["scores"]).write_text(json.dumps(scores), encoding="utf-8")
    return {
        "contestant": spec["contestant"],
        "cpu_seconds": reading.cpu,
        "wall_seconds": reading.wall,
        "peak_mb": measure.peak_mb(spec["device"]),
        "items": sum(map(len, scores.values())),
        "results": results,
    }


def ours(spec: dict[str, Any], tell: Callable[[str], None]) -> tuple[measure.Clock, Any, Any]:
    from tunelet.commands.common import open_engine
    from tunelet.evals import suite

    engine = open_engine(spec["model"], device=spec["device"], dtype=spec["dtype"], trust=False, template=None)
    import torch

    torch.set_num_threads(spec["threads"])
    plan = suite.prepare(**spec["tasks"])
    warm = suite.prepare(**{**spec["tasks"], "limit": WARM})
    suite.run(engine, suite.Plan(warm.tasks[:1], {}), suite.Style(), batch_size=spec["batch_size"])
    tell("scoring")
    clock = measure.Clock(spec["device"])
    clock.start()
    outcome = suite.run(engine, plan, suite.Style(), batch_size=spec["batch_size"])
    scores = {
        name: [[(float(resp[0][0]), resp[0][1] == "True") for resp in line["resps"]] for line in lines]
        for name, lines in outcome.samples.items()
    }
    return clock, scores, outcome.results["results"]


def lm_eval(spec: dict[str, Any], tell: Callable[[str], None]) -> tuple[measure.Clock, Any, Any]:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    given = json.loads(Path(spec["rows"]).read_text(encoding="utf-8"))
    lm = HFLM(
        pretrained=spec["model"],
        tokenizer=spec["model"],
        device=spec["device"],
        dtype=spec["dtype"],
        batch_size=spec["batch_size"],
    )
    first = {**given[0], "items": given[0]["items"][:WARM]}
    evaluator.evaluate(lm=lm, task_dict={first["name"]: their_task(first)}, bootstrap_iters=0)
    tasks = {one["name"]: their_task(one) for one in given}
    tell("scoring")
    clock = measure.Clock(spec["device"])
    clock.start()
    found = evaluator.evaluate(lm=lm, task_dict=tasks, bootstrap_iters=0)
    scores = {
        name: [
            [(float(resp[0][0]), bool(resp[0][1])) for resp in sample["resps"]]
            for sample in sorted(samples, key=lambda sample: sample["doc_id"])
        ]
        for name, samples in found["samples"].items()
    }
    return clock, scores, found["results"]


def their_task(given: dict[str, Any]) -> Any:
    """lm-eval's task on prepared items: it draws the examples, puts the context together, encodes and scores."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    splits = {
        "test": datasets.Dataset.from_list(given["items"]),
        "train": datasets.Dataset.from_list(given["pool"] or given["items"]),
    }
    task = ConfigurableTask(
        config={
            "task": given["name"],
            "dataset_path": "json",
            "custom_dataset": lambda **_: splits,
            "output_type": "multiple_choice",
            "test_split": "test",
            "fewshot_split": "test" if given["same_rows"] else "train",
            "fewshot_config": {"sampler": "first_n" if given["first"] else "default"},
            "num_fewshot": given["number"],
            "description": given["instruction"],
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "target_delimiter": given["delimiter"],
            "fewshot_delimiter": given["fewshot_delimiter"],
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in given["metrics"]
            ],
        }
    )
    task.set_fewshot_seed(given["seed"])
    return task


CONTESTANTS = {"tunelet": ours, "lm-eval": lm_eval}

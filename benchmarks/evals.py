"""`python -m benchmarks eval`: tunelet and lm-eval score the same items with the same model, in turns; how far their
log-likelihoods and choices differ, and how many items each scores in a CPU-second.

Not a test: nothing here passes or fails on a time.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import tempfile
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import process, shapes
from benchmarks.measure import machine, versions
from benchmarks.process import show
from benchmarks.train import write
from tunelet.errors import TuneletError

OURS = "tunelet"
PEERS = {"lm-eval": "lm_eval"}


def run(options: Namespace) -> int:
    """The verb: measures, writes options.json after every pair, prints what was found."""
    from tunelet.evals import suite

    if options.peer and importlib.util.find_spec(PEERS[options.peer]) is None:
        raise TuneletError(
            f"{options.peer} is not installed.",
            why="peers are an extra, which nothing in tunelet needs",
            fix="make install-parity, or leave --peer out to measure tunelet alone.",
        )
    asked = {
        "names": options.task,
        "data": options.data,
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "only": options.subset,
    }
    plan = suite.prepare(**asked)
    if wrong := [one.name for one in plan.tasks if one.task.kind != "multiple_choice" or one.task.continuation]:
        raise TuneletError(f"{wrong[0]} cannot be handed to a peer.", fix="Take a task of multiple choice.")
    scratch = process.scratch(options)
    base = {"device": options.device, "threads": options.threads, "scratch": str(scratch)}
    model = _model(options.model, base)
    folder = Path(tempfile.mkdtemp(prefix="eval-", dir=scratch))
    (folder / "rows.json").write_text(json.dumps([hand_over(one) for one in plan.tasks]), encoding="utf-8")
    spec = {
        **base,
        "task": "eval",
        "model": model,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "tasks": asked,
        "rows": str(folder / "rows.json"),
    }
    names = [OURS, options.peer] if options.peer else [OURS]
    pairs: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for number in range(options.pairs):
        at = f"pair {number + 1} of {options.pairs}"
        pair = {}
        for name in names if number % 2 == 0 else reversed(names):  # who comes first changes: noise hits all alike
            scores = folder / f"scores-{name}.json"
            pair[name] = process.measure({**spec, "contestant": name, "scores": str(scores)}, f"{at}, {name}")
            pair[name]["scores"] = json.loads(scores.read_text(encoding="utf-8"))
            rate = pair[name]["items"] / pair[name]["cpu_seconds"]
            show(f"{at}, {name}: {rate:.2f} items/CPU-s, {pair[name]['peak_mb']:.0f} MB")
        pairs.append(pair)
        result = {**_setting(options, plan), **summary(pairs, options.peer)}
        if options.json:
            write(Path(options.json), result)
    shutil.rmtree(folder)
    print(table(result))
    return 0


def hand_over(prepared: Any) -> dict[str, Any]:
    """A prepared task as JSON for lm-eval: prompts, choices and right answers of its items and examples; what stands
    around them is lm-eval's work."""
    from tunelet.evals import prompts, task_template

    def rows(items: Sequence[Any]) -> list[dict[str, Any]]:
        return [
            # the row's place keeps rows with the same text apart from one another
            {"prompt": item.prompt, "choices": list(item.choices), "gold": item.gold, "where": item.where}
            for item in items
        ]

    task = prepared.task
    instruction = task_template.text(task.instruction, "instruction")
    return {
        "name": prepared.name,
        "items": rows(prepared.items),
        "pool": [] if prepared.same_rows else rows(prepared.pool),
        "number": prepared.number,
        "same_rows": prepared.same_rows,
        "first": task.fewshot.order == "first",
        "instruction": instruction(prepared.items[0].doc),
        "delimiter": task.delimiter,
        "fewshot_delimiter": task.fewshot.delimiter,
        "metrics": [metric for metric in task.metrics if metric in ("acc", "acc_norm", "acc_bytes", "exact_match")],
        "seed": prompts.SEED,
    }


def _model(name: str, base: Mapping[str, Any]) -> str:
    """A model's folder; of a shape a checkpoint of random weights, with a tokenizer of as many entries."""
    if name not in shapes.SHAPES:
        from tunelet.models import load

        return str(load.resolve(name))
    folder = Path(process.checkpoint(base, name))
    if not (folder / "tokenizer.json").exists():
        raise TuneletError(
            f"{folder} has no tokenizer.",
            why="a checkpoint of random weights comes without one",
            fix="Copy a tokenizer of SmolLM2 there: tokenizer.json and tokenizer_config.json",
        )
    return str(folder)


def _setting(options: Namespace, plan: Any) -> dict[str, Any]:
    return {
        "benchmark": "eval",
        "peer": options.peer,
        "model": options.model,
        "tasks": options.task,
        "num_fewshot": sorted({one.number for one in plan.tasks}),
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "device": options.device,
        "threads": options.threads,
        "machine": machine(),
        "versions": {**versions(), **({options.peer: metadata.version(options.peer)} if options.peer else {})},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "pairs_asked": options.pairs,
    }


def summary(pairs: Sequence[Mapping[str, Any]], peer: str | None) -> dict[str, Any]:
    """items; different_choices: items on which the two choose differently; different_greedy: answers of which one alone
    says that greedy decoding writes them; max_logprob_difference: nats; max_metric_difference: of any task's figure;
    throughput_ratio: median over the pairs of the peer's CPU seconds over tunelet's (ratios: each); peak_ratio:
    tunelet's memory over the peer's. Without a peer the items and rates alone."""
    last = pairs[-1][OURS]
    out: dict[str, Any] = {"items": last["items"], "pairs_done": len(pairs)}
    for name in pairs[0]:
        out[f"cpu_seconds_{name}"] = statistics.median(pair[name]["cpu_seconds"] for pair in pairs)
        out[f"peak_mb_{name}"] = statistics.median(pair[name]["peak_mb"] for pair in pairs)
    if not peer:
        return out
    ratios = [pair[peer]["cpu_seconds"] / pair[OURS]["cpu_seconds"] for pair in pairs]
    theirs = pairs[-1][peer]
    different = greedy = 0
    worst = largest = 0.0
    for task, items in last["scores"].items():
        for mine, other in zip(items, theirs["scores"][task], strict=True):
            sums = [[score for score, _ in one] for one in (mine, other)]
            different += sums[0].index(max(sums[0])) != sums[1].index(max(sums[1]))
            greedy += sum(a[1] != b[1] for a, b in zip(mine, other, strict=True))
            worst = max(worst, *(abs(a - b) for a, b in zip(*sums, strict=True)))
        for key, value in theirs["results"][task].items():
            if "," in key and isinstance(value, float):
                largest = max(largest, abs(value - last["results"][task][key]))
    return out | {
        "different_choices": different,
        "different_greedy": greedy,
        "max_logprob_difference": worst,
        "max_metric_difference": largest,
        "throughput_ratio": statistics.median(ratios),
        "ratios": ratios,
        "peak_ratio": last["peak_mb"] / theirs["peak_mb"],
    }


def table(result: Mapping[str, Any]) -> str:
    """What is printed at the end."""
    lines = [
        f"{name:<10}{result['items'] / result[f'cpu_seconds_{name}']:>10.2f} items/CPU-s"
        f"{result[f'peak_mb_{name}']:>9.0f} MB"
        for name in (OURS, result["peer"])
        if name
    ]
    if result["peer"]:
        lines.append(
            f"{result['items']} items: {result['different_choices']} chosen differently, log-likelihoods differ by at "
            f"most {result['max_logprob_difference']:.1e}, figures by {result['max_metric_difference']:.1e}"
        )
        lines.append(
            f"{result['throughput_ratio']:.2f} x the peer's items per CPU-second (median of {result['pairs_done']} "
            f"pairs: {', '.join(f'{ratio:.2f}' for ratio in result['ratios'])})"
        )
    return "\n".join(lines)

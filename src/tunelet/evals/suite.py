"""Tasks from beginning to end: contexts, scores, the figures of each task and group, and the files of results in
lm-eval's layout.

Not for what a task is (tasks.py) nor where its rows come from (task_plan.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError
from tunelet.evals import likelihood, metrics, prompts, task_template
from tunelet.evals.prompts import Asked, Style
from tunelet.evals.task_plan import Plan, Prepared, prepare
from tunelet.evals.task_template import BadRow

__all__ = ["Outcome", "Plan", "Style", "prepare", "run", "write"]

CHUNK = 1024  # items whose texts are encoded at once


@dataclass(frozen=True)
class Outcome:
    """results: lm-eval's results file; samples: task -> its lines; metrics: "task/metric" -> {"value", "low", "high",
    "n"}, with ",filter" behind the metric where there are filters."""

    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)


# The run -----------------------------------------------------------------------------------------------------------


def run(
    engine: Any,
    plan: Plan,
    style: Style,
    *,
    batch_size: int = likelihood.BATCH_SIZE,
    model_name: str = "",
    run_code: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Outcome:
    """Score every task with the engine's model. run_code: programs that the model writes may be run. progress(task,
    done, of). Raises TuneletError where programs have to be run and may not."""
    from tunelet.evals import code_task

    code_task.check([prepared.task for prepared in plan.tasks], run_code)
    started = time.time()
    samples, scored = {}, {}
    for prepared in plan.tasks:
        tell = (lambda done, of, name=prepared.name: progress(name, done, of)) if progress else None
        samples[prepared.name], scored[prepared.name] = _task(engine, prepared, style, batch_size, tell, run_code)
    results, figures = _results(plan, samples, scored)
    results["config"] = {
        "model": "tunelet",
        "model_args": {"pretrained": model_name, "dtype": str(getattr(engine.model, "dtype", ""))},
        "batch_size": str(batch_size),
        "device": str(next(engine.model.parameters()).device),
        "fewshot_seed": style.seed,
    }
    results |= {
        "date": started,
        "model_name": model_name,
        "system_instruction": style.system or None,
        "fewshot_as_multiturn": style.multiturn,
        "chat_template": engine.tokenizer.chat_template if style.chat else None,
        "max_length": engine.max_length or None,
        "total_evaluation_time_seconds": str(time.time() - started),
    }
    return Outcome(results, samples, figures)


def asked(engine: Any, prepared: Prepared, style: Style) -> list[Asked]:
    """The contexts and continuations of every item."""
    source = task_template.text(prepared.task.instruction, "instruction")
    return prompts.ask(
        prepared.task,
        prepared.items,
        prepared.pool,
        prepared.number,
        style,
        lambda item: source(item.doc),
        same_rows=prepared.same_rows,
        template=prompts.renderer_template(engine.renderer) if style.chat else None,
    )


def _task(
    engine: Any, prepared: Prepared, style: Style, batch_size: int, progress: Any, run_code: bool
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """(lines of the samples file, "metric,filter" -> the items' values)."""
    from tunelet.evals import generation

    todo = asked(engine, prepared, style)
    if prepared.task.kind == "generate":
        return generation.run(engine, prepared.loaded, todo, style, batch_size, progress, run_code=run_code)
    requests = encoded(engine, prepared, todo)
    flat = [request for of_item in requests for request in of_item]
    found = likelihood.score(engine.model, flat, batch_size=batch_size, progress=progress)
    lines, values, start = [], {}, 0
    for one, of_item in zip(todo, requests, strict=True):
        mine = found[start : start + len(of_item)]
        start += len(of_item)
        rolling = prepared.task.kind == "perplexity"
        figures = (metrics.rolled if rolling else metrics.choice)(prepared.task, one.item, mine)
        figures = {prepared.task.report_as.get(name, name): value for name, value in figures.items()}
        for name, value in figures.items():
            values.setdefault(f"{name},none", []).append(value)
        lines.append(_line(one, mine, figures, rolling))
    return lines, values


def encoded(engine: Any, prepared: Prepared, todo: Sequence[Asked]) -> list[list[likelihood.Request]]:
    """The requests of every item. Raises TuneletError that names the row whose answer cannot be scored."""
    from tunelet.evals.tokenise import Encoder

    encoder = Encoder(engine.tokenizer, engine.max_length)
    if prepared.task.kind == "perplexity":
        return [encoder.rolling(one.item.prompt) for one in todo]
    out: list[list[likelihood.Request]] = []
    for start in range(0, len(todo), CHUNK):
        part = todo[start : start + CHUNK]
        owners = [one for one in part for _ in one.continuations]
        pairs = [pair for one in part for pair in zip(one.contexts, one.continuations, strict=True)]
        try:
            found = iter(encoder.pairs(pairs))
        except BadRow as bad:
            raise TuneletError(f"task {prepared.name}: {owners[bad.place].item.where}: {bad}", fix=bad.fix) from None
        out += [[next(found) for _ in one.continuations] for one in part]
    return out


def _line(one: Asked, found: Sequence[likelihood.Likelihood], figures: Mapping[str, Any], rolling: bool) -> dict:
    pairs = [(one.item.prompt,)] if rolling else list(zip(one.contexts, one.continuations, strict=True))
    told = [sum(each.logprob for each in found)] if rolling else [(each.logprob, each.greedy) for each in found]
    answers = told if rolling else [[str(logprob), str(greedy)] for logprob, greedy in told]
    return sample(one, pairs, [[answer] for answer in answers], answers, figures, "none")


def sample(
    one: Asked,
    pairs: Sequence[Sequence[Any]],
    resps: Sequence[Any],
    filtered: Sequence[Any],
    figures: Mapping[str, Any],
    filter_name: str,
) -> dict[str, Any]:
    """A line of lm-eval's samples file. `where` is ours: the row's file and line."""
    item = one.item
    target = item.gold if item.choices else item.target
    return {
        "doc_id": item.number,
        "doc": item.doc,
        "target": str(target),
        "arguments": {f"gen_args_{n}": {f"arg_{m}": a for m, a in enumerate(pair)} for n, pair in enumerate(pairs)},
        "resps": list(resps),
        "filtered_resps": list(filtered),
        "filter": filter_name,
        "metrics": list(figures),
        "doc_hash": _hash(json.dumps(item.doc, indent=2, ensure_ascii=False, default=str)),
        "prompt_hash": _hash(str(pairs[0][0])),
        "target_hash": _hash(str(target)),
        "where": item.where,
        **figures,
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# After -------------------------------------------------------------------------------------------------------------


def _results(
    plan: Plan, samples: Mapping[str, list[Any]], scored: Mapping[str, Mapping[str, list[Any]]]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    out: dict[str, Any] = {key: {} for key in ("results", "groups", "group_subtasks", "configs", "versions")}
    out |= {key: {} for key in ("n-shot", "higher_is_better", "n-samples", "intervals")}
    for prepared in plan.tasks:
        name, task = prepared.name, prepared.task
        row: dict[str, Any] = {"alias": prepared.alias, "sample_len": len(prepared.items)}
        for key, values in scored[name].items():
            metric, _, filtered = key.partition(",")
            own = {shown: inner for inner, shown in task.report_as.items()}.get(metric, metric)
            found = metrics.figure(own, values, task.kind)
            row[key] = found.value
            row[f"{metric}_stderr,{filtered}"] = "N/A" if found.stderr is None else found.stderr
            out["intervals"].setdefault(name, {})[key] = found.interval
            out["higher_is_better"].setdefault(name, {})[metric] = own not in metrics.LESS_IS_BETTER
        out["results"][name] = row
        out["versions"][name] = task.version
        out["n-shot"][name] = prepared.number
        out["n-samples"][name] = {"original": prepared.all_items, "effective": len(prepared.items)}
        out["configs"][name] = {
            **task.model_dump(exclude_defaults=True, exclude={"subsets"}),
            "task": name,
            "num_fewshot": prepared.number,
            "source": prepared.source,
            "sha256": prepared.digest,
        }
        out["group_subtasks"][name] = []
    for group, members in reversed(plan.groups.items()):
        leaves = _leaves(group, plan.groups)
        row = {"alias": group, "sample_len": sum(out["n-samples"][leaf]["effective"] for leaf in leaves)}
        for key in dict.fromkeys(key for leaf in leaves for key in scored[leaf]):
            metric, _, filtered = key.partition(",")
            having = [leaf for leaf in leaves if key in scored[leaf]]
            of = [
                (
                    out["results"][leaf][key],
                    _number(out["results"][leaf][f"{metric}_stderr,{filtered}"]),
                    len(scored[leaf][key]),
                )
                for leaf in having
            ]
            row[key], stderr = metrics.pooled(of)
            row[f"{metric}_stderr,{filtered}"] = "N/A" if stderr is None else stderr
            together = [value for leaf in having for value in scored[leaf][key]]
            if all(isinstance(value, float) for value in together):
                found = metrics.figure(metric, together, "group").interval
                out["intervals"].setdefault(group, {})[key] = found
        out["results"][group] = out["groups"][group] = row
        out["group_subtasks"][group] = list(members)
    figures = {
        f"{name}/{key.removesuffix(',none')}": found
        for name, of in out["intervals"].items()
        for key, found in of.items()
    }
    return out, figures


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else None


def _leaves(group: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    return [leaf for member in groups[group] for leaf in (_leaves(member, groups) if member in groups else [member])]


def write(outcome: Outcome, folder: Path) -> Path:
    """results_DATE.json and samples_TASK_DATE.jsonl in `folder`; the path of the first."""
    from tunelet.runs.files import finite, write_atomically

    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.now().isoformat().replace(":", "-")
    for name, lines in outcome.samples.items():
        text = "".join(json.dumps(finite(line), ensure_ascii=False, default=str) + "\n" for line in lines)
        write_atomically(folder / f"samples_{name}_{date}.jsonl", text)
    path = folder / f"results_{date}.json"
    write_atomically(path, json.dumps(finite(outcome.results), ensure_ascii=False, indent=2, default=str) + "\n")
    return path

"""From likelihoods or generated text to an item's values, and from these to a task's figures with standard error and
interval. Formulas and names are lm-eval's (0.4.13, api/metrics.py and api/task.py process_results).

Not the intervals themselves (stats.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunelet.evals import stats, text_metrics
from tunelet.evals.likelihood import Likelihood
from tunelet.evals.task_rows import Item
from tunelet.evals.tasks import FOLLOWED, Extract, Task

LESS_IS_BETTER = ("word_perplexity", "byte_perplexity", "bits_per_byte", "token_perplexity")


@dataclass(frozen=True)
class Figure:
    """A task's figure. stderr: None where lm-eval states none; interval: {"value", "low", "high", "n"}."""

    value: float
    stderr: float | None
    interval: dict[str, Any]


def choice(task: Task, item: Item, found: Sequence[Likelihood]) -> dict[str, Any]:
    """metric -> the value of one item. acc: is the most probable choice the right one? acc_norm, acc_bytes: by the
    log-probability over characters, over UTF-8 bytes, of the choice. exact_match: would greedy decoding write the right
    one? f1: (right, chosen), for the figure over all. mass: the right ones' share of all choices' probability. The
    first of equally probable choices is chosen."""
    sums = [likelihood.logprob for likelihood in found]
    chosen = best(sums)
    out: dict[str, Any] = {}
    for metric in task.metrics:
        if metric == "acc":
            out[metric] = float(chosen == item.gold)
        elif metric == "acc_norm":
            out[metric] = float(best([s / len(c) for s, c in zip(sums, item.choices, strict=True)]) == item.gold)
        elif metric == "acc_bytes":
            sizes = [len(c.encode()) for c in item.choices]
            out[metric] = float(best([s / size for s, size in zip(sums, sizes, strict=True)]) == item.gold)
        elif metric == "exact_match":
            out[metric] = float(found[item.gold].greedy)
        elif metric == "f1":
            out[metric] = (item.gold, chosen)
        elif metric == "mass":
            highest = max(sums)
            shares = [math.exp(s - highest) for s in sums]
            out[metric] = sum(s for s, right in zip(shares, item.right, strict=True) if right) / sum(shares)
    return out


def best(values: Sequence[float]) -> int:
    """The place of the highest, the first of several."""
    return max(range(len(values)), key=lambda place: (values[place], -place))


def extracted(extract: Extract, text: str) -> str:
    """The answer in a generated text (lm-eval: filters/extraction.py RegexFilter)."""
    found = re.findall(extract.regex, text)
    if not found:
        return extract.fallback
    one = found[extract.group] if -len(found) <= extract.group < len(found) else extract.fallback
    if isinstance(one, tuple):
        one = next((part for part in one if part), extract.fallback)
    return one.strip()


def generated(task: Task, item: Item, answer: str, own: Callable[[Any, Any], float] | None) -> dict[str, Any]:
    """metric -> the value of one answer."""
    out: dict[str, Any] = {}
    for metric in task.metrics:
        if metric == "exact_match":
            out[metric] = float(_plain(task, answer) == _plain(task, item.target))
        elif metric == "f1":
            out[metric] = text_metrics.f1(answer, [item.target])
        elif metric in FOLLOWED:
            verdicts = _followed(item.doc, answer, loose="loose" in metric)
            whole = metric.startswith("prompt_level")
            out[metric] = float(all(verdicts)) if whole else (sum(verdicts), len(verdicts))
        elif own is not None:
            out[metric] = float(own(answer, item.doc))
    return out


def _followed(row: Any, answer: str, loose: bool) -> tuple[bool, ...]:
    """Which of a row's verifiable instructions an answer follows; Korean ones by their own verifiers."""
    from tunelet.evals import ifeval, ifeval_ko

    korean = any(name.startswith("ko_") for name in row["instruction_id_list"])
    verifiers = ifeval_ko.VERIFIERS if korean else ifeval.VERIFIERS
    return (ifeval.loose if loose else ifeval.strict)(row, answer, verifiers=verifiers)


def _plain(task: Task, text: str) -> str:
    for pattern in task.ignore:
        text = re.sub(pattern, "", text)
    return text.lower() if task.ignore_case else text


def rolled(task: Task, item: Item, found: Sequence[Likelihood]) -> dict[str, Any]:
    """metric -> (log-likelihood of the text, words, bytes or tokens it is spread over)."""
    total, text = sum(likelihood.logprob for likelihood in found), item.prompt
    over = {
        "word_perplexity": len(re.split(r"\s+", text)),
        "byte_perplexity": len(text.encode()),
        "bits_per_byte": len(text.encode()),
        "token_perplexity": sum(likelihood.tokens for likelihood in found),
    }
    return {metric: (total, over[metric]) for metric in task.metrics}


# Figures -----------------------------------------------------------------------------------------------------------


def figure(metric: str, values: Sequence[Any], kind: str) -> Figure:
    """Over all items of a task."""
    if metric in LESS_IS_BETTER:
        return _perplexity(metric, values)
    if metric == "f1" and kind == "multiple_choice":
        return _macro_f1(values)
    if metric.startswith("inst_level"):  # of all instructions; those of one prompt are drawn together
        hits, of = sum(hits for hits, _ in values), sum(of for _, of in values)
        found = stats.bootstrap_ratio([float(hits) for hits, _ in values], [float(of) for _, of in values])
        if hits in (0, of):  # a bootstrap sees no doubt there
            found = stats.wilson(hits, of)
        return Figure(found.value, None, found.as_dict() | {"n": of})
    value = sum(values) / len(values)
    return Figure(value, mean_stderr(values), _interval(values).as_dict())


def _interval(values: Sequence[float]) -> stats.Interval:
    if set(values) <= {0.0, 1.0}:
        return stats.wilson(round(sum(values)), len(values))
    if min(values) >= 0.0 and max(values) <= 1.0:
        return stats.bounded_mean(values, 0.0, 1.0)
    return stats.bootstrap_mean(values)


def mean_stderr(values: Sequence[float]) -> float | None:
    """Of the mean, with Bessel's correction; None of a single value."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1)) / math.sqrt(len(values))


def _perplexity(metric: str, values: Sequence[tuple[float, int]]) -> Figure:
    found = stats.bootstrap_ratio([-total for total, _ in values], [float(size) for _, size in values])
    turn = (lambda nats: nats / math.log(2)) if metric == "bits_per_byte" else math.exp
    interval = {"value": turn(found.value), "low": turn(found.low), "high": turn(found.high), "n": found.n}
    return Figure(turn(found.value), None, interval)


def _macro_f1(values: Sequence[tuple[int, int]]) -> Figure:
    """Mean over the classes (numbers of choices) of their F1, as sklearn's f1_score(average="macro"), with a percentile
    bootstrap over the items."""
    import numpy as np

    classes = sorted({number for pair in values for number in pair})
    place = {number: at for at, number in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)))
    for right, chosen in values:
        counts[place[right], place[chosen]] += 1

    n = len(values)
    drawn = np.random.default_rng(0).multinomial(n, (counts / n).ravel(), size=stats.RESAMPLES)
    low, high = np.quantile(macro_f1(drawn.reshape(-1, *counts.shape).astype(float)), [0.025, 0.975])
    value = float(macro_f1(counts))
    return Figure(value, None, {"value": value, "low": float(low), "high": float(high), "n": n})


def macro_f1(tables: Any) -> Any:
    """Of tables [..., right, chosen] of counts: the mean over the classes that are right or chosen of their F1."""
    import numpy as np

    hits = np.diagonal(tables, axis1=-2, axis2=-1)
    both = tables.sum(-1) + tables.sum(-2)
    seen = both > 0
    return (2 * hits / np.where(seen, both, 1)).sum(-1) / np.maximum(seen.sum(-1), 1)


def pooled(figures: Sequence[tuple[float, float | None, int]]) -> tuple[float, float | None]:
    """(mean weighted by size, its standard error) of (value, stderr, size) of a group's tasks (lm-eval:
    aggregate_subtask_metrics, pooled_sample_stderr)."""
    sizes = [size for _, _, size in figures]
    value = sum(value * size for value, _, size in figures) / sum(sizes)
    if any(stderr is None for _, stderr, _ in figures) or sum(sizes) == len(sizes):
        return value, None
    variance = sum((size - 1) * (stderr or 0.0) ** 2 * size for _, stderr, size in figures) / (sum(sizes) - len(sizes))
    return value, math.sqrt(variance / sum(sizes))

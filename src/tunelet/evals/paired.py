"""Two models on the same items: which metrics differ by more than chance, and how many items would show it.

Not the tests themselves (stats.py) and not which metric counts which items (starter.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tunelet.evals import stats
from tunelet.evals.starter import count

ALPHA = 0.05
LESS_IS_BETTER = ("refusal_false", "invented_rate")

Outcomes = dict[str, dict[str, bool]]


@dataclass(frozen=True)
class Paired:
    """A metric of two models over the n items that both answered. first, second: shares; difference: second - first,
    with a bootstrap interval over the items. only_first, only_second: items that count for one alone. p: of McNemar's
    exact test; p_holm: corrected for all tests made together; needed: see stats.items_needed.
    verdict: "better", "worse" (of the second, by p_holm) or "noise"."""

    metric: str
    n: int
    first: float
    second: float
    difference: stats.Interval
    only_first: int
    only_second: int
    p: float
    needed: int | None
    p_holm: float = 1.0
    verdict: str = "noise"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def outcomes(rows: Iterable[Mapping[str, Any]]) -> Outcomes:
    """metric -> item -> did it count. rows: of a run's eval/after.jsonl, the metrics those of its after.json: graded
    items where there are any, else which answers end."""
    rows = list(rows)
    graded = [row for row in rows if "executed" in row]
    out: Outcomes = {}
    for row in graded:
        for metric, figure in count([dict(row)]).items():
            out.setdefault(metric, {})[_key(row)] = bool(figure["value"])
    if not graded:
        out["stop_rate"] = {_key(row): bool(row["stopped"]) for row in rows if row["type"] != "text"}
    return out


def _key(row: Mapping[str, Any]) -> str:
    """One item: its number alone may stand for another one in another run."""
    return repr((row["item"], row["messages"], row["expected"]))


def compare(first: Outcomes, second: Outcomes, *, seed: int = 0) -> list[Paired]:
    """A test for every metric of which both have answered an item; not yet corrected, see `corrected`."""
    out = []
    for metric in first:
        shared = [item for item in first[metric] if item in second.get(metric, {})]
        if not shared:
            continue
        a, b = ([of[metric][item] for item in shared] for of in (first, second))
        only_a, only_b = (sum(x > y for x, y in zip(*two, strict=True)) for two in ((a, b), (b, a)))
        change = [float(y) - float(x) for x, y in zip(a, b, strict=True)]
        out.append(
            Paired(
                metric=metric,
                n=len(shared),
                first=sum(a) / len(a),
                second=sum(b) / len(b),
                difference=stats.bounded_mean(change, -1.0, 1.0, seed=seed),
                only_first=only_a,
                only_second=only_b,
                p=stats.mcnemar(only_a, only_b),
                needed=stats.items_needed(only_a, only_b, len(shared)),
            )
        )
    return out


def corrected(tests: Sequence[Paired]) -> list[Paired]:
    """With p_holm over all of `tests`, and the verdict that follows from it."""
    out = []
    for test, p in zip(tests, stats.holm([test.p for test in tests]), strict=True):
        higher = test.only_second > test.only_first
        better = higher != (test.metric in LESS_IS_BETTER)
        out.append(replace(test, p_holm=p, verdict="noise" if p >= ALPHA else "better" if better else "worse"))
    return out

"""Two evaluations held against each other, item by item: how far each figure differs, whether chance alone would do as
much, and how many items would show it.

Not for reading them (outputs.py), nor for runs of `align` (paired.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tunelet.evals import metrics, outputs, stats
from tunelet.evals.outputs import Output

ALPHA = 0.05
MARGIN = 0.01  # a difference within this is none: of shares a point, of perplexities one percent


@dataclass(frozen=True)
class Versus:
    """One figure of two models over the n items that both have. part: of a group, which is tested apart. difference:
    second - first, with a bootstrap interval over pairs. only_first, only_second: items that one alone did right, where
    an item is right or wrong. p: McNemar's exact test of these, else the two answers of each item swapped at random;
    p_holm: corrected over all figures of the command at the same level. needed: items on which such a difference is
    found in 80 % of all trials; None where none was seen, or it can't be told. verdict: "better" or "worse" (the
    second), "same" (the interval lies within MARGIN), or "unclear"."""

    task: str
    metric: str
    part: bool
    n: int
    first: float
    second: float
    difference: stats.Interval
    p: float
    needed: int | None
    higher_is_better: bool
    margin: float | None
    only_first: int | None = None
    only_second: int | None = None
    p_holm: float = 1.0
    verdict: str = "unclear"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(first: Output, second: Output) -> tuple[list[Versus], list[str]]:
    """(a test of every figure that both have, groups before their tasks, not yet corrected; figures that can't be
    tested)."""
    out: list[Versus] = []
    untested: list[str] = []
    inside = {member for of in first.groups.values() for member in of}
    for name in _ordered(first):
        leaves = [leaf for leaf in _leaves(name, first.groups) if leaf in first.tasks and leaf in second.tasks]
        if not leaves:
            continue
        own = [set(of.tasks[leaf].values) for of in (first, second) for leaf in leaves]
        for key in first.tasks[leaves[0]].values:
            if not all(key in keys for keys in own):
                continue
            pairs = [
                (first.tasks[leaf].values[key][a], second.tasks[leaf].values[key][b])
                for leaf in leaves
                for a, b in outputs.pair(first.tasks[leaf], second.tasks[leaf]).both
                if a in first.tasks[leaf].values[key] and b in second.tasks[leaf].values[key]
            ]
            if not pairs:
                continue
            metric = key.partition(",")[0]
            found = _test(metric, pairs, name in first.groups)
            if found is None:
                if name not in first.groups:
                    untested.append(f"{name} {_told(key)}")
                continue
            higher = first.higher_is_better(leaves[0], metric)
            out.append(Versus(name, _told(key), name in inside, higher_is_better=higher, **found))
    return out, untested


def corrected(tests: Sequence[Versus]) -> list[Versus]:
    """With p_holm and the verdict: over whole tasks and groups together, and over the parts of groups together."""
    out = list(tests)
    for part in (False, True):
        places = [place for place, test in enumerate(tests) if test.part == part]
        for place, p in zip(places, stats.holm([tests[place].p for place in places]), strict=True):
            out[place] = replace(tests[place], p_holm=p, verdict=_verdict(tests[place], p))
    return out


def _verdict(test: Versus, p: float) -> str:
    if p < ALPHA:
        return "better" if (test.difference.value > 0) == test.higher_is_better else "worse"
    within = test.margin is not None and max(-test.difference.low, test.difference.high) <= test.margin
    return "same" if within else "unclear"


def _ordered(output: Output) -> list[str]:
    """Names of groups and tasks, every group before what is in it."""
    inside = {member for of in output.groups.values() for member in of}
    out: list[str] = []

    def visit(name: str) -> None:
        if name not in out:
            out.append(name)
            for member in output.groups.get(name, ()):
                visit(member)

    for name in [*output.groups, *output.tasks]:
        if name not in inside:
            visit(name)
    return out


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    return [leaf for member in groups[name] for leaf in _leaves(member, groups)] if name in groups else [name]


def _told(key: str) -> str:
    return key.removesuffix(",none")


# One figure --------------------------------------------------------------------------------------------------------


def _test(metric: str, pairs: Sequence[tuple[Any, Any]], group: bool) -> dict[str, Any] | None:
    """None where such values can't be tested."""
    if all(isinstance(value, bool | int | float) for both in pairs for value in both):
        return _means(*([float(both[side]) for both in pairs] for side in (0, 1)))
    if group:
        return None  # a group's figure is the mean of its tasks', not one over all items
    if metric in metrics.LESS_IS_BETTER or metric.startswith("inst_level"):
        sides = [[_fraction(metric, both[side]) for both in pairs] for side in (0, 1)]
        if all(found is not None for side in sides for found in side):
            return _ratios(metric, *sides)
    elif metric == "f1" and all(isinstance(value, list) and len(value) == 2 for both in pairs for value in both):
        return _macro_f1(pairs)
    return None


def _means(a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    change = [y - x for x, y in zip(a, b, strict=True)]
    out: dict[str, Any] = {"n": len(a), "first": sum(a) / len(a), "second": sum(b) / len(b)}
    share = min(*a, *b) >= 0 and max(*a, *b) <= 1
    out["margin"] = MARGIN if share else None
    if {*a, *b} <= {0.0, 1.0}:
        only = [sum(x > y for x, y in zip(*two, strict=True)) for two in ((a, b), (b, a))]
        out |= {"difference": stats.bootstrap_change(*only, len(a)), "p": stats.mcnemar(*only)}
        return out | {"only_first": only[0], "only_second": only[1], "needed": stats.items_needed(*only, len(a))}
    out["difference"] = stats.bounded_mean(change, -1.0, 1.0) if share else stats.bootstrap_mean(change)
    return out | {"p": stats.swapped(a, b), "needed": stats.items_needed_of(change)}


def _fraction(metric: str, value: Any) -> tuple[float, float] | None:
    """(above, below the line) of one item; of instructions lm-eval writes a list of verdicts."""
    if not isinstance(value, list) or not value:
        return None
    if metric.startswith("inst_level") and all(isinstance(one, bool) for one in value):
        return float(sum(value)), float(len(value))
    if len(value) != 2 or not all(isinstance(one, int | float) for one in value) or value[1] <= 0:
        return None
    return (float(value[0]) if metric.startswith("inst_level") else -float(value[0])), float(value[1])


def _ratios(metric: str, a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Figures that are one sum over another: perplexities, shares of instructions."""
    import numpy as np

    turn: Callable[[Any], Any] = lambda nats: nats  # noqa: E731
    if metric in metrics.LESS_IS_BETTER:
        turn = (lambda nats: nats / math.log(2)) if metric == "bits_per_byte" else np.exp
    (ta, ba), (tb, bb) = (np.array(side).T for side in (a, b))
    n, first, second = len(ta), ta.sum() / ba.sum(), tb.sum() / bb.sum()
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=stats.RESAMPLES).astype(float)
    drawn_change = turn((drawn @ tb) / (drawn @ bb)) - turn((drawn @ ta) / (drawn @ ba))
    low, high = np.quantile(drawn_change, [0.025, 0.975])
    # what each item adds to the difference, to first order
    each = (tb - second * bb) / bb.mean() - (ta - first * ba) / ba.mean()
    share = metric.startswith("inst_level")
    if share and list(a) == list(b):  # a bootstrap sees no doubt there
        low, high = -stats.wilson(0, n).high, stats.wilson(0, n).high
    return {
        "n": n,
        "first": float(turn(first)),
        "second": float(turn(second)),
        "difference": stats.Interval(float(turn(second) - turn(first)), float(low), float(high), n),
        "p": stats.swapped(ta, tb, ba, bb),
        "needed": stats.items_needed_of(each + (second - first)),
        "margin": MARGIN if share else MARGIN * float(turn(first)),
    }


def _macro_f1(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """The mean over the classes of their F1: values are (right, chosen)."""
    import numpy as np

    cells: dict[tuple[int, int, int], int] = {}
    for (right, a), (_, b) in pairs:
        cells[right, a, b] = cells.get((right, a, b), 0) + 1
    place = {number: at for at, number in enumerate(sorted({number for cell in cells for number in cell}))}
    kinds, n = len(place), len(pairs)
    sides = np.zeros((2, len(cells), kinds * kinds))
    for at, (right, a, b) in enumerate(cells):
        sides[0, at, place[right] * kinds + place[a]] = sides[1, at, place[right] * kinds + place[b]] = 1
    counts = np.array(list(cells.values()))

    def change(first: Any, second: Any) -> Any:
        f1 = [metrics.macro_f1(tables.reshape(-1, kinds, kinds)) for tables in (first, second)]
        return f1[1] - f1[0]

    draw = np.random.default_rng(0)
    drawn = draw.multinomial(n, counts / n, size=stats.RESAMPLES).astype(float)
    low, high = np.quantile(change(drawn @ sides[0], drawn @ sides[1]), [0.025, 0.975])
    if all(a == b for _, a, b in cells):  # a bootstrap sees no doubt there
        low, high = -stats.wilson(0, n).high, stats.wilson(0, n).high
    swap = draw.binomial(counts, 0.5, size=(stats.SWAPS, len(counts))).astype(float)
    stay = counts - swap
    chance = change(stay @ sides[0] + swap @ sides[1], stay @ sides[1] + swap @ sides[0])
    first, second = (float(metrics.macro_f1((counts @ side).reshape(kinds, kinds))) for side in sides)
    return {
        "n": n,
        "first": first,
        "second": second,
        "difference": stats.Interval(second - first, float(low), float(high), n),
        "p": stats.share_as_large(chance, second - first),
        "needed": None,
        "margin": MARGIN,
    }

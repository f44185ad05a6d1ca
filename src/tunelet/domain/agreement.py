"""How far annotators agree beyond chance: Cohen's kappa for two, Krippendorff's alpha for more; with intervals.

Not for who is right (build.py). Labels are any values that can be compared; a missing one is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from random import Random
from typing import Any

RESAMPLES = 1000
CONFIDENCE = 0.95


def cohen_kappa(pairs: Sequence[tuple[Hashable, Hashable]]) -> float | None:
    """(observed - expected) / (1 - expected) over items that both labelled (Cohen 1960). 1: always the same; 0: as
    chance would. None where it is not defined: no items, or both gave one and the same label throughout."""
    if not pairs:
        return None
    n = len(pairs)
    observed = sum(a == b for a, b in pairs) / n
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(first[label] * second[label] for label in first) / n**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def krippendorff_alpha(items: Sequence[Sequence[Hashable]]) -> float | None:
    """Nominal alpha, 1 - observed / expected disagreement (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability"): any number of annotators, and not all of them for every item. items: the labels of each; those
    with fewer than two say nothing. None where it is not defined, as for kappa."""
    used = [labels for labels in items if len(labels) > 1]
    totals: Counter[Hashable] = Counter(label for labels in used for label in labels)
    n = sum(totals.values())
    expected = n * n - sum(count * count for count in totals.values())
    if not expected:
        return None
    observed = 0.0
    for labels in used:
        m = len(labels)
        observed += (m * m - sum(count * count for count in Counter(labels).values())) / (m - 1)
    return 1 - (n - 1) * observed / expected


def measured(labels: Mapping[str, Mapping[str, Hashable]], *, interval: bool = True, seed: int = 0) -> dict[str, Any]:
    """Agreement of labels[item][annotator].

    measure: "cohen_kappa", or "krippendorff_alpha" where more than two annotators labelled; value (None: not defined)
    with its percentile bootstrap interval over items, low and high; observed: the share of pairs of labels that are
    the same; items: how many have two labels or more.
    """
    shared = [dict(sorted(given.items())) for given in labels.values() if len(given) > 1]
    names = sorted({name for given in shared for name in given})
    out: dict[str, Any] = {"measure": "", "value": None, "items": len(shared), "annotators": names}
    if not shared:
        return out
    rows = [tuple(given.values()) for given in shared]
    two = len(names) == 2
    compute: Callable[[Sequence[Any]], float | None] = cohen_kappa if two else krippendorff_alpha
    same = [a == b for row in rows for place, a in enumerate(row) for b in row[place + 1 :]]
    out |= {
        "measure": "cohen_kappa" if two else "krippendorff_alpha",
        "value": compute(rows),
        "observed": sum(same) / len(same),
    }
    if interval and out["value"] is not None:
        rng = Random(seed)
        drawn = (compute(rng.choices(rows, k=len(rows))) for _ in range(RESAMPLES))
        found = sorted(value for value in drawn if value is not None)
        edge = (1 - CONFIDENCE) / 2
        out["low"], out["high"] = found[int(edge * len(found))], found[int((1 - edge) * (len(found) - 1))]
    return out


def told(found: Mapping[str, Any]) -> str:
    """The figure in words."""
    if not found["items"]:
        return "not measured: no item has two annotators yet"
    sign = "κ" if found["measure"] == "cohen_kappa" else "α"
    counted = f"{found['items']} items, {len(found['annotators'])} annotators, {found['observed']:.0%} the same"
    if found["value"] is None:
        return f"{sign} is not defined, all labels are one and the same ({counted})"
    interval = f", 95 % interval {found['low']:.2f} to {found['high']:.2f}" if "low" in found else ""
    return f"{sign} {found['value']:.2f}{interval} ({counted})"

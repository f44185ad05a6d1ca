"""What scores are worth once the items that stood in the training rows are left out. Not for finding them
(data/overlap.py)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tunelet.evals import stats
from tunelet.evals.paired import outcomes


@dataclass(frozen=True)
class Cleaned:
    """A metric over all items, over those that are clean (None: none is), and over the tainted ones alone."""

    metric: str
    all: stats.Interval
    clean: stats.Interval | None
    tainted: stats.Interval | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cleaned(rows: Sequence[Mapping[str, Any]], tainted: Collection[int]) -> list[Cleaned]:
    """rows: answered items, as in a run's eval/after.jsonl; tainted: places of those that were trained on."""
    whole = outcomes(rows)
    dirty = outcomes(row for place, row in enumerate(rows) if place in tainted)
    out = []
    for metric, items in whole.items():
        bad = dirty.get(metric, {})
        good = [value for item, value in items.items() if item not in bad]
        out.append(Cleaned(metric, _share(list(items.values())), _share(good), _share(list(bad.values()))))
    return out


def _share(values: Sequence[bool]) -> Any:
    return stats.wilson(sum(values), len(values)) if values else None

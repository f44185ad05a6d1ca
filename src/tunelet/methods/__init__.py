"""Pure loss functions, one file a method. `losses` is the extension point: name -> loss(model, batch, totals, method).

A loss is this micro-batch's share of the loss of its whole optimizer step, however the step's rows are cut, and comes
with sums over the micro-batch's rows of what the log shows (the step divides them by the number of rows).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunelet.data.examples import Tokens


@dataclass(frozen=True)
class Totals:
    """What the losses of a whole optimizer step are divided by.

    rows; targets: of all sequences; chosen: targets of each row's first sequence. kl: KTO's reference point.
    """

    rows: int
    targets: int
    chosen: int
    kl: float = 0.0

    @classmethod
    def of(cls, rows: Sequence[Tokens]) -> Totals:
        chosen = (
            sum(row.mask[1 : row.sequences[0][1]]) if row.branches else row.trained for row in rows
        )  # the first token is never a target
        return cls(len(rows), sum(row.trained for row in rows), sum(chosen))


def by_label(told: Mapping[str, float]) -> dict[str, float]:
    """Figures that were summed over the rows of one verdict only (KTO) and divided by all rows: means over their own.
    Those of a verdict that no row has are left out."""
    share = told.get("labels/chosen")
    if share is None:
        return dict(told)
    shares = {"chosen": share, "rejected": 1 - share}
    out = {name: value for name, value in told.items() if name.rpartition("/")[2] not in shares}
    for name, value in told.items():
        of = shares.get(name.rpartition("/")[2])
        if of and name != "labels/chosen":
            out[name] = value / of
    return out


def losses() -> dict[str, Callable[..., tuple[Any, dict[str, float]]]]:
    """name of the method -> its loss(model, batch, totals, method) -> (fp32 scalar, sums over rows). Imports torch."""
    from tunelet.methods import dpo, kto, orpo, pretrain, sft, simpo

    return {
        "pretrain": pretrain.loss,
        "sft": sft.loss,
        "dpo": dpo.loss,
        "orpo": orpo.loss,
        "simpo": simpo.loss,
        "kto": kto.loss,
    }

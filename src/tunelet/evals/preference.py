"""Held-out pairs: how often a model finds the better answer more probable than the worse one.

Not for which of two models answers better (winrate.py), and not the training's own accuracy, which counts rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tunelet.data.examples import Tokens
from tunelet.evals.held_out import batches
from tunelet.evals.stats import wilson

Scores = tuple[tuple[float, int], ...]


def scores(model: Any, rows: Sequence[Tokens], *, progress: Callable[[int, int], None] | None = None) -> list[Scores]:
    """For each row and each of its branches (log-probability in nats, tokens): of the chosen answer and then of the
    rejected one.

    rows: of data/branches.py `pairs`, or with any number of branches. The prompt is read once for all.
    """
    from tunelet.data.pack import make_batch
    from tunelet.models import sequences

    device = next(model.parameters()).device
    out: list[Any] = [None] * len(rows)
    done = 0
    for places in batches(rows):
        found = iter(sequences.scored(model, make_batch([rows[place] for place in places]).to(device)))
        for place in places:
            out[place] = tuple(next(found) for _ in rows[place].branches)
        done += len(places)
        if progress:
            progress(done, len(rows))
    return out


def accuracy(
    model: Any, rows: Sequence[Tokens], *, progress: Callable[[int, int], None] | None = None
) -> dict[str, dict[str, Any]]:
    """`metrics` of `scores(model, rows)`; {} where there is no row."""
    return metrics(scores(model, rows, progress=progress))


def metrics(found: Sequence[Scores]) -> dict[str, dict[str, Any]]:
    """name -> {"value", "low", "high", "n"}: shares of pairs with Wilson intervals; a tie is not a hit.

    preference_accuracy: the chosen answer's summed log-probability is the higher one. Sums favour short answers: every
    token costs. preference_accuracy_per_token: the same of the means over tokens, which lengths do not sway so.
    """
    if not found:
        return {}
    by_sum = sum(chosen[0] > rejected[0] for chosen, rejected in found)
    by_mean = sum(chosen[0] / chosen[1] > rejected[0] / rejected[1] for chosen, rejected in found)
    return {
        "preference_accuracy": wilson(by_sum, len(found)).as_dict(),
        "preference_accuracy_per_token": wilson(by_mean, len(found)).as_dict(),
    }

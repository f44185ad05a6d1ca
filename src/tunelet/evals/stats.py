"""Figures with their 95 % intervals: shares (Wilson), means and ratios (bootstrap with a fixed seed).

Not for comparing two models item by item. Pure functions of their arguments: the same values give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure, its 95 % interval, and the number of independent things it was counted over."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Share of successes with Wilson's score interval (Wilson 1927), which holds near 0 and 1 where the usual one
    fails.

    Raises ValueError where there is nothing to count or more successes than trials.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # at 0 and n the bound is the share itself; rounding would leave it a hair inside
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == n else min(1.0, middle + half)
    return Interval(share, low, high, n)


def bootstrap_mean(values: Sequence[float], *, seed: int = 0, confidence: float = CONFIDENCE) -> Interval:
    """Mean with a percentile bootstrap interval (Efron 1979), resampling the values."""
    return bootstrap_ratio(values, [1.0] * len(values), seed=seed, confidence=confidence)


def bootstrap_ratio(
    tops: Sequence[float], bottoms: Sequence[float], *, seed: int = 0, confidence: float = CONFIDENCE
) -> Interval:
    """sum(tops) / sum(bottoms) with a percentile bootstrap interval, resampling the pairs: a loss per token over rows.

    Tokens of one row are not independent, so rows are what is resampled. Raises ValueError where there is no pair, or
    the bottoms sum to 0.
    """
    import numpy as np

    if not tops or len(tops) != len(bottoms) or sum(bottoms) == 0:
        raise ValueError(f"{len(tops)} values over {len(bottoms)}, summing to {sum(bottoms)}")
    a, b = np.asarray(tops, dtype=np.float64), np.asarray(bottoms, dtype=np.float64)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=RESAMPLES).astype(np.float64)
    below = drawn @ b
    ratios = (drawn @ a)[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(a.sum() / b.sum()), float(low), float(high), len(a))

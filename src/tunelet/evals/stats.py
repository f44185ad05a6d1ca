"""Figures with their 95 % intervals: shares (Wilson), means and ratios (bootstrap with a fixed seed); exact tests.

Not for which items two models share (paired.py). Pure functions of their arguments: the same values give the same
interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

CONFIDENCE = 0.95
POWER = 0.8
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


def bounded_mean(values: Sequence[float], lowest: float, highest: float, *, seed: int = 0) -> Interval:
    """Mean of values that lie in [lowest, highest], with a bootstrap interval.

    Where all values are equal a bootstrap sees no doubt at all. The interval is then what others, of which none was
    seen yet, could make of the mean: as many of them as Wilson's interval of 0 of n allows.
    """
    if not values or min(values) < max(values):
        return bootstrap_mean(values, seed=seed)
    value, unseen = float(values[0]), wilson(0, len(values)).high
    return Interval(value, value - unseen * (value - lowest), value + unseen * (highest - value), len(values))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test (1947): could chance alone split the items that only one of two did right?

    Binomial with probability 1/2 over those items; items that both or neither did right say nothing. 1 without any.
    """
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)  # whole numbers up to here: exact for any n


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected so that all tests together err in at most the share asked for (Holm 1979), in their order."""
    out, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda place: ps[place])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        out[place] = largest
    return out


def items_needed(only_first: int, only_second: int, n: int) -> int | None:
    """How many items a test of McNemar needs to see, in 80 % of all trials at 5 %, a difference of the size that was
    seen on n items. None where none was seen.

    n = (z(0.975) sqrt(d) + z(0.8) sqrt(d - diff^2))^2 / diff^2, d the share of items that only one did right: Connor,
    "Sample size for testing differences in proportions for the paired-sample design", Biometrics 43 (1987), 207-211.
    """
    discordant, difference = (only_first + only_second) / n, (only_first - only_second) / n
    if not difference:
        return None
    normal = NormalDist()
    z, power = normal.inv_cdf((1 + CONFIDENCE) / 2), normal.inv_cdf(POWER)
    root = z * discordant**0.5 + power * (discordant - difference**2) ** 0.5
    return math.ceil((root / difference) ** 2)


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

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
SWAPS = 9999


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


def bootstrap_change(only_first: int, only_second: int, n: int, *, seed: int = 0) -> Interval:
    """`bounded_mean` of n changes, -1 for each item that only the first did right, 1 for the second's, else 0: drawn by
    how many there are of each kind, which is the same and quick."""
    import numpy as np

    if max(only_first, only_second, n - only_first - only_second) == n:
        return bounded_mean([1.0 if only_second else -1.0 if only_first else 0.0] * n, -1.0, 1.0)
    shares = np.array([only_first, only_second, n - only_first - only_second]) / n
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=RESAMPLES)
    low, high = np.quantile((drawn[:, 1] - drawn[:, 0]) / n, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval((only_second - only_first) / n, float(low), float(high), n)


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


def items_needed_of(changes: Sequence[float]) -> int | None:
    """As `items_needed`, of values that are no yes or no: changes are the differences item by item. None where their
    mean is 0.

    n = (z(0.975) + z(0.8))^2 variance / mean^2: the paired test by the normal distribution.
    """
    n, mean = len(changes), sum(changes) / len(changes)
    variance = sum((change - mean) ** 2 for change in changes) / max(1, n - 1)
    if not mean:
        return None
    normal = NormalDist()
    z = normal.inv_cdf((1 + CONFIDENCE) / 2) + normal.inv_cdf(POWER)
    return max(1, math.ceil(z * z * variance / mean**2))


def swapped(
    first: Sequence[float],
    second: Sequence[float],
    below_first: Sequence[float] | None = None,
    below_second: Sequence[float] | None = None,
    *,
    seed: int = 0,
) -> float:
    """Two-sided p of two models with the same items: is their difference as large where the two values of each item are
    swapped at random? Approximate randomization (Noreen 1989); of yes and no it is McNemar's test.

    Of means or, with `below`, of sum(first) / sum(below_first). Valid for any number of items.
    """
    import numpy as np

    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    below_a, below_b = (
        np.ones(len(a)) if of is None else np.asarray(of, dtype=np.float64) for of in (below_first, below_second)
    )
    rng, found = np.random.default_rng(seed), []
    step = max(1, 5_000_000 // len(a))
    for start in range(0, SWAPS, step):
        swap = rng.integers(0, 2, size=(min(step, SWAPS - start), len(a)), dtype=np.int8).astype(np.float64)
        moved, moved_below = swap @ (b - a), swap @ (below_b - below_a)
        one = (a.sum() + moved) / (below_a.sum() + moved_below)
        other = (b.sum() - moved) / (below_b.sum() - moved_below)
        found.append(other - one)
    return share_as_large(np.concatenate(found), b.sum() / below_b.sum() - a.sum() / below_a.sum())


def share_as_large(drawn: Any, seen: float) -> float:
    """p of a difference that was seen among those that chance makes, itself one of them."""
    import numpy as np

    near = 1e-9 * max(1e-3, abs(seen))  # sums in another order differ in their last digits
    return float((1 + np.count_nonzero(np.abs(drawn) >= abs(seen) - near)) / (1 + len(drawn)))


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

"""Intervals: known values, coverage, and the same result every time."""

from __future__ import annotations

import random

import pytest

from tunelet.evals.stats import bootstrap_mean, bootstrap_ratio, wilson


def test_wilson_known_values():
    # Newcombe 1998, table I: 81/263, 15/148, 0/20, 1/29
    known = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)]
    for successes, n, low, high in known:
        got = wilson(successes, n)
        assert got.value == successes / n and got.n == n
        assert got.low == pytest.approx(low, abs=1e-4) and got.high == pytest.approx(high, abs=1e-4)
    assert wilson(7, 7).high == 1.0 and wilson(7, 7).low == pytest.approx(1 - wilson(0, 7).high)
    for bad in ((0, 0), (3, 2), (-1, 4)):
        with pytest.raises(ValueError, match="successes"):
            wilson(*bad)


def test_bootstrap_is_repeatable_and_covers():
    rng = random.Random(0)
    hits = 0
    for trial in range(60):
        values = [rng.gauss(3, 2) for _ in range(80)]
        got = bootstrap_mean(values, seed=trial)
        assert got == bootstrap_mean(values, seed=trial)
        assert got.low < got.value < got.high
        hits += got.low <= 3 <= got.high
    assert 50 <= hits <= 60  # 95 %: 57 expected


def test_ratio_weighs_by_the_bottom():
    got = bootstrap_ratio([10.0, 1.0], [10.0, 2.0])
    assert got.value == 11 / 12 and got.n == 2
    assert got.low == pytest.approx(0.5) and got.high == pytest.approx(1.0)
    same = bootstrap_mean([2.0] * 5)
    assert (same.low, same.high) == (2.0, 2.0)
    for bad in (([], []), ([1.0], [0.0]), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError):
            bootstrap_ratio(*bad)

"""Intervals: known values, coverage, and the same result every time."""

from __future__ import annotations

import random

import pytest

from tunelet.evals.stats import (
    bootstrap_mean,
    bootstrap_ratio,
    bounded_mean,
    holm,
    items_needed,
    mcnemar,
    wilson,
)


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


def test_mcnemar_is_the_exact_binomial():
    assert mcnemar(0, 0) == 1.0 == mcnemar(5, 5) and mcnemar(3, 2) == 1.0
    assert mcnemar(0, 5) == 2 / 2**5 == mcnemar(5, 0)
    assert mcnemar(1, 7) == 2 * (1 + 8) / 2**8
    assert mcnemar(2, 10) == 2 * (1 + 12 + 66) / 2**12
    assert mcnemar(400, 600) == pytest.approx(2.73e-10, rel=0.01)  # normal, with continuity correction: 3.0e-10
    assert mcnemar(3000, 0) == 0 or mcnemar(3000, 0) < 1e-300


def test_mcnemar_errs_no_more_than_it_says():
    rng = random.Random(0)
    wrong = 0
    for _ in range(2000):
        only = sum(rng.random() < 0.5 for _ in range(30))
        wrong += mcnemar(only, 30 - only) < 0.05
    assert wrong / 2000 < 0.06


def test_holm_known_values():
    # Holm 1979: the smallest p times m, the next times m - 1, never falling, never above 1
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


def test_items_needed_has_the_power_it_says():
    # 25 % only the first, 10 % only the second: Connor's formula by hand gives ceil((1.95996 x 0.591608 + 0.841621 x
    # 0.572276)^2 / 0.0225) = 120
    needed = items_needed(25, 10, 100)
    assert needed == 120 == items_needed(10, 25, 100) == items_needed(250, 100, 1000)
    assert items_needed(4, 4, 50) is None
    rng = random.Random(1)
    found = 0
    for _ in range(1500):
        draws = [rng.random() for _ in range(needed)]
        found += mcnemar(sum(d < 0.25 for d in draws), sum(0.25 <= d < 0.35 for d in draws)) < 0.05
    assert 0.70 < found / 1500 < 0.83  # the exact test is a little more careful than the normal one


def test_bounded_mean_doubts_what_never_varied():
    never = bounded_mean([0.0] * 30, 0.0, 1.0)
    assert (never.value, never.low) == (0.0, 0.0) and never.high == pytest.approx(wilson(0, 30).high)
    tie = bounded_mean([0.0] * 30, -1.0, 1.0)
    assert tie.low == -tie.high == pytest.approx(-wilson(0, 30).high)
    values = [0.0, 1.0, 1.0, 0.5] * 10
    assert bounded_mean(values, 0.0, 1.0, seed=3) == bootstrap_mean(values, seed=3)

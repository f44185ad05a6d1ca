"""What the comparison of two models promises, by simulation: few false finds, real gains found, and enough items said
to be needed."""

from __future__ import annotations

import numpy as np
import pytest

from tunelet.evals import paired, stats

DRAWS = 100


def answered(draw: np.random.Generator, n: int, gain: float, agree: float = 0.7) -> tuple[dict, dict]:
    """Two models of which the second is right more often by `gain`; on the share `agree` of items they are right or
    wrong together."""
    together = draw.random(n) < agree
    shared, first = draw.random(n) < 0.5, draw.random(n) < 0.5
    second = draw.random(n) < 0.5 + gain / (1 - agree)
    a, b = np.where(together, shared, first), np.where(together, shared, second)
    return ({"acc": {str(i): bool(x) for i, x in enumerate(of)}} for of in (a, b))


def ps(n: int, gain: float, seed: int) -> list[tuple[float, float]]:
    """(p of McNemar's test, difference found) of DRAWS pairs of models."""
    draw, out = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        a, b = (np.array(list(of["acc"].values())) for of in answered(draw, n, gain))
        out.append((stats.mcnemar(int((a & ~b).sum()), int((b & ~a).sum())), float(b.mean() - a.mean())))
    return out


def test_equal_models_are_rarely_told_apart():
    told = sum(p < paired.ALPHA for seed in range(5) for p, _ in ps(2000, 0.0, seed))
    assert told <= 6 * 5, "of 100 repeats each"
    one = next(iter(answered(np.random.default_rng(0), 500, 0.0)))
    (same,) = paired.corrected(paired.compare(one, one))
    assert same.verdict == "noise" and same.p == 1.0 and same.needed is None


def test_five_points_on_2000_items_are_found():
    for seed in range(3):
        assert sum(p < paired.ALPHA and found > 0 for p, found in ps(2000, 0.05, seed)) >= 90
    (test,) = paired.corrected(paired.compare(*answered(np.random.default_rng(1), 2000, 0.05)))
    assert test.verdict == "better" and test.difference.low <= 0.05 <= test.difference.high


@pytest.mark.parametrize("discordant", [0.15, 0.3])
def test_the_items_said_to_be_needed_are_those_that_are(discordant):
    """So many items that McNemar's test finds the difference in 80 % of trials, found by simulation: within 15 %."""
    gain = 0.05
    only_b = (discordant + gain) / 2
    only_a = discordant - only_b
    said = stats.items_needed(round(only_a * 10_000), round(only_b * 10_000), 10_000)
    draw = np.random.default_rng(3)

    def power(n: int) -> float:
        counts = draw.multinomial(n, [only_a, only_b, 1 - discordant], size=2000)
        return float(np.mean([stats.mcnemar(int(a), int(b)) < 0.05 for a, b, _ in counts]))

    low, high = said // 2, said * 2
    while high - low > said // 50:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= 0.8 else (middle, high)
    assert said == pytest.approx((low + high) / 2, rel=0.15)


def test_many_tests_at_once_are_corrected():
    """Of twenty metrics without any difference hardly ever one is called better."""
    draw = np.random.default_rng(5)
    wrong = 0
    for _ in range(40):
        counts = draw.multinomial(300, [0.1, 0.1, 0.8], size=20)
        wrong += min(stats.holm([stats.mcnemar(int(a), int(b)) for a, b, _ in counts])) < paired.ALPHA
    assert wrong <= 5

"""The shapes of the learning-rate schedules."""

from __future__ import annotations

import itertools

import pytest

from tunelet.train.schedule import learning_rate, warmup_steps


def rates(schedule, total=100, warmup=0.1, min_ratio=0.1):
    return [
        learning_rate(step, total, peak=2.0, schedule=schedule, warmup=warmup, min_ratio=min_ratio)
        for step in range(total)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warmup_is_linear_and_never_zero(schedule):
    assert rates(schedule)[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(rates(schedule)) == pytest.approx(2.0)


def test_ends():
    assert rates("cosine")[-1] == rates("linear")[-1] == rates("wsd")[-1] == pytest.approx(0.2)
    assert rates("constant")[-1] == 2.0
    assert rates("cosine", min_ratio=0.0)[-1] == pytest.approx(0.0)


def test_halfway():
    assert rates("cosine", warmup=0)[49] == pytest.approx(1.1)
    assert rates("linear", warmup=0)[49] == pytest.approx(1.1)
    assert rates("cosine", warmup=0)[24] > rates("linear", warmup=0)[24]


def test_wsd_stays_up_and_then_falls():
    found = rates("wsd")
    assert found[10:90] == [2.0] * 80
    assert all(a > b for a, b in itertools.pairwise(found[89:]))


def test_warmup_as_share_and_as_steps():
    assert (warmup_steps(0.05, 200), warmup_steps(7, 200), warmup_steps(50, 10), warmup_steps(0, 10)) == (10, 7, 10, 0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_very_short_runs_have_positive_rates(schedule, total):
    assert all(0 < rate <= 2.0 for rate in rates(schedule, total, warmup=0.05))

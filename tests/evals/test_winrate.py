"""Length-controlled win rates: closed forms, known models recovered, and intervals that are honest."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunelet.evals import winrate
from tunelet.evals.stats import wilson


def logistic(a):
    return 1 / (1 + np.exp(-a))


def drawn(n: int, a: float, b: float, longer: float, seed: int):
    """Judgements of the model itself: lengths of both, and who won."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(100 + longer, 20, n), rng.normal(100, 20, n)
    d = first - second
    won = (rng.random(n) < logistic(a + b * np.tanh(d / d.std()))).astype(float)
    return won.tolist(), first.tolist(), second.tolist()


def test_two_lengths_have_a_closed_form():
    # half of the answers are longer and win 90 %, half are shorter by as much and win 30 %: a is the mean of the logits
    won = [1.0] * 900 + [0.0] * 100 + [1.0] * 300 + [0.0] * 700
    first, second = [60.0] * 1000 + [40.0] * 1000, [50.0] * 2000
    got = winrate.length_controlled(won, first, second)
    expected = (math.log(0.9 / 0.1) + math.log(0.3 / 0.7)) / 2
    assert got.value == pytest.approx(float(logistic(expected)), abs=1e-4)
    assert got.low < got.value < got.high and got.n == 2000


def test_where_length_decides_all_nobody_is_better():
    rng = np.random.default_rng(0)
    d = rng.normal(6, 8, 2000)  # mostly the longer one, and the longer one wins
    won = (d > 0).astype(float).tolist()
    got = winrate.length_controlled(won, (100 + d).tolist(), [100.0] * 2000)
    assert sum(won) / len(won) > 0.75
    assert got.low < 0.5 < got.high and abs(got.value - 0.5) < 0.05
    turned = winrate.length_controlled([1 - w for w in won], [100.0] * 2000, (100 + d).tolist())
    assert turned.value == pytest.approx(1 - got.value, abs=1e-9)


def test_a_known_model_is_recovered():
    got = winrate.length_controlled(*drawn(8000, a=0.4, b=1.5, longer=30, seed=1))
    assert got.value == pytest.approx(float(logistic(0.4)), abs=0.03)
    assert got.high - got.low < 0.1


def test_intervals_cover_the_truth(monkeypatch):
    monkeypatch.setattr(winrate, "RESAMPLES", 300)
    held = 0
    for seed in range(60):
        got = winrate.length_controlled(*drawn(250, a=-0.5, b=1.0, longer=10, seed=seed), seed=seed)
        held += got.low <= logistic(-0.5) <= got.high
    assert 52 <= held <= 60


def test_weights_are_repetitions():
    rng = np.random.default_rng(2)
    x, y, times = np.tanh(rng.normal(size=40)), rng.integers(0, 2, 40).astype(float), rng.integers(0, 4, 40)
    weighted = winrate._fit(x, y, times[None].astype(float))
    repeated = winrate._fit(np.repeat(x, times), np.repeat(y, times), np.ones((1, times.sum())))
    assert weighted == pytest.approx(repeated, abs=1e-9)


@pytest.mark.parametrize("wins", [0.97, 0.5, 0.0])
def test_hard_cases_converge(monkeypatch, wins):
    """Answers that length separates, or nearly all won: more steps change nothing."""
    x = np.linspace(-1, 1, 400)
    y = (x > 1 - 2 * wins).astype(float)
    ends = []
    for steps in (winrate.ITERATIONS, 10 * winrate.ITERATIONS):
        monkeypatch.setattr(winrate, "ITERATIONS", steps)
        ends.append(winrate._fit(x, y, np.ones((1, 400)))[0])
    assert ends[0] == ends[1] and 0 <= ends[0] <= 1


def test_equal_lengths_leave_the_raw_rate():
    won = [1.0] * 6 + [0.5] * 2 + [0.0] * 2
    got = winrate.metrics(won, ["abc"] * 10, ["xyz"] * 10)
    assert got["win_rate"]["value"] == 0.7 == got["win_rate_length_controlled"]["value"]
    assert got["win_rate"]["low"] < 0.7 < got["win_rate"]["high"]
    assert got["answer_characters"] == {"value": 3.0, "low": 3.0, "high": 3.0, "n": 10}


def test_a_length_that_never_varies_cannot_be_controlled():
    got = winrate.metrics([1.0, 0.0, 1.0], ["long"] * 3, ["s"] * 3)
    assert "win_rate_length_controlled" not in got and got["win_rate"]["n"] == 3


@pytest.mark.parametrize("every", [1.0, 0.5, 0.0])
def test_the_same_judgement_every_time_is_no_certainty(every):
    got = winrate.metrics([every] * 20, [str(10**n) for n in range(20)], ["1"] * 20)
    for name in ("win_rate", "win_rate_length_controlled"):
        figure = got[name]
        assert figure["value"] == every
        assert figure["high"] - figure["low"] == pytest.approx(wilson(0, 20).high)


def test_prompts_too_long_for_the_model_are_not_asked(tiny_model, tiny_tokenizer):
    from tunelet.data.examples import Message, Origin, Preference
    from tunelet.data.render import Renderer
    from tunelet.infer.engine import TorchEngine

    engine = TorchEngine(tiny_model, tiny_tokenizer, Renderer(tiny_tokenizer))
    asked = [
        Preference((Message("user", text),), (Message("assistant", "a"),), (Message("assistant", "b"),), Origin("f", 1))
        for text in ("one", "word " * 600, "two")
    ]
    got = winrate.answers(engine, asked, max_new_tokens=3, batch_size=2)
    assert got[1] is None and got[0]["messages"][0]["content"] == "one" and got[2]["item"] == "prompt/2"

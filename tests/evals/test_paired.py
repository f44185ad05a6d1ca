"""Two models on the same items: which rows are one item, the tests against exact numbers, the correction, the words."""

from __future__ import annotations

import random

import pytest

from tunelet.evals import paired, stats
from tunelet.evals.starter import count


def item(number: int, kind: str = "command", language: str = "en", **judged) -> dict:
    base = {"executed": False, "exact": False, "refused": False, "stopped": True}
    messages = [{"role": "user", "content": f"{language} {number}"}]
    return {"item": f"starter/{number}", "type": kind, "language": language, "messages": messages, "expected": "x",
            **base, **judged}  # fmt: skip


def test_outcomes_are_the_metrics_of_the_evaluation():
    rng = random.Random(0)
    kinds = ["command", "unsupported", "state", "confirm"]
    rows = [
        item(n, rng.choice(kinds), rng.choice(["en", "ko"]), **{k: rng.random() < 0.5 for k in
             ("executed", "exact", "refused", "stopped")})
        for n in range(200)
    ]  # fmt: skip
    prompt = {"item": "prompt/0", "type": "prompt", "messages": [], "expected": None, "stopped": True}
    got = paired.outcomes([*rows, prompt])
    assert {name: sum(of.values()) / len(of) for name, of in got.items()} == {
        name: figure["value"] for name, figure in count(rows).items()
    }
    plain = [{**prompt, "item": f"held_out/{n}", "type": kind, "stopped": n > 2} for n, kind in
             enumerate(["held_out"] * 5 + ["text"])]  # fmt: skip
    assert list(paired.outcomes(plain)) == ["stop_rate"] and len(paired.outcomes(plain)["stop_rate"]) == 5


def test_only_the_same_items_are_compared():
    first = paired.outcomes([item(n, executed=True) for n in range(6)])
    other = [item(n, executed=n < 2) for n in range(4)] + [{**item(4), "messages": [{"role": "user", "content": "?"}]}]
    tests = {test.metric: test for test in paired.compare(first, paired.outcomes(other))}
    test = tests["executed_match_en"]
    assert (test.n, test.first, test.second, test.only_first, test.only_second) == (4, 1.0, 0.5, 2, 0)
    assert test.difference.value == -0.5 and test.difference.low < -0.5 < test.difference.high
    assert test.p == 0.5  # 2 x (1/2)^2
    assert paired.compare(first, paired.outcomes([item(9)])) == []


def test_no_difference_seen_is_not_proof_of_none():
    same = paired.outcomes([item(n, executed=True) for n in range(10)])
    test = next(test for test in paired.compare(same, same) if test.metric == "executed_match_en")
    assert test.p == 1 and test.needed is None
    assert test.difference.value == 0 and test.difference.high == pytest.approx(stats.wilson(0, 10).high)
    assert test.difference.low == -test.difference.high


def test_verdicts_know_which_way_is_better():
    def rows(better):
        out = [item(n, executed=better, refused=not better) for n in range(30)]
        return paired.outcomes(out + [item(n, "unsupported", refused=n % 2 == 0) for n in range(30, 60)])

    for first, second, word in ((False, True, "better"), (True, False, "worse")):
        tests = {test.metric: test for test in paired.corrected(paired.compare(rows(first), rows(second)))}
        assert tests["executed_match_en"].verdict == tests["refusal_false"].verdict == word
        assert tests["refusal_right"].verdict == tests["stop_rate"].verdict == "noise"
        assert tests["executed_match_en"].p_holm == pytest.approx(tests["executed_match_en"].p * len(tests))
        assert (tests["refusal_false"].difference.value < 0) == (word == "better")


def test_many_tests_are_corrected_together():
    """5 : 0 is p = 0.0625 alone; 7 : 0 is 0.016, and noise among five metrics."""
    first = paired.outcomes([item(n) for n in range(40)])
    second = paired.outcomes([item(n, executed=n < 7) for n in range(40)])
    alone = [test for test in paired.compare(first, second) if test.metric == "executed_match_en"]
    assert paired.corrected(alone)[0].verdict == "better" and alone[0].p == 2 / 2**7
    among = {test.metric: test for test in paired.corrected(paired.compare(first, second))}
    assert among["executed_match_en"].verdict == "noise" and among["executed_match_en"].p_holm == 4 * 2 / 2**7

"""The verdict on tuning against prompting, from scripted answers: what decides, in which direction, in which words."""

from __future__ import annotations

import pytest

from tunelet.evals import gate
from tunelet.evals.gate import Measured


def graded(right: list[bool], kind: str = "command") -> list[dict]:
    return [
        {"item": f"starter/{n}", "language": "en", "type": kind, "messages": [], "expected": "x", "answer": "x",
         "stopped": True, "executed": ok, "exact": ok, "refused": False}
        for n, ok in enumerate(right)
    ]  # fmt: skip


def held(answers: list[str], expected: str = "yes") -> list[dict]:
    return [
        {"item": f"held_out/{n}", "type": "held_out", "messages": [], "expected": expected, "answer": text,
         "stopped": True}
        for n, text in enumerate(answers)
    ]  # fmt: skip


def losses(values: list[float]) -> list[dict]:
    return [{"item": f"held_out/{n}", "nll": value, "tokens": 4} for n, value in enumerate(values)]


def judged(baselines: dict, tuned: Measured, *, short: bool = False) -> dict:
    out = gate.judge(baselines, tuned, short=short)
    return out | {"remarks": []} | {"text": gate.said(out | {"remarks": []})}


def test_tuning_that_is_better_beats_prompting():
    few = Measured(graded([True] * 40 + [False] * 60), told={"number": 5})
    out = judged({"few_shot": few}, Measured(graded([True] * 90 + [False] * 10)))
    assert out["beats_prompting"] is True and out["metric"] == "right" and out["best_baseline"] == "few_shot"
    assert out["difference"]["value"] == pytest.approx(0.5) and 0 < out["difference"]["low"] < 0.5
    assert out["difference"]["p"] < 1e-6 and out["difference"]["n"] == 100
    assert out["text"].startswith("Tuning beat a few-shot prompt of 5 examples: 90.0 % against 40.0 %")


@pytest.mark.parametrize("tuned", [41, 43, 30, 0])
def test_what_is_not_surely_better_did_not_beat_it(tuned):
    """By chance as good, a little better, or worse: none is a reason to tune."""
    few = Measured(graded([n % 5 < 2 for n in range(100)]), told={"number": 5})
    out = judged({"few_shot": few}, Measured(graded([n % 7 == 0 if tuned == 41 else n < tuned for n in range(100)])))
    assert out["beats_prompting"] is False and out["difference"]["low"] <= 0
    assert out["text"].startswith("Tuning did not beat a few-shot prompt") and "Try prompting first" in out["text"]
    assert ("eval.baseline_items" in out["text"]) == (out["difference"]["value"] > 0)
    assert "-" not in out["text"].split("difference")[1], "a minus is a minus sign"


def test_the_better_of_the_prompts_counts_and_equal_models_are_no_gain():
    of = {"zero_shot": Measured(graded([True] * 10 + [False] * 10)), "few_shot": Measured(graded([True] * 20))}
    out = judged(of, Measured(graded([True] * 20)))
    assert out["best_baseline"] == "few_shot" and out["beats_prompting"] is False
    assert out["difference"]["value"] == 0 and out["difference"]["p"] == 1
    assert judged({"zero_shot": of["zero_shot"]}, Measured(graded([True] * 20)))["beats_prompting"] is True


def test_only_shared_items_are_held_against_each_other():
    """The tuned model answers more of them than the prompts do."""
    few = Measured(graded([True] * 10))
    out = judged({"few_shot": few}, Measured(graded([True] * 10 + [False] * 500)))
    assert out["tuned"] == 1.0 and out["difference"]["n"] == 10


def test_exact_answers_decide_where_they_are_short_and_anybody_has_one():
    few = Measured(held(["no"] * 30), losses([9.0] * 30))
    tuned = Measured(held(["yes "] * 28 + ["no"] * 2), losses([1.0] * 30))
    assert judged({"few_shot": few}, tuned, short=True)["metric"] == "exact"
    assert judged({"few_shot": few}, tuned)["metric"] == "answer_loss", "long answers are hardly ever exact"
    none = judged({"few_shot": few}, Measured(held(["maybe"] * 30), losses([1.0] * 30)), short=True)
    assert none["metric"] == "answer_loss", "nobody has one: that says nothing"


def test_less_loss_is_better_and_the_words_say_so():
    few = Measured(losses=losses([8.0 + n % 3 for n in range(30)]), told={"number": 3})
    out = judged({"few_shot": few}, Measured(losses=losses([4.0 + n % 3 for n in range(30)])))
    assert out["beats_prompting"] is True and out["difference"]["value"] == pytest.approx(1.0)
    assert out["difference"]["p"] < 0.001 and "fewer by +1.000" in out["text"]
    worse = judged({"few_shot": few}, Measured(losses=losses([9.0 + n % 3 for n in range(30)])))
    assert worse["beats_prompting"] is False and worse["difference"]["high"] < 0


def test_nothing_to_compare_is_no_verdict():
    out = judged({}, Measured(graded([True])))
    assert out["beats_prompting"] is None and out["text"] == "Not held against prompting: nothing to compare."
    assert judged({"few_shot": Measured()}, Measured(graded([True])))["beats_prompting"] is None


def test_where_the_prompt_does_as_well_is_told():
    few = graded([True] * 50) + [{**row, "item": f"no/{n}"} for n, row in enumerate(graded([False] * 50, "state"))]
    tuned = graded([True] * 50) + [{**row, "item": f"no/{n}"} for n, row in enumerate(graded([True] * 50, "state"))]
    out = judged({"few_shot": Measured(few)}, Measured(tuned))
    assert out["beats_prompting"] is True
    assert "The prompt does as well in: English commands" in out["text"] and "other requests" not in out["text"]

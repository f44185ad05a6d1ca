"""What `python -m benchmarks eval` hands to the peer, and how it compares. The peer itself: test_lm_eval_parity.py."""

from __future__ import annotations

import json

import pytest

from benchmarks import evals
from benchmarks.__main__ import main, parser
from tunelet.evals import suite


def contestant(scores: list, cpu: float, acc: float) -> dict:
    return {
        "cpu_seconds": cpu,
        "peak_mb": 100.0,
        "items": len(scores),
        "scores": {"t": scores},
        "results": {"t": {"alias": "t", "acc,none": acc}},
    }


def test_differences_and_ratios():
    ours = [[(-1.0, True), (-2.0, False)], [(-3.0, False), (-1.0, False)]]
    theirs = [[(-1.001, True), (-2.0, True)], [(-0.5, False), (-1.0, False)]]
    pairs = [
        {"tunelet": contestant(ours, cpu, 0.5), "lm-eval": contestant(theirs, 6.0, 0.25)} for cpu in (2.0, 1.0, 3.0)
    ]
    found = evals.summary(pairs, "lm-eval")
    assert (found["items"], found["different_choices"], found["different_greedy"]) == (2, 1, 1)
    assert found["max_logprob_difference"] == 2.5 and found["max_metric_difference"] == 0.25
    assert found["throughput_ratio"] == 3.0 and found["ratios"] == [3.0, 6.0, 2.0]
    assert "3.00 x the peer's items" in evals.table({**found, "peer": "lm-eval"})
    alone = evals.summary([{"tunelet": contestant(ours, 2.0, 0.5)}], None)
    assert alone["items"] == 2 and "throughput_ratio" not in alone


def test_what_is_handed_over(tmp_path):
    for split, number in (("dev", 3), ("val", 2)):
        rows = "".join(f"What is {n}?,a{n},b,c,d,{'ABCD'[n]}\n" for n in range(number))
        (tmp_path / f"us_foreign_policy_{split}.csv").write_text(rows, encoding="utf-8")
    plan = suite.prepare(["mmlu"], [str(tmp_path)], num_fewshot=2, only=["us_foreign_policy"])
    given = json.loads(json.dumps(evals.hand_over(plan.tasks[0])))
    assert given["items"][1]["prompt"] == "What is 1?\nA. a1\nB. b\nC. c\nD. d\nAnswer:"
    assert (len(given["items"]), len(given["pool"]), given["number"], given["first"]) == (2, 3, 2, True)
    assert given["instruction"].endswith("about us foreign policy.\n\n") and given["metrics"] == ["acc"]


def test_mistakes(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n', encoding="utf-8")
    args = ["eval", "--model", "starter", "--task", "gsm8k", "--data", str(tmp_path / "rows.jsonl")]
    assert main([*args, "--num-fewshot", "0"]) == 2
    assert "gsm8k cannot be handed to a peer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser().parse_args(["eval", "--task", "mmlu"])

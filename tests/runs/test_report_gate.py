"""The page's section on tuning or prompting: red, green or open, said in words too; and remarks on every run's page."""

from __future__ import annotations

import pytest

from tunelet.evals import gate as judging
from tunelet.evals.gate import Measured
from tunelet.recipe import Recipe
from tunelet.runs import report
from tunelet.runs.record import Run

TOLD = {
    "layout": "Q and A",
    "instruction": "Answer <b>briefly</b>.",
    "shots": [{"file": "my.jsonl", "line": 7}, {"file": "my.jsonl", "line": 9}],
    "number": 2,
}
FORGOT = {
    "worse": True,
    "text": "Forgotten: text of general English and Korean.",
    "figures": [
        {"kind": "text", "of": "general", "title": "general English and Korean", "n": 22, "before": 2.0, "after": 2.5,
         "perplexity": [7.4, 12.2], "difference": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 22}, "p": None,
         "verdict": "worse"},
        {"kind": "choice", "of": "general", "title": "general English and Korean", "n": 64, "before": 0.3, "after": 0.3,
         "difference": {"value": 0.0, "low": -0.05, "high": 0.05, "n": 64}, "p": 1.0, "verdict": "unknown"},
    ],
}  # fmt: skip


def rows(right: int) -> list[dict]:
    return [
        {"item": f"starter/{n}", "language": "ko", "type": "command", "messages": [], "expected": "x", "answer": "x",
         "stopped": True, "executed": n < right, "exact": n < right, "refused": False}
        for n in range(40)
    ]  # fmt: skip


def run_with(folder, tuned: int | None, forgetting: dict | None = None) -> Run:
    run = Run.create(folder / "run", Recipe())
    baselines = {} if tuned is None else {"few_shot": Measured(rows(20), told=TOLD)}
    found = judging.judge(baselines, Measured(rows(tuned or 0)), short=False) | {"remarks": []}
    found |= {"text": judging.said(found), "forgetting": forgetting or {"worse": None, "figures": [], "text": ""}}
    run.write_json("summary.json", {"gate": found})
    if tuned is not None:
        run.write_json("eval/few_shot.json", TOLD)
    return run


@pytest.mark.parametrize(
    ("tuned", "kind", "words"),
    [
        (38, "good", "✔ Tuning beat prompting"),
        (20, "red", "✘ Tuning did not beat prompting"),
        (5, "red", "✘ Tuning did not beat prompting"),
        (None, "open", "? Not held against prompting"),
    ],
)
def test_the_verdict_has_a_colour_a_sign_and_words(tmp_path, tuned, kind, words):
    page = report.html(run_with(tmp_path, tuned))
    assert f'class="box verdict {kind}"' in page and f"<h3>{words}</h3>" in page
    assert ('"box verdict red"' in page) == (kind == "red")


def test_figures_examples_and_the_instruction_are_shown_and_escaped(tmp_path):
    page = report.html(run_with(tmp_path, 38))
    assert "50.0 %" in page and "95.0 %" in page and "+45.0 (" in page and "this decides" in page
    assert "2 training rows as examples (my.jsonl, line 7; my.jsonl, line 9)" in page
    assert "Answer &lt;b&gt;briefly&lt;/b&gt;." in page


def test_forgetting_is_amber_and_what_was_never_known_is_said(tmp_path):
    page = report.html(run_with(tmp_path, 38, FORGOT))
    assert 'class="box verdict amber"' in page and "⚠ Something was forgotten" in page
    assert "<b>⚠ worse</b>" in page and "not known before either" in page
    calm = {**FORGOT, "worse": False, "figures": [{**FORGOT["figures"][0], "verdict": "noise"}]}
    (tmp_path / "calm").mkdir()
    page = report.html(run_with(tmp_path / "calm", 38, calm))
    assert "verdict amber" not in page and "within chance" in page


def test_a_run_without_a_verdict_has_no_section(tmp_path):
    run = Run.create(tmp_path / "run", Recipe())
    assert 'id="gate"' not in report.html(run)
    run.write_json("summary.json", {"before": {}})
    assert 'id="gate"' not in report.html(run)


def test_remarks_stand_on_the_page_of_any_method(tmp_path):
    """An SFT of virtual tokens whose end token nothing has trained, and tokens that hardly move."""
    run = Run.create(tmp_path / "run", Recipe())
    assert "What happened to the model" not in report.html(run)
    fix = "--set model.chat_template=plain (ends answers with the end of text), or an adapter in the layers"
    run.write_json(
        "guard.json", [{"kind": "end_token", "severity": "warn", "text": "answers end with <x>.", "fix": fix}]
    )
    run.log(
        {"step": 5, "loss": 1.0, "remarks": [{"kind": "still", "severity": "warn", "text": "they rest.", "fix": ""}]}
    )
    page = report.html(run)
    assert "What happened to the model" in page and "The guard had 2 warnings. The training was not stopped." in page
    assert "The token that ends answers was never trained" in page and "Answers end with &lt;x&gt;." in page
    assert "model.chat_template=plain" in page and "The virtual tokens hardly train" in page and "step 5" in page

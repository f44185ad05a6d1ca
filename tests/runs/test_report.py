"""The report: one file, no network, no script, every figure in it, and a page for failed and unfinished runs."""

from __future__ import annotations

import re

import pytest
from pages import EVIL, Page, answer, check_commands

from tunelet.errors import TuneletError
from tunelet.evals.stats import wilson
from tunelet.recipe import Recipe
from tunelet.runs import charts, report, report_sides, report_words
from tunelet.runs.record import Run


@pytest.fixture
def run(tmp_path) -> Run:
    recipe = Recipe(name="demo")
    recipe.train.learning_rate = 1e-3
    run = Run.create(tmp_path / "run", recipe, {"train.learning_rate": "--set"})
    for side, good in (("before", 3), ("after", 187)):
        metrics = {
            name: wilson(good, 200).as_dict() for name in ("executed_match_en", "executed_match_ko", "stop_rate")
        }
        metrics["held_out_loss"] = {"value": 200 / good / 10, "low": 0.1, "high": 9.0, "n": 200}
        run.write_json(f"eval/{side}.json", {"metrics": metrics})
        rows = [
            answer(f"starter/{i}", "command", "en" if i % 2 else "ko", f"{side} {i} {EVIL}", i > 2) for i in range(30)
        ]
        run.write_jsonl(f"eval/{side}.jsonl", rows)
    run.log({"step": 0, "held_out_loss": 3.0})
    for step in range(1, 1001):
        run.log({"step": step, "loss": 3 / step, "learning_rate": 1e-3, "tokens_per_second": 9000})
    run.log({"step": 1000, "held_out_loss": 0.5})
    train = {"sources": ["chats.jsonl"], "rows_in": 1234, "held_out": 200, "dropped": {"no_answer": 34}, "rows": 1000}
    train |= {
        "tokens": 55555,
        "trained_tokens": 22222,
        "formats": {"messages": 1234},
        "sha256": {"chats.jsonl": "ab" * 32},
    }
    findings = {"findings": {"error": {"no_answer": 34}}, "first_findings": ["chats.jsonl, line 7: no answer"]}
    run.write_json(
        "data.json", {"train": train, "eval": {"rows": 200, "how": "by hash"}, "max_length": 256, **findings}
    )
    run.plan({"seconds": 100.0, "peak_mb": 800.0, "energy_wh": 1.0})
    run.actual({"seconds": 110.0, "peak_mb": 900.0, "energy_wh": 0.77})
    part = {"energy_wh": 0.77, "kind": "estimated", "seconds": 110.0}
    energy = {"method": "12 W", "co2_kind": "estimated", "co2_g": 0.37, "co2_method": "480 g/kWh"}
    run.write_json("energy.json", {**part, **energy, "parts": {"training": part, "after": part}})
    style = "<style>body{color:red}.tl-row{color:blue}</style><h1>x</h1>"
    rows = '<div class="tl-head">rows</div><div class="tl-row"><span class="t">trained words</span></div>'
    run.write_text("masks.html", f"{style}{rows}</html>")
    run.done()
    return run


def test_one_file_without_network_or_script(run):
    page = Page(report.write(run).read_text(encoding="utf-8"))
    loads = {"src", "href", "data", "action", "srcset", "poster", "xlink:href"}
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "img", "base"}
        assert not loads & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.style and "@import" not in page.style and "http" not in page.style
    assert "prefers-color-scheme:dark" in page.style and "@media print" in page.style
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in page.tags)
    assert "body{color:red}" not in page.style and ".tl-row{color:blue}" in page.style


def test_all_figures_stand_in_it(run):
    page = Page(report.html(run))
    figures = ["1.5 %", "93.5 %", "(0.5 % to 4.3 %)", "(89.2 % to 96.2 %)", "n = 200", "0.107", "6.667"]
    data = ["1,234", "1,000", "34", "no_answer", "55,555", "22,222", "ab" * 32, "chats.jsonl, line 7: no answer"]
    spent = ["1 min 50 s", "-9 %", "900 MB", "0.77 Wh", "Energy (estimated)", "CO2 (estimated)", "12 W"]
    other = [
        "trained words",
        "train.learning_rate",
        "--set",
        "0.001",
        "torch",
        "finished",
        EVIL,
        "3 of 30",
        "before 0",
        "after 29",
    ]
    for expected in figures + data + spent + other[:-1]:
        assert expected in page.text, expected
    for wh in re.finditer(r"\d Wh\b(.{0,15})", page.text):
        assert "estimated" in wh[1] or "Energy (estimated)" in page.text[: wh.start()][-60:]
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert any("before 1.5%" in label and "after 93.5%" in label for label in labels)
    assert any(label.startswith("Loss: training from 3 to 0.003") for label in labels)


def test_answers_stand_side_by_side_and_some_of_each_kind(run):
    told = report_sides.answers(report_sides.sides(run, []))
    assert len(told["pairs"]) == report_sides.SHOWN and len(told["wrong"]) == 3 and told["wrong_count"] == 3
    assert [side["title"] for side in told["pairs"][0]["sides"]] == ["before", "after"]
    assert {pair["kind"] for pair in told["pairs"]} == {"command en", "command ko"}


def test_a_tuning_without_comparisons_says_nothing_of_them(run):
    page = Page(report.html(run))
    assert "Supervised fine-tuning of starter on 1,000 rows of chats.jsonl: 1,000 steps in 1 min 50 s." in page.text
    for word in ("What happened", "guard", "preference", "at the start", "stage", "See also"):
        assert word not in page.text.split("Recipe")[0], word


@pytest.mark.parametrize("stage", ["created", "failed", "before only", "trained"])
def test_every_run_has_a_page(tmp_path, run, stage):
    bare = Run.create(tmp_path / "bare", Recipe(name="bare"))
    if stage == "failed":
        bare.failed(TuneletError("It broke.", why="<b>because</b>", fix="mend it"), step=3)
    elif stage == "before only":
        for name in ("eval/before.json", "eval/before.jsonl"):
            bare.write_text(name, (run.folder / name).read_text())
    elif stage == "trained":
        (bare.folder / "model").mkdir()
        bare.log({"step": 1, "loss": 2.0, "learning_rate": 1e-3, "tokens_per_second": 1})
        bare.done()
    page = Page(report.html(bare))
    if stage == "failed":
        assert "It broke." in page.text and "<b>because</b>" in page.text and "fix: mend it" in page.text
    assert ("tunelet train --resume" in page.text) == (stage in ("created", "failed"))
    assert ("tunelet align" in page.text and f"--out {bare.folder}" in page.text) == (stage == "before only")
    assert ("tunelet chat" in page.text) == (stage == "trained")


def test_commands_of_what_next_are_commands(run):
    bad = wilson(3, 200).as_dict()
    for step, loss in ((300, 0.1), (400, 0.9)):
        run.log({"step": step, "held_out_loss": loss})
    for recipe in (Recipe(), Recipe.model_validate({"data": {"train": ["chats.jsonl"]}})):
        for metrics in ({}, {"stop_rate": bad}):
            told = report_words.following(run, recipe, [], metrics)
            assert len(told) >= 4
            for _, commands in told:
                check_commands(commands)


def test_a_folder_with_a_space_is_quoted(tmp_path):
    run = Run.create(tmp_path / "my run", Recipe(name="bare"))
    ((_, line),) = report_words.following(run, run.recipe(), [], {})
    assert line == f"tunelet train --resume '{run.folder}'"


def test_ticks_and_numbers():
    assert charts.ticks(0, 3) == [0, 1, 2, 3]
    assert charts.ticks(0, 1e-3) == [0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001]
    assert charts.ticks(2, 2)[0] <= 2 <= charts.ticks(2, 2)[-1] and charts.ticks(0, 0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert [charts.number(x) for x in (0, 1200, 0.25, 3e-5, 2e6, 12.5, 1.0)] == [
        "0",
        "1,200",
        "0.25",
        "3e-5",
        "2e6",
        "12.5",
        "1",
    ]
    points = charts.thin([(float(x), float(x % 2)) for x in range(10_001)])
    assert len(points) <= charts.POINTS and points[-1] == (10_000.0, 0.0)
    assert charts.curves("none", [charts.Curve("a", [])]) is None
    assert charts.curves("nan", [charts.Curve("a", [(1, float("nan")), (2, 1.0)])]) is None
    one = charts.curves("one", [charts.Curve("a", [(0, 1.0)], dots=True)])
    assert one is not None and "nan" not in str(one.svg)


def test_whiskers_stay_inside():
    found = {"value": 0.0, "low": -0.1, "high": 0.5, "n": 3}
    svg = str(charts.whiskers("a < b", [("before", "at <start>", found), ("after", "later", None)]))
    assert 'x1="0.00%"' in svg and 'x2="50.00%"' in svg and "a &lt; b: at &lt;start&gt;" in svg and "later" not in svg
    three = [(key, key, found) for key in ("before", "between", "after")]
    heights = [int(re.search(r'height="(\d+)"', str(charts.whiskers("a", three[:many])))[1]) for many in (2, 3)]
    assert heights == [32, 46]
    places = [int(y) for y in re.findall(r'cy="(\d+)"', str(charts.whiskers("a", three)))]
    assert places == [9, 23, 37]


def test_marks_stand_where_something_was_said():
    line = charts.Curve("a", [(0, 1.0), (10, 2.0)])
    marks = [charts.Mark(5, "warn", "b < c"), charts.Mark(10, "stop", "d"), charts.Mark(99, "warn", "outside")]
    chart = charts.curves("one", [line], marks=marks)
    assert chart.marks == ["warn", "stop"] and "outside" not in chart.svg
    assert '<line class="mark warn" x1="50.00" x2="50.00"' in chart.svg and "<title>b &lt; c</title>" in chart.svg
    assert "a from 1 to 2 at step 10; at step 5: b &lt; c; at step 10: d" in chart.svg

"""The report: one file, no network, no script, every figure in it, and a page for failed and unfinished runs."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from tunelet.errors import TuneletError
from tunelet.evals.stats import wilson
from tunelet.recipe import Recipe
from tunelet.runs import charts, report
from tunelet.runs.record import Run

EVIL = "<script>alert(1)</script><img src='http://evil.example/x.png'>"
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.style = ""
        self.feed(text)
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.words.append(data)


def answer(item, kind, language, text, right):
    return {
        "item": item, "type": kind, "language": language, "messages": [{"role": "user", "content": f"ask {item}"}],
        "expected": "{}", "answer": text, "stopped": right, "tokens": 7, "executed": right, "exact": right,
        "refused": False, "problem": "" if right else "not JSON",
    }  # fmt: skip


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
    told = report._answers(run)
    assert len(told["pairs"]) == report.SHOWN and len(told["wrong"]) == 3 and told["wrong_count"] == 3
    assert [side["side"] for side in told["pairs"][0]["sides"]] == ["before", "after"]
    assert {pair["kind"] for pair in told["pairs"]} == {"command en", "command ko"}


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
    assert ("tunelet train --resume" in page.text) == (stage != "trained")
    assert ("tunelet chat" in page.text) == (stage == "trained")


def test_commands_of_what_next_are_commands(run):
    """Every command the page advises is one the command line takes: its verb exists and knows the options."""
    import shlex

    from typer.main import get_command

    from tunelet.cli import app

    run.recipe()
    bad = wilson(3, 200).as_dict()
    for step, loss in ((300, 0.1), (400, 0.9)):
        run.log({"step": step, "held_out_loss": loss})
    for recipe in (Recipe(), Recipe.model_validate({"data": {"train": ["chats.jsonl"]}})):
        for metrics in ({}, {"stop_rate": bad}):
            for _, commands in report._next(run, recipe, metrics):
                for line in commands.splitlines():
                    words = shlex.split(line)
                    assert words.pop(0) == "tunelet"
                    command = get_command(app)
                    while words and words[0] in getattr(command, "commands", {}):
                        command = command.commands[words.pop(0)]
                    assert not getattr(command, "commands", None), line
                    known = {option for parameter in command.params for option in parameter.opts}
                    assert {word for word in words if word.startswith("--")} <= known, line


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
    svg = str(charts.whiskers("a < b", {"value": 0.0, "low": -0.1, "high": 0.5, "n": 3}, None))
    assert 'x1="0.00%"' in svg and 'x2="50.00%"' in svg and "a &lt; b" in svg and "after" not in svg

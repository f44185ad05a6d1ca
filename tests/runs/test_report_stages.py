"""The report of an alignment in stages: three sides, links to the earlier pages, what all of it took."""

from __future__ import annotations

import pytest
from pages import Page, check_commands, measure, recipe_of

from tunelet.runs import report, report_sides, report_words
from tunelet.runs.record import STAGES, Run


def took(run: Run, steps: int, seconds: float, wh: float, mb: float, kind: str = "estimated") -> None:
    told = {"energy_wh": wh, "kind": kind, "seconds": seconds}
    energy = {"method": "12 W", "co2_kind": "estimated", "co2_g": 0.1, "co2_method": "480 g/kWh"}
    run.write_json("energy.json", {**told, **energy, "parts": {"training": told}})
    run.done(steps=steps, seconds=seconds / 2, peak_mb=mb, held_out_loss=0.5)


@pytest.fixture
def whole(tmp_path) -> Run:
    """SFT, then DPO; figures of the result are as good as done."""
    first = Run.create(tmp_path / "whole" / STAGES / "1-sft", recipe_of("sft"))
    measure(first, "before", {"executed_match_en": 2, "invented_rate": 200, "stop_rate": 10})
    measure(first, "after", {"executed_match_en": 180, "invented_rate": 150, "stop_rate": 190})
    took(first, 280, 100.0, 0.5, 2000.0)
    report.write(first)
    model = {"path": str(first.folder)}
    run = Run.create(tmp_path / "whole", recipe_of("dpo", model=model, train={"max_steps": 60}))
    for name in ("json", "jsonl"):
        run.write_text(f"eval/before.{name}", (first.folder / f"eval/after.{name}").read_text())
    (run.folder / "model").mkdir()
    return run


@pytest.fixture
def finished(whole) -> Run:
    right = {"executed_match_en": 190, "invented_rate": 20, "stop_rate": 200, "preference_accuracy": 198}
    measure(whole, "after", right | {"preference_accuracy_per_token": 196})
    took(whole, 60, 20.0, 0.25, 2500.0)
    return whole


def test_three_sides(finished):
    page = Page(report.html(finished))
    for title, *values in (
        ("Commands that do what was asked, English", "1.0 %", "90.0 %", "95.0 %"),
        ("Confirmations invented or rambling (less is better)", "100.0 %", "75.0 %", "10.0 %"),
    ):
        at = page.text.index(title, page.text.index("Before and after"))
        figures = page.text[at : at + 200]
        assert [figures.index(value) for value in values] == sorted(figures.index(value) for value in values)
    labels = [found["aria-label"] for tag, found in page.tags if found.get("class") == "whiskers"]
    assert any(
        "at the start 1.0% (" in one and "after SFT 90.0% (" in one and "after DPO 95.0%" in one for one in labels
    )
    assert any(one.startswith("Better answer found more probable, per token: after DPO 98.0%") for one in labels)


def test_cards_are_those_of_a_comparison(finished):
    sides = report_sides.sides(finished, report_sides.earlier(finished))
    cards = report_sides.cards(sides, "dpo")
    assert [card["title"] for card in cards] == [
        "Better answer found more probable, per token", "Confirmations invented or rambling",
        "Commands that do what was asked, English", "Answers that end by themselves",
    ]  # fmt: skip
    assert cards[1]["value"] == "10.0 %" and cards[1]["was"] == ["at the start: 100.0 %", "after SFT: 75.0 %"]
    assert cards[0]["was"] == []


def test_answers_of_all_three_stand_side_by_side(finished):
    told = report_sides.answers(report_sides.sides(finished, report_sides.earlier(finished)))
    sides = told["pairs"][0]["sides"]
    assert [(one["title"], one["answer"]) for one in sides] == [
        ("at the start", "sft before"), ("after SFT", "sft after"), ("after DPO", "dpo after")
    ]  # fmt: skip
    assert "The same prompts at the start, after SFT and after DPO" in Page(report.html(finished)).text


def test_earlier_pages_are_linked(finished):
    page = Page(report.write(finished).read_text(encoding="utf-8"))
    links = {found["href"] for tag, found in page.tags if tag == "a"}
    assert links == {"stages/1-sft/report.html"} and (finished.folder / links.pop()).is_file()
    first = Run(finished.folder / STAGES / "1-sft")
    (up,) = [found["href"] for tag, found in Page(report.html(first)).tags if tag == "a"]
    assert (first.folder / up).resolve() == (finished.folder / "report.html").resolve()


def test_what_all_stages_took(finished):
    page = Page(report.html(finished))
    for line in (
        "1. SFT 280 1 min 40 s 2,000 MB 0.5 Wh (estimated)",
        "2. DPO 60 20 s 2,500 MB 0.25 Wh (estimated)",
        "all of it 340 2 min 00 s 2,500 MB 0.75 Wh (estimated)",
    ):
        assert line in page.text, line


def test_one_measured_stage_does_not_make_a_measured_sum(finished):
    took(Run(finished.folder / STAGES / "1-sft"), 280, 100.0, 0.5, 2000.0, kind="measured")
    text = Page(report.html(finished)).text
    assert "0.5 Wh (measured)" in text and "0.75 Wh (estimated)" in text


def test_sentence_and_commands_name_the_stages(finished):
    stages = report_sides.earlier(finished)
    said = report_words.sentence(finished, finished.recipe(), stages)
    assert said == "Direct preference optimisation (DPO) of the result of stage 1 (SFT): 0 steps."
    lines = [line for _, line in report_words.following(finished, finished.recipe(), stages, {})]
    before = stages[0].folder
    assert f"tunelet eval {finished.folder} --task preference --against {before}" in lines
    assert f"tunelet compare {before} {finished.folder}" in lines
    for line in lines:
        check_commands(line)


def test_an_unfinished_last_stage_shows_what_there_is(whole):
    (whole.folder / "model").rmdir()
    page = Page(report.html(whole))
    assert "unfinished" in page.text and "Nothing has been evaluated yet." in page.text
    assert "at the start" in page.text and "after SFT" in page.text and "after DPO" not in page.text
    assert "shown: after SFT" in page.text
    assert f"tunelet align RECIPE --out {whole.folder}" in page.text and "--resume" not in page.text
    assert "2. DPO - - - -" in page.text and "all of it 280 1 min 40 s" in page.text


def test_an_unfinished_first_stage_names_the_whole(tmp_path):
    run = Run.create(tmp_path / "whole" / STAGES / "1-sft", recipe_of("sft"))
    ((_, line),) = report_words.following(run, run.recipe(), [], {})
    assert line == f"tunelet align RECIPE --out {tmp_path / 'whole'}"


def test_stages_stand_in_their_order(tmp_path):
    for name in ("10-kto", "2-dpo", "1-sft"):
        Run.create(tmp_path / "run" / STAGES / name, recipe_of(name.partition("-")[2]))
    (tmp_path / "run" / STAGES / "notes-of-mine").mkdir()
    run = Run.create(tmp_path / "run", recipe_of("simpo"))
    assert [one.folder.name for one in report_sides.earlier(run)] == ["1-sft", "2-dpo", "10-kto"]
    measure(run, "before", {"stop_rate": 1})
    assert [side.title for side in report_sides.sides(run, report_sides.earlier(run))] == ["after KTO"]
    assert "stage 3: KTO" in Page(report.html(run)).text

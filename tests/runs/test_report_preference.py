"""The report of a run that compared answers: what the guard said and what to try, the figures of the weights that were
saved, and the charts there are data for."""

from __future__ import annotations

import pytest
from pages import EVIL, Page, check_commands, recipe_of

from tunelet.runs import report, report_preference, report_words
from tunelet.runs.record import Run

SLOWER = "--set train.learning_rate=6.7e-04"
RATE = {"kind": "learning_rate", "severity": "warn", "text": f"train.learning_rate is above {EVIL}",
        "fix": "--set train.learning_rate=4e-05"}  # fmt: skip
FALLS = {"kind": "chosen_falls", "severity": "warn", "text": "the chosen answers have become less probable.",
         "fix": f"--set method.rpo_alpha=1 (keeps the chosen answers' probability up), or {SLOWER}"}  # fmt: skip
DRIFT = {"kind": "drift", "severity": "stop", "text": "the model has moved away from its start.",
         "fix": f"{SLOWER}, or fewer steps, or --set method.beta=0.3"}  # fmt: skip
STOPS = {"kind": "stops", "severity": "warn", "text": "fewer answers end by themselves.",
         "fix": f"{SLOWER}; look at the pairs: are they cut off? (tunelet data doctor --want preference)"}  # fmt: skip


def evaluation(step: int, *remarks, **figures) -> dict:
    row = {
        "step": step,
        "held_out_loss": 0.7 - step / 100,
        "held_out/rewards/chosen": -0.1 * step,
        "held_out/rewards/rejected": -0.3 * step,
        "held_out/rewards/margins": 0.2 * step,
        "held_out/rewards/accuracies": min(1.0, 0.5 + step / 40),
        "held_out/logps/chosen": -0.5 - step / 100,
        "held_out/logps/rejected": -1.5 - step / 10,
        "watch/kl": step / 100,
        "watch/entropy": 0.2,
        "watch/stop_rate": 0.75 + step / 80,
        "watch/loops": 0.0,
        "watch/length": 20.0,
    }
    return row | figures | ({"remarks": list(remarks)} if remarks else {})


def made(tmp_path, *rows, method="dpo", before=(), done=None, **sections) -> Run:
    train = {"train": {"max_steps": 60, "learning_rate": 2e-3}}
    sections = {"model": {"path": "runs/chat"}, **train, **sections}
    recipe = recipe_of(**{"method": method, **sections})
    recipe.method.beta = recipe.method.beta or 0.1
    run = Run.create(tmp_path / "run", recipe)
    run.write_json("guard.json", list(before))
    side = {"sources": ["starter"], "rows_in": 600, "rows": 600}
    run.write_json("data.json", {"train": side, "eval": {"rows": 200, "how": "by hash"}})
    for row in rows:
        run.log(row)
    if done is not None:
        (run.folder / "model").mkdir()
        run.done(**done)
    return run


@pytest.fixture
def stopped(tmp_path) -> Run:
    """Warned before the training and at step 6, stopped at step 18; the weights of step 12 were kept."""
    rows = [evaluation(0), evaluation(6, FALLS), evaluation(12), evaluation(18, FALLS | {"severity": "stop"}, DRIFT)]
    ended = {"steps": 18, "held_out_loss": rows[2]["held_out_loss"], "stopped": "chosen_falls"}
    return made(tmp_path, *rows, before=[RATE], done=ended)


def charts_of(run: Run) -> dict[str, str]:
    told = report_preference.happened(run, run.recipe())
    return {chart.title: str(chart.svg) for chart in told.charts}


def test_a_run_that_was_stopped_tells_why_and_what_to_try(stopped):
    told = report_preference.happened(stopped, stopped.recipe())
    assert told.stopped == 18
    assert told.verdict == (
        "The guard stopped the training at step 18 of 60. The better answers are being unlearned too. The model has "
        "drifted from its start. The saved model is that of step 12, the last evaluation before."
    )
    assert [(one.when, one.severity) for one in told.remarks] == [
        ("before the training", "warn"), ("step 6", "warn"), ("step 18", "stop"), ("step 18", "stop")
    ]  # fmt: skip
    base = f"tunelet train --recipe {stopped.folder}/recipe.toml --set"
    rate, falls, again, drift = told.remarks
    assert rate.tries == [("", f"{base} train.learning_rate=4e-05 --out OTHER")]
    assert falls.tries == [
        ("keeps the chosen answers' probability up", f"{base} method.rpo_alpha=1 --out OTHER"),
        ("", f"{base} train.learning_rate=6.7e-04 --out OTHER"),
    ]
    assert falls.text == "The chosen answers have become less probable." and rate.text.startswith("train.learning_rate")
    assert again.tries == [] and again.others == ["as above"]
    assert drift.tries == [("", f"{base} method.beta=0.3 --out OTHER")]
    assert drift.others == ["as above", "fewer steps"]
    for one in told.remarks:
        for _, line in one.tries:
            check_commands(line)
            assert "--set" in line


def test_the_page_of_a_stopped_run(stopped):
    text = report.html(stopped)
    page = Page(text)
    assert EVIL in page.text and EVIL not in text  # escaped
    assert "stopped by the guard at step 18" in page.text and ("a", "#happened") in [
        (tag, found.get("href")) for tag, found in page.tags
    ]
    assert "Try next (keeps the chosen answers' probability up):" in page.text and "Or: as above, or fewer steps." in (
        page.text
    )
    said = page.text.index("What happened to the model")
    places = [page.text.index(word, said) for word in ("(before the training)", "(step 6)", "(step 18)")]
    assert places == sorted(places)
    assert "warning" in page.text and "stopped" in page.text


def test_figures_are_those_of_the_weights_that_were_saved(stopped):
    told = report_preference.happened(stopped, stopped.recipe())
    assert told.figures == (
        "From the start to step 12: preference accuracy on 200 held-out pairs from 50.0 % to 80.0 %; log-probability "
        "per token of the chosen answers from -0.500 to -0.620; of the rejected ones from -1.500 to -2.700; distance "
        "from the start 0.120 nats per token; answers that stop by themselves from 75.0 % to 90.0 %."
    )
    assert "gains since the start" in told.note


def test_charts_mark_where_remarks_were_made(stopped):
    found = charts_of(stopped)
    assert list(found) == [
        "Log-probability per token, held-out answers",
        "Rewards, held-out answers",
        "Preference accuracy, %",
        "Distance from the start, nats per token (KL, estimated)",
    ]
    for svg in found.values():
        assert svg.count('class="mark warn"') == 1 and svg.count('class="mark stop"') == 1
        assert "at step 6: The better answers are being unlearned too" in svg
    assert "margin from 0 to 3.6 at step 18" in found["Rewards, held-out answers"]
    assert "held out from 50 to 95 at step 18" in found["Preference accuracy, %"]


def test_where_nothing_went_wrong_figures_say_so(tmp_path):
    rows = [evaluation(0), {"step": 10, "loss": 0.6, "rewards/accuracies": 0.7, "kl": 0.1},
            {"step": 20, "loss": 0.5, "rewards/accuracies": 0.9, "kl": 0.2}, evaluation(20)]  # fmt: skip
    run = made(tmp_path, *rows, done={"held_out_loss": rows[-1]["held_out_loss"]})
    told = report_preference.happened(run, run.recipe())
    assert told.verdict == "Nothing that the guard looks for went wrong." and told.stopped is None
    assert told.figures.startswith("From the start to step 20: preference accuracy on 200 held-out pairs from 50.0 %")
    assert "training from 70 to 90 at step 20" in charts_of(run)["Preference accuracy, %"]
    page = Page(report.html(run))
    assert "stopped by the guard" not in page.text and told.verdict in page.text


@pytest.mark.parametrize(
    ("rows", "sections", "done", "verdict"),
    [
        ([], {}, None, "Nothing has been evaluated yet."),
        ([], {}, {}, "No rows were held out, so that nothing could be looked at (data.eval, data.eval_fraction)."),
        ([evaluation(0)], {}, None, "Nothing has been evaluated since the start."),
        ([evaluation(0), evaluation(5, FALLS)], {}, None, "The guard had 1 warning. The training was not stopped."),
        (
            [evaluation(0), evaluation(5)],
            {"method": {"name": "dpo", "guard": "off"}},
            {"held_out_loss": 0.65},
            "The guard was off (method.guard), so that nobody looked whether the model was being damaged.",
        ),
        (
            [evaluation(0), evaluation(5, DRIFT)],
            {},
            {"held_out_loss": 0.7},
            "The guard stopped the training at step 5 of 60. The model has drifted from its start. The saved model is "
            "the one it started from: no later one was sound.",
        ),
        (
            [evaluation(0), evaluation(5, DRIFT)],
            {},
            None,
            "The guard stopped the training at step 5 of 60. The model has drifted from its start.",
        ),
    ],
)
def test_every_run_has_a_verdict(tmp_path, rows, sections, done, verdict):
    run = made(tmp_path, *rows, done=done, **sections)
    assert report_preference.happened(run, run.recipe()).verdict == verdict
    assert verdict in Page(report.html(run)).text


def test_orpo_shows_the_parts_of_its_loss(tmp_path):
    rows = [evaluation(step, **{"held_out/nll_loss": 2.0 - step, "held_out/odds_loss": 0.3}) for step in (0, 1)]
    run = made(tmp_path, *rows, method="orpo", done={"held_out_loss": rows[-1]["held_out_loss"]})
    found = charts_of(run)["The loss's parts, held-out answers (odds: before the weight of 0.1)"]
    assert "NLL from 2 to 1 at step 1; odds from 0.3 to 0.3" in found
    assert "meant to go far" in report_preference.happened(run, run.recipe()).note


def test_kto_has_good_and_bad_answers_and_neither_margin_nor_accuracy(tmp_path):
    left_out = ("margins", "accuracies")
    rows = [
        {key: value for key, value in evaluation(step).items() if not key.endswith(left_out)} | {"kl": 0.1 * step}
        for step in (0, 5)
    ]
    run = made(tmp_path, *rows, method="kto", done={"held_out_loss": rows[-1]["held_out_loss"]})
    found = charts_of(run)
    assert list(found) == [
        "Log-probability per token, held-out answers", "Rewards, held-out answers",
        "Distance from the start, nats per token (KL, estimated)", "KTO's reference point, nats per answer",
    ]  # fmt: skip
    assert "good from" in found["Rewards, held-out answers"] and "margin" not in found["Rewards, held-out answers"]
    told = report_preference.happened(run, run.recipe())
    assert "accuracy" not in told.figures and "of the good answers from" in told.figures and told.note == ""
    assert "answers with a verdict" in Page(report.html(run)).text


def test_without_held_out_rows_the_training_is_drawn(tmp_path):
    rows = [{"step": step, "loss": 1.0, "rewards/chosen": 0.1 * step, "rewards/rejected": 0.0} for step in (1, 2)]
    run = made(tmp_path, *rows, done={})
    assert list(charts_of(run)) == ["Rewards, in training"]


def test_data_to_look_at_is_named(tmp_path):
    data = {"train": ["pairs one.jsonl"], "eval": ["kept.jsonl"]}
    run = made(tmp_path, evaluation(0), evaluation(6, STOPS), data=data)
    (told,) = report_preference.happened(run, run.recipe()).remarks
    assert told.tries[1] == (
        "look at the pairs: are they cut off?", "tunelet data doctor 'pairs one.jsonl' --want preference"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "dpo", "beta": 0.1}, "Direct preference optimisation (DPO, beta 0.1)"),
        (
            {"name": "dpo", "beta": 5.0, "loss_type": "sigmoid_norm", "rpo_alpha": 0.2},
            "Direct preference optimisation (DPO, loss sigmoid_norm, beta 5, rpo_alpha 0.2)",
        ),
        ({"name": "orpo", "beta": 0.1}, "Odds ratio preference optimisation (ORPO, beta 0.1)"),
        ({"name": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
         "Simple preference optimisation (SimPO, beta 2, gamma 1)"),
        ({"name": "kto", "beta": 0.1}, "Kahneman-Tversky optimisation (KTO, beta 0.1)"),
        ({"name": "dpo"}, "Direct preference optimisation (DPO)"),
    ],
)  # fmt: skip
def test_methods_are_named(method, said):
    assert report_words.method(recipe_of(method)) == said


def test_what_next_fits_a_comparison_of_answers(tmp_path):
    data = {"train": ["pairs.jsonl"], "eval": ["kept.jsonl"]}
    for folder, sections, rows in (("a", {}, ""), ("b", {"data": data}, "--data kept.jsonl --judge JUDGE_MODEL ")):
        run = made(tmp_path / folder, evaluation(0), evaluation(5), done={"held_out_loss": 0.65}, **sections)
        lines = [line for _, line in report_words.following(run, run.recipe(), [], {})]
        assert f"tunelet eval {run.folder} --task preference {rows}--against runs/chat" in lines
        assert f"tunelet compare {run.folder} OTHER" in lines
        for line in lines:
            check_commands(line)

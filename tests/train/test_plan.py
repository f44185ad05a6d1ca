"""The prediction of a training after its first steps: written once, kept, near the truth; none where it cannot be."""

from __future__ import annotations

import pytest
from rich.console import Console

from tunelet.models import load
from tunelet.models.device import Choice
from tunelet.recipe import Recipe
from tunelet.runs.record import PLAN_KEYS, Run
from tunelet.train.plan import Forecast
from tunelet.train.run import run_training

CPU = Choice("cpu", "bfloat16", 1)


class Row:
    def __init__(self, length):
        self.ids = [0] * length


@pytest.fixture
def model():
    shape = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32}
    return load.new_model({**shape, "num_attention_heads": 2}, 64, {}, 0, CPU)


def forecast(folder, model, total, **train):
    recipe = Recipe.model_validate({"model": {"path": ""}, "train": {"batch_size": 2, **train}})
    run = Run.open_or_create(folder, recipe)[0]
    return Forecast(recipe, run, model, [Row(10), Row(30)] * 10, CPU, total, "bfloat16"), run


def test_seconds_follow_tokens_steps_and_evaluations(tmp_path, model):
    made, run = forecast(tmp_path / "r", model, 100, eval_steps=30)
    with made:
        made.evaluation = 2.0
        made.step(1, 50.0, 40, 50.0)  # warming up: does not count
        for step, tokens in ((2, 80), (3, 20), (4, 40), (5, 20)):
            assert run.read_json("plan.json")["predicted"] is None
            made.step(step, 0.1 * tokens if step != 4 else 99.0, tokens, 70.0)  # 99 s: one hiccup
    told = run.read_json("plan.json")
    # 95 steps of 2 rows of 20 tokens at 0.1 s each, and evaluations at 30, 60, 90 and the end
    assert told["predicted"]["seconds"] == pytest.approx(70 + 95 * 40 * 0.1 + 4 * 2.0)
    assert set(told["predicted"]) == {"seconds", "peak_mb", "disk_mb", "energy_wh"}
    assert told["predicted"]["peak_mb"] > 50 and told["predicted"]["energy_wh"] > 0
    assert "5 steps of 100" in told["reason"]


def test_the_first_prediction_stays(tmp_path, model):
    first = {"seconds": 1.0, "peak_mb": 2.0, "disk_mb": 3.0, "energy_wh": 4.0}
    forecast(tmp_path / "r", model, 100)[1].plan(first)
    again, run = forecast(tmp_path / "r", model, 100)
    with again:
        for step in range(40, 60):
            again.step(step, 9.0, 10, 900.0)
    assert run.read_json("plan.json")["predicted"] == first


@pytest.mark.parametrize("total", [1, 2, 3, 4])
def test_short_trainings(tmp_path, model, total):
    """Told before the last step, or not at all: never after the fact."""
    made, run = forecast(tmp_path / "r", model, total)
    with made:
        for step in range(1, total + 1):
            made.step(step, 1.0, 40, float(step))
    told = run.read_json("plan.json")
    assert (told["predicted"] is not None) == (total > 2)
    assert told["predicted"] is None or told["predicted"]["seconds"] == pytest.approx(total)
    assert told["predicted"] is not None or "too few steps" in told["reason"]


def test_a_stop_writes_nothing(tmp_path, model):
    made, run = forecast(tmp_path / "r", model, 100)
    with pytest.raises(KeyboardInterrupt), made:
        made.step(1, 1.0, 40, 1.0)
        raise KeyboardInterrupt
    assert run.read_json("plan.json")["reason"] == "not predicted yet"


@pytest.mark.parametrize(("kind", "save_steps"), [("none", 0), ("none", 3), ("lora", 3)])
def test_predicted_and_actual_of_a_real_training(tiny_model_folder, tmp_path, kind, save_steps):
    text = tmp_path / "text.txt"
    text.write_text("The light in the kitchen is on at seven. " * 300, encoding="utf-8")
    recipe = Recipe.model_validate(
        {
            "method": "pretrain",
            "model": {"path": str(tiny_model_folder), "dtype": "float32", "threads": 1},
            "data": {"train": [str(text)], "max_length": 64, "eval_rows": 4},
            "train": {"max_steps": 30, "batch_size": 4, "learning_rate": 1e-3, "save_steps": save_steps},
            "adapter": {"kind": kind, "rank": 8},
        }
    )
    run = run_training(recipe, tmp_path / "run", console=Console(quiet=True))
    told = run.read_json("plan.json")
    predicted, actual = told["predicted"], told["actual"]
    assert set(predicted) == set(actual) == set(PLAN_KEYS) and all(actual.values())
    assert actual["seconds"] / 5 < predicted["seconds"] < actual["seconds"] * 5  # other work may share the machine
    assert predicted["peak_mb"] <= actual["peak_mb"] * 1.001
    real = sum(path.stat().st_size for path in run.folder.rglob("*.safetensors")) / 1e6
    assert predicted["disk_mb"] == pytest.approx(real, rel=0.15)  # headers weigh with so small a model
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "extrapolated after 5 steps of 30" in page and "off by" in page

"""align: one call from recipe to report; killed between or inside stages, the same call goes on and repeats nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tunelet import align as module
from tunelet.align import align
from tunelet.errors import TuneletError
from tunelet.recipe import Recipe
from tunelet.runs.record import Run

KEYS = {"before", "after_sft", "after", "seconds", "peak_mb", "energy_wh", "energy_kind", "run", "report"}


def quiet() -> Console:
    return Console(record=True, width=160, file=io.StringIO())


def own_data(folder: Path, rows: int = 24) -> Path:
    path = folder / "chats.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def recipe_of(model: Path, source: str, **more) -> Recipe:
    tree = {
        "name": "tiny",
        "model": {"path": str(model), "threads": 1, "dtype": "float32"},
        "data": {"train": [source], "limit": 40, "max_length": 128, "eval_rows": 6, "eval_fraction": 0.25},
        "train": {"batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "log_steps": 1, "save_steps": 2},
        "eval": {"items": 3, "max_new_tokens": 6, "prompts": ["안녕?"]},
    }
    for key, value in more.items():
        tree[key] = {**tree.get(key, {}), **value}
    return Recipe.model_validate(tree)


def test_own_data_from_recipe_to_report(tmp_path, tiny_model_folder):
    console = quiet()
    out = tmp_path / "run"
    recipe = recipe_of(tiny_model_folder, str(own_data(tmp_path)))
    summary = align(recipe, out, console, origins={"data.train": "--data"})
    assert set(summary) >= KEYS
    assert summary["energy_kind"] in ("measured", "estimated") and summary["energy_wh"] > 0
    assert summary["seconds"] > 0 and summary["peak_mb"] > 50
    for side in ("before", "after_sft", "after"):
        assert set(summary[side]) == {"held_out_loss", "stop_rate"}
        for figure in summary[side].values():
            assert figure["low"] <= figure["value"] <= figure["high"] and figure["n"] > 0
    assert summary["after"]["held_out_loss"]["value"] < summary["before"]["held_out_loss"]["value"]
    run = Run.open(out)
    assert run.status == "finished"
    names = "recipe.toml resolved.toml env.json data.json plan.json log.jsonl masks.html energy.json model report.html"
    for name in names.split():
        assert (out / name).exists(), name
    assert json.loads((out / "summary.json").read_text())["after"] == summary["after"]
    answers = [json.loads(line) for line in (out / "eval" / "after.jsonl").read_text().splitlines()]
    assert answers[0]["messages"][0]["content"] == "안녕?" and len(answers) == 7
    lines = [line for line in console.export_text().splitlines() if line.strip()]
    assert lines[-1].strip() == f"Report: {out / 'report.html'}"
    assert any("held-out loss" in line for line in lines) and any(
        f"({summary['energy_kind']})" in line for line in lines
    )
    # once more: shown, not done again
    log = (out / "log.jsonl").read_bytes()
    assert align(recipe, out, quiet())["after"] == summary["after"]
    assert (out / "log.jsonl").read_bytes() == log


def test_starter_items_are_graded(tmp_path, tiny_model_folder):
    summary = align(recipe_of(tiny_model_folder, "starter", data={"max_length": 500}), tmp_path / "run", quiet())
    assert set(summary["after"]) >= {
        "executed_match_en",
        "executed_match_ko",
        "stop_rate",
        "refusal_false",
        "held_out_loss",
    }
    assert summary["before"]["executed_match_en"]["n"] == 3
    rows = [json.loads(line) for line in (tmp_path / "run/eval/before.jsonl").read_text().splitlines()]
    assert {row["type"] for row in rows} >= {"command", "prompt"}


@pytest.mark.parametrize("stage", ["before", "training", "after", "finish"])
def test_the_same_call_goes_on_after_a_kill(tmp_path, tiny_model_folder, monkeypatch, stage):
    recipe = recipe_of(tiny_model_folder, str(own_data(tmp_path)))
    whole = align(recipe, tmp_path / "whole", quiet())
    calls: list[str] = []
    true = {"evaluate": module._evaluate, "finish": module._finish, "train": module.training.train_and_save}

    class Killed(KeyboardInterrupt):
        pass

    def evaluate(run, name, *rest):
        if name == stage:
            raise Killed
        calls.append(name)
        true["evaluate"](run, name, *rest)

    def train(*arguments):
        if stage == "training":
            raise Killed
        calls.append("training")
        return true["train"](*arguments)

    def finish(*arguments):
        if stage == "finish":
            raise Killed
        true["finish"](*arguments)

    monkeypatch.setattr(module, "_evaluate", evaluate)
    monkeypatch.setattr(module, "_finish", finish)
    monkeypatch.setattr(module.training, "train_and_save", train)
    out = tmp_path / "killed"
    with pytest.raises(Killed):
        align(recipe, out, quiet())
    assert Run.open(out).status == "unfinished"
    did, killed_at = list(calls), stage
    calls.clear()
    stage = "never"
    summary = align(recipe, out, quiet())
    order = ["before", "training", "after"]
    assert did + calls == order, (killed_at, did, calls)
    assert {side: summary[side] for side in ("before", "after")} == {side: whole[side] for side in ("before", "after")}
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (out, tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_bad_data_leaves_no_folder(tmp_path, tiny_model_folder):
    data = own_data(tmp_path)
    data.write_text(data.read_text() + '{"messages": [{"role": "user", "content": "alone"}]}\n{broken\n')
    with pytest.raises(TuneletError) as caught:
        align(recipe_of(tiny_model_folder, str(data)), tmp_path / "run", quiet())
    assert "line 25" in str(caught.value) and "line 26" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_another_recipe_in_the_folder_is_refused(tmp_path, tiny_model_folder):
    data = str(own_data(tmp_path))
    align(recipe_of(tiny_model_folder, data), tmp_path / "run", quiet())
    with pytest.raises(TuneletError, match="another recipe"):
        align(recipe_of(tiny_model_folder, data, train={"seed": 3}), tmp_path / "run", quiet())


def test_a_failure_is_recorded(tmp_path, tiny_model_folder, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(module, "_evaluate", broken)
    with pytest.raises(ZeroDivisionError):
        align(recipe_of(tiny_model_folder, str(own_data(tmp_path))), tmp_path / "run", quiet())
    run = Run.open(tmp_path / "run")
    assert run.status == "failed" and "a bug" in run.read_json("FAILED.json")["traceback"]


def test_lora_and_pretrain(tmp_path, tiny_model_folder):
    lora = recipe_of(tiny_model_folder, str(own_data(tmp_path)), adapter={"kind": "lora", "rank": 2})
    summary = align(lora, tmp_path / "lora", quiet())
    assert (tmp_path / "lora" / "adapter").is_dir() and summary["after"]["held_out_loss"]
    text = tmp_path / "text.txt"
    text.write_text("The light in the kitchen is on. " * 200, encoding="utf-8")
    tree = recipe_of(tiny_model_folder, str(text)).model_dump() | {"method": "pretrain"}
    tree["data"] |= {"max_length": 64}
    summary = align(Recipe.model_validate(tree), tmp_path / "text", quiet())
    assert set(summary["after"]) == {"held_out_loss"}

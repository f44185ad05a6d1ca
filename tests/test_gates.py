"""The gates of align: prompts of the start model asked once, on training rows' examples, resumed and not asked again;
what was forgotten; and the verdict in summary, terminal and page."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tunelet import align as module
from tunelet import gates, recipe_io, starter, sweep, sweep_grid
from tunelet.align import align
from tunelet.errors import TuneletError
from tunelet.recipe import Recipe
from tunelet.runs.record import Run
from tunelet.train.prepare import prepare

needs_base = pytest.mark.skipif(
    not (starter.BASE / "model.safetensors").is_file(), reason="the shipped base model is not here"
)


def console() -> Console:
    return Console(record=True, width=300, file=io.StringIO())


def recipe_of(model: Path | str, source: str, **more) -> Recipe:
    tree = {
        "model": {"path": str(model), "threads": 1, "dtype": "float32"},
        "data": {"train": [source], "limit": 80, "max_length": 256, "eval_rows": 12, "eval_fraction": 0.25},
        "train": {"batch_size": 8, "max_steps": 2, "learning_rate": 1e-3, "log_steps": 1},
        "eval": {"items": 20, "max_new_tokens": 24, "baseline_items": 10, "shots": 3},
    }
    for key, value in more.items():
        tree[key] = {**tree[key], **value}
    return Recipe.model_validate(tree)


def own_data(folder: Path, rows: int = 60) -> Path:
    path = folder / "chats.jsonl"
    made = [{"prompt": f"Say {n}.", "completion": "The kitchen light is off."} for n in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def rows_of(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / "eval" / f"{name}.jsonl").read_text().splitlines()]


def told_of(run: Path, name: str) -> dict:
    return json.loads((run / "eval" / f"{name}.json").read_text())


# -- the starter ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> tuple[Path, dict, str]:
    """An alignment of the shipped starter that hardly trains: its model answers as before."""
    if not (starter.BASE / "model.safetensors").is_file():
        pytest.skip("the shipped base model is not here")
    out, told = tmp_path_factory.mktemp("untrained") / "run", console()
    recipe = recipe_of("starter", "starter", train={"max_steps": 1, "learning_rate": 1e-9})
    return out, align(recipe, out, told), told.export_text()


def test_both_prompts_are_asked_of_the_start_model_on_the_items_of_before_and_after(untrained):
    out, summary, _ = untrained
    after = {row["item"]: row for row in rows_of(out, "after") if "executed" in row}
    for name in ("zero_shot", "few_shot"):
        told, rows = told_of(out, name), rows_of(out, name)
        assert told["metrics"]["executed_match_en"]["n"] == 10 < summary["after"]["executed_match_en"]["n"] == 20
        assert told["tried"] and told["layout"] and told["answers"] == len(rows) < len(after)
        assert {row["type"] for row in rows} == {row["type"] for row in after.values()}, "of each type a part"
        for row in rows:
            same = after[row["item"]]
            assert (row["messages"], row["expected"]) == (same["messages"], same["expected"])
    energy = json.loads((out / "energy.json").read_text())["parts"]
    assert energy["prompting"]["energy_wh"] > 0 and summary["seconds"] == pytest.approx(
        sum(part["seconds"] for part in energy.values())
    )


def test_examples_are_training_rows_named_by_file_and_row(untrained):
    out, _, _ = untrained
    prepared = prepare(Run(out).recipe())
    shots = told_of(out, "few_shot")["shots"]
    places = [(one["file"], *(value for key, value in one.items() if key != "file")) for one in shots]
    assert len(set(places)) == 3 and told_of(out, "zero_shot")["shots"] == []
    known = {(example.origin.file, example.origin.line) for example in prepared.train_examples}
    held = {(example.origin.file, example.origin.line) for example in prepared.eval_examples}
    assert set(places) <= known and not set(places) & held


def test_a_model_that_hardly_trained_does_not_beat_a_prompt(untrained):
    out, summary, shown = untrained
    gate = summary["gate"]
    assert gate["beats_prompting"] is False and gate["metric"] == "right"
    assert gate["difference"]["low"] <= 0 and gate["baseline"] > 0.3 > gate["tuned"]
    assert gate["text"].startswith("Tuning did not beat a") and gate["text"] in shown
    page = (out / "report.html").read_text()
    assert 'class="box verdict red"' in page and "✘ Tuning did not beat prompting" in page
    assert json.loads((out / "summary.json").read_text())["gate"] == gate


def test_nothing_is_forgotten_by_a_model_that_hardly_trained(untrained):
    out, summary, shown = untrained
    found = summary["gate"]["forgetting"]
    assert found["worse"] is False and found["text"] in shown
    assert {one["of"] for one in found["figures"]} == {"general", "home"}
    assert "verdict amber" not in (out / "report.html").read_text()


def test_a_model_that_is_ruined_forgot(tmp_path, untrained):
    """The general texts and times of the shipped base before, and after weights were noised."""
    out, _, _ = untrained
    noised = [
        {**row, "nll": row["nll"] * 2} if row["kind"] == "text" else {**row, "right": False}
        for row in rows_of(out, "after_general")
    ]
    ruined = Run.create(tmp_path / "ruined", Run(out).recipe())
    ruined.write_jsonl("eval/after_general.jsonl", noised)
    found = gates.verdict(Run(out), ruined)["forgetting"]
    assert found["worse"] is True and found["text"].startswith("Forgotten: ")


# -- data of one's own ------------------------------------------------------------------------------------------------


def test_own_data_is_compared_by_its_answers(tmp_path, tiny_model_folder):
    """Trained on one answer, the model finds it far more probable than with three examples before it."""
    recipe = recipe_of(tiny_model_folder, str(own_data(tmp_path)), train={"max_steps": 30, "learning_rate": 1e-2})
    told = console()
    gate = align(recipe, tmp_path / "run", told)["gate"]
    assert gate["beats_prompting"] is True and gate["difference"]["low"] > 0
    assert "Tuning beat a" in told.export_text()
    losses = {name: rows_of(tmp_path / "run", f"{name}_loss") for name in ("zero_shot", "few_shot", "after")}
    assert len({tuple(row["item"] for row in rows) for rows in losses.values()}) == 1
    assert len(losses["after"]) == 10, "eval.baseline_items of the 12 held-out rows"
    shots = told_of(tmp_path / "run", "few_shot")["shots"]
    asked = {f"Say {one['line'] - 1}." for one in shots}
    held = {row["messages"][-1]["content"] for row in rows_of(tmp_path / "run", "after")}
    assert len(asked) == 3 and not asked & held
    assert 'class="box verdict good"' in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize("at", ["zero_shot", "few_shot", "training"])
def test_killed_between_prompts_and_training_measures_nothing_again(tmp_path, tiny_model_folder, monkeypatch, at):
    recipe = recipe_of(tiny_model_folder, str(own_data(tmp_path)))
    whole = align(recipe, tmp_path / "whole", console())
    answers, train, did = gates._answers, module.training.train_and_save, []

    class Killed(KeyboardInterrupt):
        pass

    def asked(run, name, *rest):
        if name == at:
            raise Killed
        did.append(name)
        return answers(run, name, *rest)

    def trained(*arguments):
        if at == "training":
            raise Killed
        did.append("training")
        return train(*arguments)

    monkeypatch.setattr(gates, "_answers", asked)
    monkeypatch.setattr(module.training, "train_and_save", trained)
    with pytest.raises(Killed):
        align(recipe, tmp_path / "run", console())
    before = (tmp_path / "run/eval/before.json").stat().st_mtime_ns
    at = "never"
    summary = align(recipe, tmp_path / "run", console())
    assert did == ["zero_shot", "few_shot", "training"]
    assert (tmp_path / "run/eval/before.json").stat().st_mtime_ns == before
    assert summary["gate"] == whole["gate"]
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (tmp_path / "run", tmp_path / "whole")]
    assert weights[0] == weights[1]


def test_a_later_stage_is_held_against_the_first_ones_prompts(tmp_path, tiny_model_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"Is {n} on?", "chosen": f"It is {n}.", "rejected": "No!"} for n in range(16)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    Path("two.toml").write_text('method = "dpo"\n[data]\ntrain = ["pairs.jsonl"]\n[train]\nmax_steps = 1\n')
    recipe = recipe_of(tiny_model_folder, str(own_data(tmp_path)))
    recipe.then = ["two.toml"]
    gate = align(recipe, tmp_path / "run", console())["gate"]
    assert (tmp_path / "run/stages/1-sft/eval/few_shot.json").is_file()
    assert not (tmp_path / "run/eval/few_shot.json").exists(), "the start model is asked once"
    assert gate["beats_prompting"] is not None and gate["forgetting"]["figures"]
    assert "Should I tune at all?" in (tmp_path / "run/report.html").read_text()
    assert Run(tmp_path / "run").recipe().eval.shots == 3, "what was asked of the first holds for all"


def test_too_few_rows_for_the_examples_and_a_short_context_are_remarked(tmp_path, tiny_model_folder):
    long = tmp_path / "long.jsonl"
    text = "the kitchen light is on " * 12
    rows = [{"prompt": f"{n} {text}", "completion": "It is."} for n in range(40)]
    long.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_of(tiny_model_folder, str(long), data={"max_length": 512}, eval={"shots": 20})
    remarks = align(recipe, tmp_path / "run", console())["gate"]["remarks"]
    assert any("room for fewer than 20 examples" in remark for remark in remarks)
    few = recipe_of(tiny_model_folder, str(own_data(tmp_path, 8)), eval={"shots": 20})
    remarks = align(few, tmp_path / "few", console())["gate"]["remarks"]
    assert any("training rows can be shown as examples" in remark for remark in remarks)


def test_data_without_answers_has_no_verdict(tmp_path, tiny_model_folder):
    text = tmp_path / "text.txt"
    text.write_text("The light in the kitchen is on. " * 200)
    recipe = recipe_of(tiny_model_folder, str(text), data={"max_length": 64})
    recipe.method.name = "pretrain"
    gate = align(recipe, tmp_path / "run", console())["gate"]
    assert gate["beats_prompting"] is None and "no answers" in gate["text"] and gate["forgetting"]["figures"]


# -- the recipe's keys ------------------------------------------------------------------------------------------------


def test_every_key_changes_what_is_measured(tmp_path, tiny_model_folder):
    data = str(own_data(tmp_path))

    def run(name: str, **keys) -> Path:
        align(recipe_of(tiny_model_folder, data, eval=keys), tmp_path / name, console())
        return tmp_path / name

    plain = run("plain", instruction="Answer as the home would.", shots=2, baseline_items=5)
    assert len(told_of(plain, "few_shot")["shots"]) == 2 and len(rows_of(plain, "few_shot_loss")) == 5
    assert told_of(plain, "zero_shot")["instruction"] == "Answer as the home would."
    without = run("without", baselines=False, forgetting=False)
    names = {path.name for path in (without / "eval").iterdir()}
    assert names == {"before.json", "before.jsonl", "after.json", "after.jsonl"}
    gate = json.loads((without / "summary.json").read_text())["gate"]
    assert gate["beats_prompting"] is None and gate["text"] == "Not held against prompting: eval.baselines is off."
    assert gate["forgetting"]["worse"] is None and gate["forgetting"]["text"] == ""


@pytest.mark.parametrize("key", ["shots=3", "baseline_items=7", "instruction=Hi"])
def test_a_key_without_effect_is_refused(key):
    with pytest.raises(TuneletError, match="has no effect"):
        recipe_io.load(sets=["eval.baselines=false", f"eval.{key}"])
    assert recipe_io.load(sets=[f"eval.{key}"]).recipe.eval.baselines


@pytest.mark.parametrize("bad", ["shots=0", "baseline_items=0", "baselines=perhaps", "forgetting=2"])
def test_bad_values_are_refused(bad):
    with pytest.raises(TuneletError, match=f"eval.{bad.partition('=')[0]}"):
        recipe_io.load(sets=[f"eval.{bad}"])


def test_a_sweep_asks_no_prompts_unless_told_to():
    cells = sweep_grid.make(None, ["train.seed=1,2", "eval.shots=3"]).cells
    recipe, origins = sweep.unprompted(cells[0])
    assert not recipe.eval.baselines and recipe.eval.shots == 5 and recipe.eval.forgetting
    assert origins["eval.baselines"] == "off in a sweep" and cells[0].recipe.eval.baselines
    asked = sweep_grid.make(None, ["train.seed=1,2", "eval.shots=3", "eval.baselines=true"]).cells[0]
    assert sweep.unprompted(asked)[0] == asked.recipe

"""align with `then`: one stage goes on from the other, the last one's folder is the result, nothing is done twice, and
mistakes of later stages are found before the first one trains."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from tunelet import align as module
from tunelet import cli, stages
from tunelet.align import align
from tunelet.commands import common
from tunelet.errors import TuneletError
from tunelet.recipe_io import load
from tunelet.runs.record import Run, is_run
from tunelet.train import step

METRICS = {"held_out_loss", "stop_rate", "preference_accuracy", "preference_accuracy_per_token"}


def console() -> Console:
    return Console(record=True, width=200, file=io.StringIO())


def lines(rows: list) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def pairs(count: int = 16) -> list[dict[str, str]]:
    return [{"prompt": f"Is {n} on?", "chosen": f"It is {n}.", "rejected": f"No! {n}"} for n in range(count)]


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_model_folder) -> Path:
    """A folder with data, a recipe and those that go on from it. The first names its model and how it computes."""
    chats = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(16)]
    (tmp_path / "chats.jsonl").write_text(lines(chats))
    (tmp_path / "pairs.jsonl").write_text(lines(pairs()))
    common = "max_length = 128\neval_rows = 4\n[train]\nbatch_size = 4\nmax_steps = 4\nsave_steps = 2\nlog_steps = 1\n"
    common += "learning_rate = 1e-3\n[eval]\nmax_new_tokens = 4\n"
    for name, then, method, data in (
        ("one", '["two.toml"]', "sft", "chats"),
        ("two", "[]", "dpo", "pairs"),
        ("three", "[]", "kto", "pairs"),
    ):
        model = f'[model]\npath = "{tiny_model_folder}"\nthreads = 1\ndtype = "float32"\n' if name == "one" else ""
        text = f'name = "{name}"\nthen = {then}\nmethod = "{method}"\n{model}[data]\ntrain = ["{data}.jsonl"]\n{common}'
        (tmp_path / f"{name}.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rewrite(file: str, old: str, new: str) -> None:
    text = Path(file).read_text()
    assert old in text
    Path(file).write_text(text.replace(old, new))


def run_align(out: Path | str, recipe: str = "one.toml", told: Console | None = None) -> dict:
    loaded = load(recipe)
    return align(loaded.recipe, out, told or console(), origins=loaded.origins)


def weights(run: Path) -> dict:
    return load_file(run / "model" / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(value.equal(b[name]) for name, value in a.items())


def measured(run: Path, name: str) -> dict:
    return json.loads((run / "eval" / f"{name}.json").read_text())["metrics"]


# -- the whole of it --------------------------------------------------------------------------------------------------


def test_three_stages_from_recipe_to_report(place):
    rewrite("one.toml", '["two.toml"]', '["two.toml", "three.toml"]')
    told, out = console(), place / "out"
    summary = run_align(out, told=told)
    first, second = out / "stages" / "1-sft", out / "stages" / "2-dpo"
    folders = [first, second, out]
    assert all(is_run(folder) and Run(folder).status == "finished" for folder in folders)
    assert sorted(path.name for path in (out / "stages").iterdir()) == ["1-sft", "2-dpo"]
    recipes = [Run(folder).recipe() for folder in folders]
    assert [made.method.name for made in recipes] == ["sft", "dpo", "kto"] == summary["stages"]
    assert [Path(made.model.path) for made in recipes[1:]] == [first, second]
    assert [made.then for made in recipes] == [[], [], []] and {made.name for made in recipes} == {"one"}
    assert {(made.model.dtype, made.model.threads) for made in recipes} == {("float32", 1)}, "asked of the first"
    tuned = [weights(folder) for folder in folders]
    assert not same(tuned[0], tuned[1]) and not same(tuned[1], tuned[2]), "each is the model of its stage"
    # each begins where the one before ended, and is measured on the same rows
    for before, after in itertools.pairwise(folders):
        assert measured(after, "before") == measured(before, "after")
        assert (after / "eval" / "before.jsonl").read_text() == (before / "eval" / "after.jsonl").read_text()
        held = next(row for row in Run(after).log_rows() if "held_out_loss" in row)
        assert abs(held["held_out/rewards/chosen"]) < 1e-4, "the reference is the result of the stage before"
    assert set(summary) >= {
        "before",
        "after_sft",
        "after",
        "seconds",
        "peak_mb",
        "energy_wh",
        "stages",
        "run",
        "report",
    }
    assert summary["before"] == measured(first, "before")
    assert summary["after_sft"] == measured(first, "after") and summary["after"] == measured(out, "after")
    for side in ("before", "after_sft", "after"):
        assert set(summary[side]) == METRICS, "the pairs of the second stage are looked at from the start on"
    assert len({summary[side]["held_out_loss"]["n"] for side in ("before", "after_sft", "after")}) == 1
    assert len({summary[side]["held_out_loss"]["value"] for side in ("before", "after_sft", "after")}) == 3
    assert summary["run"] == str(out) and summary == json.loads((out / "summary.json").read_text())
    spent = [json.loads((folder / "energy.json").read_text())["seconds"] for folder in folders]
    assert summary["seconds"] == pytest.approx(sum(spent))
    shown = told.export_text()
    for number, method in enumerate(("sft", "dpo", "kto"), 1):
        assert f"Stage {number} of 3: {method}" in shown
    assert "after SFT" in shown and f"Report: {out / 'report.html'}" in shown
    # once more: shown, not done again
    log = [(folder / "log.jsonl").read_bytes() for folder in folders]
    assert run_align(out)["after"] == summary["after"]
    assert [(folder / "log.jsonl").read_bytes() for folder in folders] == log


def test_names_are_found_beside_the_recipe_and_among_the_shipped_ones(place):
    below = place / "below"
    below.mkdir()
    for name in ("one", "two"):
        (place / f"{name}.toml").rename(below / f"{name}.toml")
    rewrite("below/one.toml", '["two.toml"]', '["two.toml", "starter-dpo.toml"]')
    loaded = load("below/one.toml")
    todo = stages.of(loaded.recipe, loaded.origins, Path("out"))
    assert [stage.recipe.method.name for stage in todo] == ["sft", "dpo", "dpo"]
    assert [stage.recipe.data.train for stage in todo] == [["chats.jsonl"], ["pairs.jsonl"], ["starter"]]
    assert [str(stage.folder) for stage in todo] == ["out/stages/1-sft", "out/stages/2-dpo", "out"]


def test_what_a_later_stage_says_for_itself_holds(place):
    (place / "mine.jinja").write_text("x")
    rewrite("one.toml", 'dtype = "float32"', 'dtype = "float32"\nchat_template = "mine.jinja"')
    rewrite("two.toml", "[data]", '[model]\ndtype = "bfloat16"\n[data]')
    loaded = load("one.toml", sets=["model.threads=3"])
    first, second = stages.of(loaded.recipe, loaded.origins, Path("out"))
    assert (first.recipe.model.dtype, second.recipe.model.dtype) == ("float32", "bfloat16")
    assert second.recipe.model.threads == 3 and second.recipe.model.chat_template == "mine.jinja"
    assert second.recipe.model.path == "out/stages/1-sft"
    assert loaded.recipe.then, "the recipe that was given stays as it is"


# -- killed, and called again -----------------------------------------------------------------------------------------


class Killed(KeyboardInterrupt):
    pass


@pytest.fixture
def watched(monkeypatch):
    """What is done, in turn, as METHOD:WHAT; at `watched.at` it is killed before that is done."""

    class Watched:
        did: list[str] = []  # noqa: RUF012
        at = ""

        def note(self, what: str) -> None:
            if what == self.at:
                raise Killed
            self.did.append(what)

    seen = Watched()
    seen.did = []
    true = {"evaluate": module._evaluate, "finish": module._finish, "step": step.Stepper.__call__}

    def evaluate(run, name, *rest):
        seen.note(f"{run.recipe().method.name}:{name}")
        true["evaluate"](run, name, *rest)

    def finish(before, run, *rest):
        which = run if isinstance(run, Run) else before
        seen.note(f"{which.recipe().method.name}:finish")
        true["finish"](before, run, *rest)

    def one_step(self, rows, number, total):
        seen.note(f"{self.recipe.method.name}:step {number}")
        return true["step"](self, rows, number, total)

    monkeypatch.setattr(module, "_evaluate", evaluate)
    monkeypatch.setattr(module, "_finish", finish)
    monkeypatch.setattr(step.Stepper, "__call__", one_step)
    return seen


ALL = ["sft:before", *(f"sft:step {n}" for n in range(4)), "sft:after", "sft:finish"]
ALL += [*(f"dpo:step {n}" for n in range(4)), "dpo:after", "dpo:finish"]


KILLS = ["sft:before", "sft:step 2", "sft:finish", "dpo:step 0", "dpo:step 2", "dpo:after", "dpo:finish"]


def test_killed_anywhere_and_called_again_repeats_nothing(place, watched):
    """Killed in each stage, each time it is called again, behind a checkpoint."""
    whole = run_align("whole")
    assert watched.did == ALL
    watched.did = []
    for at in KILLS:
        watched.at = at
        with pytest.raises(Killed):
            run_align("killed")
        assert watched.did == ALL[: ALL.index(at)]
    watched.at = ""
    summary = run_align("killed")
    assert watched.did == ALL
    for side in ("before", "after_sft", "after"):
        assert summary[side] == whole[side], side
    for folder in (".", "stages/1-sft"):
        assert same(weights(Path("killed") / folder), weights(Path("whole") / folder))


def test_the_same_command_goes_on_in_the_same_folder(place, watched, capsys):
    for at, where in (("sft:step 2", "runs/one/stages/1-sft"), ("dpo:step 2", "runs/one"), ("dpo:finish", "runs/one")):
        watched.at = at
        assert cli.main(["align", "one.toml"]) == 130
        watched.at = ""
        assert str(stages.unfinished(load("one.toml").recipe, Path("runs/one")).folder) == where
    assert cli.main(["align", "one.toml"]) == 0
    assert [path.name for path in Path("runs").iterdir()] == ["one"] and Run(Path("runs/one")).status == "finished"
    assert watched.did == ALL
    told = capsys.readouterr().out
    assert "Going on with the unfinished run in runs/one/stages/1-sft" in told
    assert told.count("Going on with the unfinished run in runs/one\n") == 2
    assert stages.unfinished(load("one.toml").recipe, Path("runs/one")) is None
    quiet, changed = console(), load("one.toml").recipe
    assert common.choose_out(None, changed, quiet) == Path("runs/one-2"), "it is finished"
    rewrite("two.toml", "max_steps = 4", "max_steps = 1")
    assert common.choose_out(None, changed, quiet) == Path("runs/one-2"), "another second stage is another run"


def test_a_folder_that_was_moved_is_still_the_same_run(place, watched):
    watched.at = "dpo:step 2"
    with pytest.raises(Killed):
        run_align("out")
    watched.at = ""
    Path("out").rename("moved")
    summary = run_align("moved")
    assert watched.did == ALL
    Path("moved").rename("again")
    assert run_align(place / "again")["after"] == summary["after"]
    assert watched.did == ALL, "nothing is done again"


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["bad row", "no file", "wrong kind"])
def test_bad_data_of_the_second_stage_is_found_before_the_first_trains(place, what, watched, capsys):
    if what == "bad row":
        Path("pairs.jsonl").write_text(lines([*pairs(), {"prompt": "Hm?", "chosen": "Yes."}]))
    elif what == "no file":
        Path("pairs.jsonl").unlink()
    else:
        Path("pairs.jsonl").write_text(Path("chats.jsonl").read_text())
    assert cli.main(["align", "one.toml", "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert "pairs.jsonl" in err and err.strip().splitlines()[-1].startswith("fix: ")
    assert what != "bad row" or "pairs.jsonl, line 17" in err
    assert not Path("out").exists() and watched.did == []


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("one.toml", "two.toml", "twoo.toml", "twoo.toml: there is no such recipe file"),
        ("two.toml", "then = []", 'then = ["three.toml"]', "has a `then` of its own"),
        ("two.toml", "max_steps", "max_stepz", "max_stepz"),
        ("two.toml", "[data]", "[data", "two.toml, line"),
    ],
)
def test_mistakes_in_recipes_are_told_before_anything(place, file, old, new, told, watched, capsys):
    rewrite(file, old, new)
    for arguments in (["--out", "out"], []):
        assert cli.main(["align", "one.toml", *arguments]) == 2
        err = capsys.readouterr().err
        assert told in err and err.strip().splitlines()[-1].startswith("fix: ") and "Traceback" not in err
    assert not Path("out").exists() and not Path("runs").exists() and watched.did == []


def test_a_mistake_that_shows_late_costs_nothing_of_what_was_trained(place, watched, capsys):
    """A GPU that is not there is noticed where the second stage begins: the first stays, and is not trained again."""
    rewrite("two.toml", "[data]", '[model]\ndevice = "cuda"\n[data]')
    monkey = pytest.MonkeyPatch()
    monkey.setattr("torch.cuda.is_available", lambda: False)
    try:
        assert cli.main(["align", "one.toml"]) == 2
    finally:
        monkey.undo()
    assert "cuda" in capsys.readouterr().err
    assert Run(Path("runs/one/stages/1-sft")).status == "finished"
    assert sorted(path.name for path in Path("runs/one").iterdir()) == ["stages"]
    rewrite("two.toml", '[model]\ndevice = "cuda"\n', "")
    assert cli.main(["align", "one.toml"]) == 0
    assert watched.did == ALL and [path.name for path in Path("runs").iterdir()] == ["one"]


def test_a_mistake_in_the_first_stage_leaves_no_folder(place, watched, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(["align", "one.toml", "--set", "model.device=cuda"]) == 2
    assert not Path("runs/one").exists() and "cuda" in capsys.readouterr().err


def test_train_takes_the_first_alone_and_says_so(place, watched, capsys):
    assert cli.main(["train", "--recipe", "one.toml", "--out", "out"]) == 0
    told = capsys.readouterr().out
    assert "Only one.toml is trained" in told and "tunelet align" in told
    assert watched.did == [f"sft:step {n}" for n in range(4)] and not Path("out/stages").exists()
    assert Run(Path("out")).recipe().then == []
    with pytest.raises(TuneletError, match="of another recipe"):
        run_align("out")

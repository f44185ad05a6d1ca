"""`tunelet compare`: what runs were and reached, tests of the items that both answered, and what is said first."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tunelet import cli
from tunelet.align import align
from tunelet.recipe import Recipe
from tunelet.runs import compare
from tunelet.runs.record import Run
from tunelet.train.run import run_training


def quiet() -> Console:
    return Console(record=True, width=160, file=io.StringIO())


def recipe_of(model: Path, source: Path, **more) -> Recipe:
    tree = {
        "name": "tiny",
        "model": {"path": str(model), "threads": 1, "dtype": "float32"},
        "data": {"train": [str(source)], "max_length": 128, "eval_rows": 6, "eval_fraction": 0.25},
        "train": {"batch_size": 4, "max_steps": 3, "learning_rate": 1e-3, "log_steps": 1},
        "eval": {"max_new_tokens": 4},
    }
    for key, value in more.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return Recipe.model_validate(tree)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model_folder) -> Path:
    """A folder of runs: one and two (align, two at another learning rate), three (dpo on pairs, from one; train)."""
    folder = tmp_path_factory.mktemp("runs")
    chats, pairs = folder / "chats.jsonl", folder / "pairs.jsonl"
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"No, {n} it is not."} for n in range(24)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    said = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    chats.write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")
    align(recipe_of(tiny_model_folder, chats), folder / "one", quiet())
    align(recipe_of(tiny_model_folder, chats, train={"learning_rate": 2e-3}), folder / "two", quiet())
    dpo = recipe_of(folder / "one", pairs, method={"name": "dpo", "beta": 0.2}, train={"max_steps": 2})
    run_training(dpo, folder / "three", console=quiet())
    return folder


def run(capsys, *args) -> tuple[int, str, str]:
    code = cli.main(["compare", *map(str, args)])
    told = capsys.readouterr()
    return code, told.out, told.err


def figures(capsys, *args) -> dict:
    code, out, err = run(capsys, *args, "--json", "-")
    assert code == 0, err
    return json.loads(out)


def test_two_runs_that_differ_in_one_setting(capsys, runs):
    told = figures(capsys, runs / "one", runs / "two")
    assert told["names"] == ["one", "two"] and told["cautions"] == []
    assert told["settings"] == {"train.learning_rate": [1e-3, 2e-3]}
    one = told["runs"][0]
    done = json.loads((runs / "one" / "DONE").read_text())
    assert (one["held_out_loss"], one["tokens"], one["peak_mb"]) == (
        done["held_out_loss"], done["tokens"], done["peak_mb"],
    )  # fmt: skip
    assert one["trained"][0]["steps"] == 3 and one["trained"][0]["seconds"] == done["seconds"]
    assert one["metrics"] == json.loads((runs / "one/eval/after.json").read_text())["metrics"]
    assert one["parameters_trained"] == 32 * (400 + 2 * (3 * 64 + 2 * 32 + 2 * 16 + 2) + 1)
    tests = told["tests"]["two"]
    assert [test["metric"] for test in tests] == ["stop_rate"] and tests[0]["n"] == 6
    code, out, _ = run(capsys, runs / "one", runs / "two")
    assert code == 0 and "answers that end" in out and "Within noise" in out


def test_another_method_from_one_of_them(capsys, runs):
    told = figures(capsys, runs / "two", runs / "three")
    said = " ".join(told["cautions"])
    assert told["cautions"][0].startswith("They were trained on different data") and "pairs.jsonl" in said
    assert "two: sft 3 steps of 4; three: sft 3 steps of 4, then dpo 2 steps of 4" in said
    assert "held-out loss and rewards of its own" in said and "start from different" not in said
    three = told["runs"][1]
    assert (three["method"], three["loss_type"], three["beta"]) == ("dpo", "sigmoid", 0.2)
    assert three["starts_from"] == told["runs"][0]["starts_from"] and len(three["trained"]) == 2
    assert {"held_out/rewards/accuracies", "held_out/rewards/margins"} <= set(three["held_out"])
    assert {"watch/kl", "watch/stop_rate"} <= set(three["watch"])
    assert three["metrics"] == {} and told["tests"]["three"] == []
    code, out, _ = run(capsys, runs / "two", runs / "three")
    lines = out.splitlines()
    assert code == 0 and lines[0] == told["cautions"][0], "what keeps them apart is said before any figure"
    assert "none of the same items" in out and "time, with what came before" in out


def copied(runs: Path, folder: Path, name: str, **judged) -> Path:
    """A copy of run one that has answered 40 commands, graded as told."""
    Path(shutil.copytree(runs / "one", folder / name))
    rows = [
        {
            "item": f"starter/{n}", "type": "command", "language": "en", "expected": "x", "stopped": True,
            "messages": [{"role": "user", "content": f"Request {n}"}], "exact": False, "refused": False,
            **{key: n < most for key, most in judged.items()},
        }
        for n in range(40)
    ]  # fmt: skip
    run = Run.open(folder / name)
    run.write_jsonl("eval/after.jsonl", rows)
    from tunelet.evals import starter

    run.write_json("eval/after.json", {"metrics": starter.count(rows)})
    return folder / name


def test_a_difference_that_is_none_of_chance(capsys, runs, tmp_path):
    folders = [copied(runs, tmp_path, name, executed=most) for name, most in (("a", 10), ("b", 30), ("c", 12))]
    told = figures(capsys, *folders)
    tests = {name: {test["metric"]: test for test in of} for name, of in told["tests"].items()}
    better, noise = (tests[name]["executed_match_en"] for name in "bc")
    assert (better["only_first"], better["only_second"], better["p"]) == (0, 20, 2 / 2**20)
    assert better["p_holm"] == pytest.approx(8 * 2 / 2**20), "corrected over all tests of the command"
    assert better["verdict"] == "better" and noise["verdict"] == "noise"
    assert better["difference"]["value"] == 0.5 and better["difference"]["low"] > 0.3
    assert better["needed"] < 40 < noise["needed"]
    code, out, _ = run(capsys, *folders)
    assert code == 0
    assert "b is better than a in: commands done as asked, English." in out
    assert "+50.0 (" in out and "20 : 0" in out and "<0.001" in out
    after = out[out.index("c against a") :]
    assert "better" not in after and "commands done as asked, English" in after[after.index("Within noise") :]


@pytest.mark.parametrize("count", [2, 3])
def test_tables_fit_80_columns(capsys, runs, tmp_path, monkeypatch, count):
    folders = [copied(runs, tmp_path, name, executed=most) for name, most in (("a", 10), ("b", 30), ("c", 12))]
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, *folders[:count])
    table = [line for line in out.splitlines() if not line.startswith(("b is", "Within", "gained"))]
    assert max(map(len, table)) <= 80
    head = next(line for line in table if line.split() == list("abc")[:count])
    assert head.rstrip().endswith("abc"[count - 1]), "the last column is not cut away"
    assert "held-out loss of the method" in out


def test_remarks_and_stops_are_told(capsys, runs, tmp_path):
    first, second = copied(runs, tmp_path, "a", executed=3), copied(runs, tmp_path, "b", executed=3)
    run_b = Run.open(second)
    remark = {"kind": "drift", "severity": "stop", "text": "the model has moved away.", "fix": "fewer steps"}
    done = run_b.read_json("DONE")
    kept, worse = {"held_out/x": 0.5, "watch/kl": 0.1}, {"held_out/x": 9.0, "watch/kl": 7.0}
    run_b.log({"step": 4, "held_out_loss": 1.25, **kept})
    run_b.log({"step": 5, "held_out_loss": 8.5, **worse, "remarks": [remark]})
    run_b.write_json("DONE", {**done, "held_out_loss": 1.25, "stopped": "drift"})
    told = figures(capsys, first, second)["runs"][1]
    assert told["remarks"] == [remark] and told["stopped"] == "drift"
    assert told["held_out"] == {"held_out/x": 0.5} and told["watch"] == {"watch/kl": 0.1}, (
        "of the weights that were kept"
    )
    _, out, _ = run(capsys, first, second)
    assert "b: the model has moved away. Next: fewer steps" in out and "stopped by the guard" in out


def test_a_run_that_was_moved_still_knows_its_stages(runs, tmp_path):
    moved = Path(shutil.copytree(runs / "three", tmp_path / "moved"))
    shutil.copytree(runs / "one", moved / "stages" / "one")
    text = (moved / "resolved.toml").read_text().replace(str(runs / "one"), "gone/stages/one")
    (moved / "resolved.toml").write_text(text)
    assert [of["method"] for of in compare.facts(Run.open(moved))["trained"]] == ["sft", "dpo"]
    shutil.rmtree(moved / "stages")
    alone = compare.facts(Run.open(moved))
    assert [of["method"] for of in alone["trained"]] == ["dpo"] and alone["starts_from"] == "gone/stages/one"


def test_runs_of_one_name_are_told_apart(capsys, runs, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    folders = [Path(shutil.copytree(runs / "one", tmp_path / name / "one")) for name in "xy"]
    assert figures(capsys, *folders)["names"] == [str(folder) for folder in folders]


def test_help(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0 and "tunelet compare" in out and "McNemar" in out


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["ONE"], ["one run", "tunelet compare RUN_A RUN_B"]),
        (["ONE", "ONE"], ["given twice"]),
        (["ONE", "none/there"], ["none/there", "not a run", "there is no such folder"]),
        (["ONE", "MODEL"], ["not a run", "resolved.toml"]),
        (["ONE", "UNFINISHED"], ["unfinished", "goes on where it was"]),
        (["ONE", "FAILED"], ["failed", "the disk is full"]),
        (["ONE", "DAMAGED"], ["after.jsonl", "not valid JSON"]),
    ],
)
def test_mistakes(capsys, runs, tmp_path, tiny_model_folder, args, names):
    known = {"ONE": runs / "one", "MODEL": tiny_model_folder}
    for name in ("UNFINISHED", "FAILED", "DAMAGED"):
        known[name] = Path(shutil.copytree(runs / "two", tmp_path / name.lower()))
    for name in ("UNFINISHED", "FAILED"):
        (known[name] / "DONE").unlink()
    (known["FAILED"] / "FAILED.json").write_text('{"what": "the disk is full"}')
    (known["DAMAGED"] / "eval" / "after.jsonl").write_text('{"item": "cut\n')
    code, out, err = run(capsys, *(known.get(arg, arg) for arg in args))
    assert (code, out) == (2, "")
    assert all(name in err for name in names), err
    assert err.splitlines()[-1].startswith("fix: ")

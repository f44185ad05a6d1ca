"""The run directory survives kills, full disks and wrong folders, and never writes over what is not its own."""

from __future__ import annotations

import errno
import getpass
import json
import os
import tomllib
from pathlib import Path

import pytest

from tunelet.errors import TuneletError
from tunelet.recipe import Recipe
from tunelet.recipe_io import values
from tunelet.runs import files
from tunelet.runs.record import Run


def make_recipe(**train) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "t",
            "train": {"learning_rate": 1e-3, **train},
            "data": {"columns": {"prompt": "Q # x"}, "system": 'a "b"\n# c'},
        }
    )


ORIGINS = {"train.learning_rate": "recipe my.toml", "data.system": "--set"}


def test_create_writes_readable_files_and_opens_again(tmp_path):
    run = Run.create(tmp_path / "a" / "b", make_recipe(), ORIGINS)
    again = Run.open(run.folder)
    assert again.recipe() == make_recipe()
    origins = again.origins()
    assert origins["train.learning_rate"] == "recipe my.toml"
    assert origins["data.system"] == "--set"
    assert origins["name"] == "default" and origins["train.seed"] == "default"
    assert set(origins) == set(values(make_recipe()))
    asked = tomllib.loads((run.folder / "recipe.toml").read_text())
    assert asked["train"] == {"learning_rate": 1e-3}
    assert Recipe.model_validate(asked) == make_recipe()
    assert run.status == "unfinished"
    assert run.read_json("plan.json") == {"predicted": None, "actual": None, "reason": "not predicted yet"}


def test_env_names_versions_and_nothing_private(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_THING", "hunter2-hunter2")
    run = Run.create(tmp_path / "r", make_recipe())
    run.write_env({"device": "cpu", "dtype": "float32", "threads": 1, "reasons": {"device": "no GPU"}})
    text = (run.folder / "env.json").read_text()
    env = json.loads(text)
    assert env["packages"]["torch"] and env["cores"]["usable"] >= 1 and env["choice"]["device"] == "cpu"
    assert "hunter2" not in text and str(Path.home()) not in text.replace('"/"', "")
    user = getpass.getuser()
    assert len(user) < 5 or user not in text


def test_same_recipe_goes_on_and_another_is_refused(tmp_path):
    out = tmp_path / "r"
    run, there = Run.open_or_create(out, make_recipe(), ORIGINS)
    assert not there
    run.log({"step": 1})
    _, there = Run.open_or_create(out, make_recipe(), ORIGINS)
    assert there
    with pytest.raises(TuneletError, match="another recipe") as caught:
        Run.open_or_create(out, make_recipe(seed=7), ORIGINS)
    assert "train.seed: 0 there, 7 now" in caught.value.why
    assert run.log_rows() == [{"step": 1}]


def test_values_filled_in_for_the_model_do_not_make_another_recipe(tmp_path):
    asked = Recipe()
    filled = Recipe()
    filled.train.learning_rate = 3e-4
    run = Run.create(tmp_path / "r", filled, {"train.learning_rate": "default for sft, full, 135M parameters"})
    assert run.differences(asked) == []
    asked.train.learning_rate = 1e-3
    assert run.differences(asked) == [("train.learning_rate", 3e-4, 1e-3)]
    given = Run.create(tmp_path / "g", filled, {"train.learning_rate": "--set"})
    assert given.differences(Recipe()) == [("train.learning_rate", 3e-4, 0.0)]


def test_existing_things_are_never_written_over(tmp_path):
    Run.create(tmp_path / "r", make_recipe())
    with pytest.raises(TuneletError, match="already holds a run"):
        Run.create(tmp_path / "r", make_recipe())
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_text("x")
    with pytest.raises(TuneletError, match="not empty") as caught:
        Run.create(photos, make_recipe())
    assert "cat.jpg" in str(caught.value)
    assert [p.name for p in photos.iterdir()] == ["cat.jpg"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(TuneletError, match="is a file"):
        Run.create(tmp_path / "file", make_recipe())
    with pytest.raises(TuneletError, match="not a run"):
        Run.open(photos)
    with pytest.raises(TuneletError, match="folder is needed"):
        Run.create(tmp_path / "file" / "r", make_recipe())


def test_a_kill_at_the_very_start_leaves_a_folder_that_can_be_used(tmp_path):
    out = tmp_path / "r"
    out.mkdir()
    (out / ".tmp-resolved.toml").write_text("half")
    run, there = Run.open_or_create(out, make_recipe())
    assert not there and not list(out.glob(".tmp*"))
    for name in ("recipe.toml", "env.json", "plan.json"):  # killed after resolved.toml
        (run.folder / name).unlink()
    run, there = Run.open_or_create(out, make_recipe())
    assert there and all((out / name).exists() for name in ("recipe.toml", "env.json", "plan.json"))


def test_log_is_cut_back_to_a_step_and_forgives_a_half_line(tmp_path):
    run = Run.create(tmp_path / "r", make_recipe())
    run.log({"event": "start"})
    for step in range(1, 6):
        run.log({"step": step, "loss": 1 / step, "text": "한국어"})
    with (run.folder / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [row.get("step") for row in run.log_rows()] == [None, 1, 2, 3, 4, 5]
    run.truncate_log(3)
    run.log({"step": 4, "loss": float("nan")})
    rows = run.log_rows()
    assert [row.get("step") for row in rows] == [None, 1, 2, 3, 4]
    assert rows[-1]["loss"] is None and rows[1]["text"] == "한국어"
    (run.folder / "log.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(TuneletError, match="line 2"):
        run.log_rows()


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    run = Run.create(tmp_path / "r", make_recipe())
    run.write_json("eval/before.json", {"a": 1})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(TuneletError, match="Cannot write") as caught:
        run.write_json("eval/before.json", {"a": 2})
    assert "disk is full" in caught.value.why and str(caught.value).splitlines()[-1].startswith("fix:")
    assert run.read_json("eval/before.json") == {"a": 1}
    assert not list(run.folder.rglob(".tmp*"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_log_on_a_full_disk_is_a_clear_error(tmp_path):
    run = Run.create(tmp_path / "r", make_recipe())
    (run.folder / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(TuneletError, match=r"Cannot write .*log\.jsonl"):
        run.log({"step": 1})


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    (tmp_path / "ro").mkdir(mode=0o500)
    with pytest.raises(TuneletError, match="Cannot write"):
        Run.create(tmp_path / "ro" / "r", make_recipe())


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    run = Run.create(tmp_path / "r", make_recipe())
    assert run.model_folder() is None
    with pytest.raises(RuntimeError), run.folder_in_the_making("model") as folder:
        (folder / "config.json").write_text("half")
        raise RuntimeError("killed")
    assert run.model_folder() is None and not list(run.folder.glob(".tmp*"))
    for text in ("one", "two"):
        with run.folder_in_the_making("model") as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "w").write_text(text)
            assert (
                not (run.folder / "model" / "deep" / "w").exists() or (run.folder / "model/deep/w").read_text() == "one"
            )
    assert run.model_folder() == run.folder / "model"
    assert (run.folder / "model/deep/w").read_text() == "two" and not list(run.folder.glob(".tmp*"))


def test_plan_and_end(tmp_path):
    run = Run.create(tmp_path / "r", make_recipe())
    run.plan({"seconds": 10.0, "peak_mb": 100.0, "disk_mb": 1.0, "energy_wh": 0.1})
    run.actual({"seconds": 11.0, "peak_mb": 101.0})
    run.actual({"energy_wh": 0.2})
    plan = run.read_json("plan.json")
    assert plan["predicted"]["seconds"] == 10.0 and plan["actual"] == {
        "seconds": 11.0,
        "peak_mb": 101.0,
        "energy_wh": 0.2,
    }
    assert "reason" not in plan
    with pytest.raises(ValueError, match="minutes"):
        run.plan({"minutes": 1})
    run.failed(TuneletError("w", why="y", fix="f"), step=3)
    assert run.status == "failed" and run.read_json("FAILED.json")["fix"] == "f"
    try:
        raise ZeroDivisionError("in " + str(Path.home() / "x.py"))
    except ZeroDivisionError as error:
        run.failed(error)
    told = run.read_json("FAILED.json")
    assert "ZeroDivisionError" in told["traceback"] and str(Path.home() / "x.py") not in told["traceback"]
    run.done(seconds=3)
    assert run.status == "finished" and not (run.folder / "FAILED.json").exists()

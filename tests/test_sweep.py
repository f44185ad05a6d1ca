"""`tunelet sweep`: every cell an alignment, nothing finished is done twice, budgets and failures are said, one page."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import tunelet
from tunelet import cli, sweep_judge
from tunelet import sweep as module
from tunelet.errors import TuneletError
from tunelet.runs import sweep_page
from tunelet.runs.record import Run
from tunelet.sweep import seconds_of, sweep
from tunelet.sweep_grid import Grid, make
from tunelet.train.progress import Interrupted

RANKS = ["adapter.rank=2,4", "adapter.kind=lora"]


def quiet() -> Console:
    return Console(record=True, width=160, file=io.StringIO())


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_model_folder) -> Path:
    """A folder with chats and the recipe tiny.toml of a training of three steps."""
    rows = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(16)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.toml").write_text(
        f'name = "tiny"\n[model]\npath = "{tiny_model_folder}"\nthreads = 1\ndtype = "float32"\n'
        '[data]\ntrain = ["chats.jsonl"]\nmax_length = 128\neval_rows = 4\neval_fraction = 0.25\n'
        "[train]\nbatch_size = 4\nmax_steps = 3\nlog_steps = 1\n[eval]\nmax_new_tokens = 4\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def grid_of(*sets: str, **options) -> Grid:
    return make("tiny.toml", sets or RANKS, **options)


def command(*args: str) -> list[str]:
    return ["sweep", "tiny.toml", *(part for one in RANKS for part in ("--set", one)), *args]


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def states(told: dict) -> dict[str, str]:
    return {one["name"]: one["state"] for one in told["cells"]}


def test_a_grid_from_the_command_line(place, capsys):
    """All cells are aligned, told in sweep.json and in --json, shown, and put on a page; once more nothing is done."""
    assert cli.main(command("--json", "all.json")) == 0
    out = Path("runs/sweep-tiny")
    told = json.loads((out / "sweep.json").read_text())
    assert told == json.loads(Path("all.json").read_text())
    assert states(told) == {"rank-2": "finished", "rank-4": "finished", "full": "finished"}
    for one in told["cells"]:
        run = Run.open(out / one["folder"])
        figures, predicted = one["figures"], one["predicted"]
        assert run.status == "finished" and run.recipe().name == f"tiny: {one['name']}"
        assert figures["metrics"] == run.read_json("summary.json")["after"]
        assert figures["trained"] == predicted["trained"] and predicted["seconds"] > 0 < figures["training_seconds"]
        assert 0 < figures["cores"] < 2
        assert figures["adapter"] == (one["name"] != "full") and figures["size_mb"] > 0
    assert told["cells"][1]["figures"]["trained"] == 2 * told["cells"][0]["figures"]["trained"]
    assert told["cells"][2]["figures"]["share"] == 1.0 > told["cells"][1]["figures"]["share"] > 0
    assert list(told["metrics"]) == ["stop_rate", "held_out_loss"]
    said = capsys.readouterr().out
    assert "Predicted in all" in said and "cheapest cell runs first" in said
    lines = [line for line in said.splitlines() if line.startswith(("rank-2: rank 2", "full: "))]
    assert any("held-out loss" in line and "trained" in line for line in lines)
    assert said.splitlines()[-1] == f"Page: {out / 'sweep.html'}"
    page = (out / "sweep.html").read_text()
    for one in told["cells"]:
        assert f'href="{one["folder"]}/report.html"' in page and (out / one["folder"] / "report.html").exists()
    assert "http" not in page and "<script" not in page and page.count('class="dots"') == 4

    before = times(out / "cells")
    assert cli.main(command("--out", str(out))) == 0
    assert times(out / "cells") == before
    assert "Finished before: rank-2" in capsys.readouterr().out
    assert json.loads((out / "sweep.json").read_text())["cells"] == told["cells"]


def test_killed_after_the_first_cell_the_same_command_does_the_rest(place):
    env = {**os.environ, "PYTHONPATH": str(Path(tunelet.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
    argv = [sys.executable, "-m", "tunelet", *command()]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env=env) as process:
        for line in process.stdout:
            if line.startswith("Cell 2 of 3"):
                os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    out = place / "runs/sweep-tiny"
    told = module.read(out)
    first = next(one for one in told["cells"] if one["state"] == "finished")
    assert sorted(states(told).values()) == ["finished", "running", "waiting"]
    before = times(out / first["folder"])
    assert cli.main(command()) == 0  # finds the folder by itself
    assert times(out / first["folder"]) == before
    assert set(states(module.read(out)).values()) == {"finished"}
    assert not (place / "runs/sweep-tiny-2").exists()


class Quick:
    """Cells that are finished at once, in place of alignments: `order` is how they came, `trouble` what one raises, and
    `seconds` what is predicted of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.order: list[str] = []
        self.trouble: dict[str, BaseException] = {}
        self.seconds: dict[str, float] = {}
        monkeypatch.setattr(module, "align", self.align)
        monkeypatch.setattr(module, "predict", self.predict)
        monkeypatch.setattr(sweep_judge, "figures", lambda folder, predicted: figures_of(1000, 0.5))

    def align(self, recipe, out: Path, console, *, origins) -> None:
        self.order.append(out.name)
        if out.name in self.trouble:
            raise self.trouble[out.name]
        out.mkdir(parents=True)
        for name in ("resolved.toml", "DONE"):
            (out / name).write_text("")

    def predict(self, cells, out, console) -> None:
        for cell, one in cells:
            seconds = self.seconds.get(cell.name, 1.0)
            one["predicted"] = {"seconds": seconds, "peak_mb": 1, "disk_mb": 1, "trained": 1, "fits": True}


@pytest.fixture
def quick(monkeypatch) -> Quick:
    return Quick(monkeypatch)


@pytest.mark.parametrize("trouble", [KeyboardInterrupt(), Interrupted(Path("x"), 1, 3)])
def test_ctrl_c_says_how_to_go_on(place, quick, capsys, trouble):
    quick.trouble["rank-4"] = trouble
    assert cli.main(command("--no-full")) == 130
    said = capsys.readouterr().err
    assert "Stopped in cell rank-4" in said and "1 of 2 cells are finished" in said and "same command" in said
    assert states(module.read(Path("runs/sweep-tiny"))) == {"rank-2": "finished", "rank-4": "waiting"}


def test_a_cell_that_fails_leaves_the_others(place, quick, capsys):
    quick.trouble = {"rank-2": TuneletError("no luck", why="a test", fix="none"), "full": MemoryError()}
    assert cli.main(command()) == 1
    told = module.read(Path("runs/sweep-tiny"))
    assert states(told) == {"rank-2": "failed", "rank-4": "finished", "full": "failed"}
    assert "no luck" in told["cells"][0]["why"] and "no luck" in capsys.readouterr().out
    assert "no luck" in Path("runs/sweep-tiny/sweep.html").read_text()
    quick.trouble = {}
    assert cli.main(command()) == 0  # tried again, in the same folder
    assert quick.order == ["rank-2", "rank-4", "full", "rank-2", "full"]
    assert set(states(module.read(Path("runs/sweep-tiny"))).values()) == {"finished"}
    assert cli.main(command()) == 0  # a finished sweep is not taken up: this is another one
    assert Path("runs/sweep-tiny-2/sweep.json").exists()


def test_what_does_not_fit_the_budget_is_left_out_and_named(place, quick, capsys):
    quick.seconds = {"rank-2": 1e6, "rank-4": 2.0, "full": 1.0}
    assert cli.main(command("--budget", "30m")) == 0
    assert quick.order == ["full", "rank-4"]  # the cheapest first
    told = module.read(Path("runs/sweep-tiny"))
    assert states(told) == {"rank-2": "left out", "rank-4": "finished", "full": "finished"}
    # the evaluations of a finished cell take 10 s, which come on top
    assert re.fullmatch(r"predicted 277 h 46 min, (30 min 00|29 min \d\d) s left", told["cells"][0]["why"])
    assert "rank-2 left out: predicted" in capsys.readouterr().out
    assert cli.main(command()) == 0  # without a budget it is run, and the others are not
    assert quick.order == ["full", "rank-4", "rank-2"]


def test_what_evaluations_take_counts_once_it_is_known(place, quick):
    told = sweep(grid_of(full=False), place / "out", quiet(), budget=8.0)
    assert sorted(states(told).values()) == ["finished", "left out"]  # 1 s of training fits, and 10 s more do not


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("45m", 2700), ("2h", 7200), ("1h30m", 5400), ("1.5h", 5400), ("2H", 7200)]
)
def test_budgets(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "0m", "-5m", "5 minutes", "1d", "2h or so", "nan"])
def test_no_budgets(place, text, capsys):
    assert cli.main(command("--budget", text)) == 2
    assert "--budget" in capsys.readouterr().err and not Path("runs").exists()


def test_another_grid_is_refused_and_more_choices_are_taken(place, quick):
    out = place / "out"
    sweep(grid_of(full=False), out, quiet())
    before = times(out / "cells")
    with pytest.raises(TuneletError, match="another grid") as caught:
        sweep(grid_of("adapter.rank=4,8", "adapter.kind=lora", full=False), out, quiet())
    assert "rank-2" in str(caught.value)
    with pytest.raises(TuneletError, match="another grid"):  # the same names, another recipe
        sweep(grid_of(*RANKS, "train.seed=1", full=False), out, quiet())
    told = sweep(grid_of("adapter.rank=2,4,8", "adapter.kind=lora", full=False), out, quiet())
    assert states(told) == {"rank-2": "finished", "rank-4": "finished", "rank-8": "finished"}
    assert quick.order == ["rank-2", "rank-4", "rank-8"]
    after = times(out / "cells")
    assert {path: after[path] for path in before} == before


def test_a_finished_cell_that_is_gone_is_done_again(place, quick):
    sweep(grid_of(full=False), place / "out", quiet())
    shutil.rmtree(place / "out/cells/rank-2")
    assert set(states(sweep(grid_of(full=False), place / "out", quiet())).values()) == {"finished"}
    assert quick.order == ["rank-2", "rank-4", "rank-2"]


def test_a_folder_of_something_else_is_refused(place):
    (place / "mine").mkdir()
    (place / "mine/notes.txt").write_text("mine")
    with pytest.raises(TuneletError, match="not a sweep"):
        sweep(grid_of(), place / "mine", quiet())
    (place / "broken").mkdir()
    (place / "broken/sweep.json").write_text("{")
    with pytest.raises(TuneletError, match="not valid JSON"):
        sweep(grid_of(), place / "broken", quiet())


def test_data_is_prepared_once_unless_it_varies(place, monkeypatch):
    calls, true = [], module.training.looked_at
    monkeypatch.setattr(module.training, "looked_at", lambda recipe: calls.append(1) or true(recipe))
    for sets, prepared in ((RANKS, 1), (["data.limit=8,12"], 2)):
        calls.clear()
        grid = grid_of(*sets)
        fresh = [{"folder": f"cells/{cell.name}", "predicted": None} for cell in grid.cells]
        module.predict(list(zip(grid.cells, fresh, strict=True)), place / "out", quiet())
        assert len(calls) == prepared and all(one["predicted"]["seconds"] > 0 for one in fresh)


def test_bad_data_is_said_before_anything_is_trained(place, capsys):
    args = ["sweep", "tiny.toml", "--set", 'data.train=[["chats.jsonl"], ["nowhere.jsonl"]]']
    assert cli.main(args) == 2
    said = capsys.readouterr().err
    assert "cell train-nowhere.jsonl" in said and "nowhere.jsonl" in said and not Path("runs").exists()


def test_stages_go_through(place):
    pairs = [{"prompt": f"Is {n} on?", "chosen": f"It is {n}.", "rejected": f"No! {n}"} for n in range(16)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    text = (place / "tiny.toml").read_text()
    (place / "tiny.toml").write_text('then = ["two.toml"]\n' + text)
    (place / "two.toml").write_text(
        'method = "dpo"\n[data]\ntrain = ["pairs.jsonl"]\nmax_length = 128\neval_rows = 4\n'
        "[train]\nbatch_size = 4\nmax_steps = 2\nlearning_rate = 1e-4\n[eval]\nmax_new_tokens = 4\n"
    )
    told = sweep(grid_of("train.seed=1,2"), place / "out", quiet())
    assert set(states(told).values()) == {"finished"}
    one = told["cells"][0]
    folder = place / "out" / one["folder"]
    spent = [json.loads((of / "plan.json").read_text()) for of in (folder / "stages/1-sft", folder)]
    assert one["figures"]["training_seconds"] == pytest.approx(sum(of["actual"]["seconds"] for of in spent))
    assert one["predicted"]["seconds"] > max(of["predicted"]["seconds"] for of in spent) * 0.2
    assert list(told["metrics"]) == ["preference_accuracy", "stop_rate", "held_out_loss"]


# -- judging and drawing ----------------------------------------------------------------------------------------------


def figures_of(trained: int, value: float, width: float = 0.05, rows: str = "same") -> dict:
    """Figures of a finished cell, with ten seconds of evaluations. value: share of commands done."""
    interval = {"value": value, "low": max(0.0, value - width), "high": min(1.0, value + width), "n": 100}
    loss = {"value": 1 - value, "low": 0.9 - value, "high": 1.1 - value, "n": 50}
    return {
        "trained": trained, "share": trained / 1e6, "size_mb": trained * 4e-6, "training_seconds": trained / 100,
        "seconds": trained / 100 + 10, "cores": 1.0, "peak_mb": 900.0, "held_out_data": {"rows": rows},
        "metrics": {"executed_match_en": interval, "held_out_loss": loss},
    }  # fmt: skip


def made_up(*cells: tuple[str, dict, int, float], differ: bool = False) -> dict:
    """What sweep.json says of finished cells: (name, varied, trained parameters, share of commands done)."""
    told = {"dimensions": {"adapter.kind": ["lora", "none"], "adapter.rank": ["2", "8"]}, "notes": [], "cells": []}
    for name, varied, trained, value in cells:
        figures = figures_of(trained, value, rows=name if differ else "same")
        told["cells"].append(
            {
                "name": name,
                "folder": f"cells/{name}",
                "varied": varied,
                "state": "finished",
                "why": "",
                "figures": figures,
            }
        )
    return told | {"metrics": sweep_judge.metrics(told), "verdicts": sweep_judge.verdicts(told)}


def lora(rank: int, value: float) -> tuple[str, dict, int, float]:
    return f"rank-{rank}", {"adapter.kind": "lora", "adapter.rank": rank}, 1000 * rank, value


def test_the_best_is_marked_and_ties_are_said():
    told = made_up(lora(2, 0.3), lora(8, 0.8))
    assert told["verdicts"][0]["best"] == "rank-8" and not told["verdicts"][0]["tied"]
    assert "overlaps no other" in told["verdicts"][0]["text"] and told["verdicts"][1]["best"] == "rank-8"
    tied = made_up(lora(2, 0.76), lora(8, 0.8), lora(32, 0.4))["verdicts"][0]
    assert (tied["best"], tied["tied"]) == ("rank-8", ["rank-2"])
    assert "do not tell them apart" in tied["text"] and "rank-2 trains the fewest" in tied["text"]
    assert "the same in all" in made_up(lora(2, 0.0), lora(8, 0.0))["verdicts"][0]["text"]
    assert made_up(lora(2, 0.3))["verdicts"] == []
    differ = made_up(lora(2, 0.3), lora(8, 0.8), differ=True)["verdicts"]
    assert differ[0]["best"] == "rank-8" and differ[1]["best"] is None and "differ" in differ[1]["text"]
    _, rows = sweep_page.table(told)
    marks = [[mark for _, mark in row] for row in rows]
    assert marks[1][3:5] == ["best", "best"] and not any(marks[0])


def test_times_of_a_busy_machine_are_not_held_against_others():
    told = made_up(lora(2, 0.3), lora(8, 0.6), lora(32, 0.8))
    assert not sweep_judge.slowed(told)
    told["cells"][1]["figures"]["cores"] = 0.5
    assert sweep_judge.slowed(told) == ["rank-8"]
    for one in told["cells"]:
        one["figures"]["cores"] = 0.5
    assert not sweep_judge.slowed(told)  # all are slowed alike
    told["cells"][0]["figures"]["cores"] = None  # a GPU's
    assert not sweep_judge.slowed(told)
    told["cells"][1]["figures"]["cores"] = 0.2
    said = sweep_judge.verdicts(told)[-1]
    assert said["best"] is None and "rank-8" in said["text"] and "other programs" in said["text"]


def test_a_right_command_without_an_end_can_be_told_from_a_wrong_one():
    """executed_match counts both as wrong, so the stop rate stands beside it."""
    told = made_up(lora(2, 0.3), lora(8, 0.8), differ=True)
    for one, rate in zip(told["cells"], (0.2, 1.0), strict=True):
        one["figures"]["metrics"]["stop_rate"] = {"value": rate, "low": rate, "high": rate, "n": 68}
    assert list(sweep_judge.metrics(told)) == ["executed_match_en", "stop_rate", "held_out_loss"]
    assert [of["best"] for of in sweep_judge.verdicts(told)] == [
        "rank-8",
        "rank-8",
        None,
        None,
    ]  # graded items are the same; memory


def test_labels_and_dots_lie_apart():
    """Of cells with nearly the same figures too, on a phone and on a desk."""
    cells = [(f"c{n}", {"adapter.kind": "lora", "adapter.rank": n}, 10_000 + 50 * n, 0.5 + n / 100) for n in range(6)]
    told = made_up(*cells, ("full", {"adapter.kind": "none"}, 10**6, 0.9))
    page = sweep_page.html(told, "apart")
    panels = re.findall(r'<svg class="dots".*?</svg></svg>', page)
    assert len(panels) == 4
    for panel in panels:
        found = re.findall(r'<svg x="([\d.]+)%".*?<circle cx="([-\d.]+)" cy="([-\d.]+)"', panel)
        for width in sweep_page.WIDTHS:
            xs = sorted(float(x) * width / 100 + float(cx) for x, cx, _ in found)
            assert all(b - a > 8 for a, b in itertools.pairwise(xs))
        assert all(0 <= float(y) <= sweep_page.HEIGHT for *_, y in found)
    texts = {text for text in re.findall(r"<text[^>]*>([^<]*)</text>", page) if text}
    assert texts == {str(n) for n in range(6)}


def test_long_labels_become_rows():
    told = made_up(lora(2, 0.3), lora(8, 0.8))
    told["dimensions"]["data.system"] = ["a", "b"]
    for one in told["cells"]:
        one["varied"] = {**one["varied"], "data.system": "You are the friendly voice of a <house>."}
    page = sweep_page.html(told, "long")
    assert ">#1</text>" in page and "row of the table" in page and "<house>" not in page


def test_a_page_without_a_finished_cell():
    told = copy.deepcopy(made_up(lora(2, 0.3), lora(8, 0.8)))
    for one in told["cells"]:
        one |= {"state": "left out", "figures": None, "why": "predicted 1 h 00 min, 2 s left"}
    told |= {"metrics": sweep_judge.metrics(told), "verdicts": sweep_judge.verdicts(told)}
    page = sweep_page.html(told, "none")
    assert "0 of 2 cells are finished" in page and "predicted 1 h 00 min" in page and 'class="dots"' not in page

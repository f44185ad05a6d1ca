"""Training on comparisons: each method learns them; however a step is cut, stopped or divided among processes, it is
the same; and the log says what is happening.

Not for the formulas (methods/), the reference's cache (test_reference.py) and the guard's verdicts (test_guard.py).
Started by torchrun, this file is what two processes do (see `main`).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tunelet.data import branches
from tunelet.data.examples import Labelled, Message, Origin, Preference, Tokens
from tunelet.data.render import Renderer, load_tokenizer
from tunelet.models import adapters, load
from tunelet.models.device import Choice
from tunelet.recipe import PREFERENCE, REFERENCED, Recipe
from tunelet.runs import history
from tunelet.runs.record import Run
from tunelet.train import defaults, distributed, loop, step
from tunelet.train.progress import Interrupted

CPU = Choice("cpu", "float32", 1)
QUIET = Console(quiet=True)
TIMES = ("tokens_per_second", "tokens_per_cpu_second", "peak_mb", "elapsed_seconds")
WATCHED = {"watch/kl", "watch/entropy", "watch/stop_rate", "watch/loops", "watch/length"}
PAIRED = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
}
TOLD = {
    "dpo": PAIRED,
    "simpo": PAIRED,
    "orpo": PAIRED | {"nll_loss", "odds_loss", "log_odds_chosen"},
    "kto": {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "kl"},
}
CASES = [*((method, "none") for method in PREFERENCE), ("dpo", "lora"), ("kto", "lora")]
RATE = 3e-3


def rows_of(method: str, tokenizer: Any, first: int = 0, count: int = 20) -> list[Tokens]:
    """Polite answers are better than curt ones, of many lengths; for KTO each has a verdict, SFT has the good ones."""
    renderer, examples = Renderer(tokenizer), []
    for n in range(first, first + count):
        prompt = (Message("user", f"Is {'the light ' * (n % 3)}{n} on?"),)
        good, poor = f"It is on{', please' * (n % 4)}.", f"{'No! ' * (n % 2 + 1)}{n}"
        if method == "kto":
            said, label = (good, True) if n % 3 else (poor, False)
            examples.append(Labelled(prompt, (Message("assistant", said),), label, Origin("t", n + 1)))
        else:
            two = ((Message("assistant", said),) for said in (good, poor))
            examples.append(Preference(prompt, *two, Origin("t", n + 1)))
    rows = (branches.labelled if method == "kto" else branches.pairs)(renderer, examples, [])
    return [row.only(0) for row in rows] if method == "sft" else rows


def recipe(method: str, *, kind: str = "none", dropout: float = 0.0, guard: str = "warn", **train) -> Recipe:
    """A recipe with nothing left open."""
    settings = {"batch_size": 4, "max_steps": 8, "learning_rate": RATE, "log_steps": 2, "seed": 3, **train}
    tree: dict[str, Any] = {
        "method": {"name": method, "beta": defaults.BETAS.get(method, 0.0), "guard": guard},
        "train": {"schedule": "constant", "eval_steps": 4, **settings},
    }
    if kind == "lora":
        tree["adapter"] = {"kind": "lora", "rank": 4, "dropout": dropout}
        tree["train"]["learning_rate"] = settings["learning_rate"] * 3
    if method == "simpo":
        tree["method"]["simpo_gamma"] = 1.0
    return Recipe.model_validate(tree)


@dataclass
class Lab:
    """A tiny model's folder, and trainings that start from it."""

    folder: Path
    tokenizer: Any

    def model(self, made: Recipe) -> Any:
        model = load.load_model(str(self.folder), CPU, trainable=True)
        return adapters.add(model, made.adapter, made.train.seed) if made.adapter.kind == "lora" else model

    def train(self, out: Path | None, made: Recipe, *, train_rows=None, eval_rows=None, model=None, console=QUIET):
        """(Trained, weights that were trained, run; in process 0)."""
        run = Run.open_or_create(out, made)[0] if out is not None and distributed.world().first else None
        model = model or self.model(made)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        method = made.method.name
        trained = loop.train(
            made,
            run,
            model=model,
            tokenizer=self.tokenizer,
            train_rows=rows_of(method, self.tokenizer) if train_rows is None else train_rows,
            eval_rows=rows_of(method, self.tokenizer, 100, 6) if eval_rows is None else eval_rows,
            choice=CPU,
            console=console,
        )
        weights = dict(model.named_parameters())
        return trained, {name: weights[name].detach().clone() for name in names}, run


@pytest.fixture
def lab(tiny_model_folder, tiny_tokenizer) -> Lab:
    return Lab(tiny_model_folder, tiny_tokenizer)


def log_of(run: Run) -> list[dict[str, Any]]:
    """Without what depends on the hour."""
    return [{key: value for key, value in row.items() if key not in TIMES} for row in run.log_rows()]


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method,kind", CASES)
def test_each_method_lowers_its_loss_and_logs_what_it_does(method, kind, lab, tmp_path):
    made = recipe(method, kind=kind, max_steps=24, log_steps=4, eval_steps=8)
    trained, _, run = lab.train(tmp_path / "run", made)
    log = run.log_rows()
    steps, held = [[row for row in log if key in row] for key in ("loss", "held_out_loss")]
    assert [row["step"] for row in steps] == list(range(4, 25, 4)) and [row["step"] for row in held] == [0, 8, 16, 24]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.02
    assert held[-1]["held_out_loss"] < held[0]["held_out_loss"] - 0.02
    assert trained.held_out_loss == held[-1]["held_out_loss"]
    for row in steps:
        assert {key for key in row if "/" in key or key in TOLD[method]} == TOLD[method]
    for row in held:
        assert {key for key in row if "/" in key} == WATCHED | {f"held_out/{key}" for key in TOLD[method]}
        assert all(isinstance(value, float | int) for key, value in row.items() if key != "remarks")
    apart = [row["held_out/rewards/chosen"] - row["held_out/rewards/rejected"] for row in (held[0], held[-1])]
    assert apart[1] > apart[0] + 0.02
    if method in REFERENCED:
        assert apart[0] == pytest.approx(0, abs=1e-5), "nothing has moved from the start yet"
    if method != "kto":
        assert held[-1]["held_out/rewards/accuracies"] == 1.0
        assert apart[1] == pytest.approx(held[-1]["held_out/rewards/margins"], abs=1e-5)
    assert held[0]["watch/kl"] == pytest.approx(0, abs=1e-5) and held[-1]["watch/kl"] != held[0]["watch/kl"]


def test_looked_at_ten_times_where_the_recipe_does_not_say(lab, tmp_path):
    for guard, expected in (("warn", [0, 2, 4, 6, 8, 10, 12]), ("off", [0, 12])):
        made = recipe("dpo", guard=guard, max_steps=12, eval_steps=0)
        _, _, run = lab.train(tmp_path / guard, made)
        held = [row for row in run.log_rows() if "held_out_loss" in row]
        assert [row["step"] for row in held] == expected
        assert all((row.keys() >= WATCHED) == (guard == "warn") for row in held)


# -- cut, stopped, divided --------------------------------------------------------------------------------------------

CUTS = {"8x1": (8, 1), "1x8": (1, 8), "2x4": (2, 4)}
# Sums of log-probabilities are of the order of 100: what is left of them after subtracting is exact to some 1e-6.
RELATIVE, ABSOLUTE = {"loss": 1e-6, "held_out_loss": 1e-6, "grad_norm": 5e-6}, 1e-5


def apart(one, other) -> dict[str, float]:
    """The largest difference of each figure in two logs, relative for losses and norms; and of the weights."""
    out: dict[str, float] = {}
    logs = log_of(one[2]), log_of(other[2])
    assert [(row["step"], row.keys()) for row in logs[0]] == [(row["step"], row.keys()) for row in logs[1]]
    for a, b in zip(*logs, strict=True):
        for key in a.keys() - {"remarks"}:
            difference = abs(a[key] - b[key]) / (max(abs(a[key]), 1e-9) if key in RELATIVE else 1.0)
            out[key] = max(out.get(key, 0.0), difference)
    assert one[1].keys() == other[1].keys()
    found = [float((other[1][key] - value).norm() / (value.norm() + 1e-6)) for key, value in one[1].items()]
    return out | {"weights": max(found)}


def alike(found: dict[str, float]) -> bool:
    return all(value <= RELATIVE.get(key, ABSOLUTE) for key, value in found.items())


@pytest.mark.parametrize("method,kind", [*CASES, ("sft", "none")])
def test_1x8_equals_8x1_equals_2x4(method, kind, lab, tmp_path):
    """Steps of eight rows, of one and of eight: one is a micro-batch by itself, after others that were added up."""
    runs = {}
    rows, held = rows_of(method, lab.tokenizer, count=17), rows_of(method, lab.tokenizer, 100, 6)
    for name, (size, accumulation) in CUTS.items():
        cut = {"batch_size": size, "gradient_accumulation": accumulation, "seed": 6}
        made = recipe(method, kind=kind, guard="off", max_steps=3, log_steps=1, eval_steps=2, **cut)
        assert [len(step) for step in loop.step_places(rows, made, 0, 3)] == [8, 1, 8]
        runs[name] = lab.train(tmp_path / name, made, train_rows=rows, eval_rows=held)
        assert all(row["grad_norm"] > 0 for row in runs[name][2].log_rows() if "grad_norm" in row)
    for name in ("1x8", "2x4"):
        found = apart(runs["8x1"], runs[name])
        assert alike(found), (name, found)
    if method == "kto":
        assert max(row.get("kl", 0) for row in runs["8x1"][2].log_rows()) > 0.1, "the reference point takes part"


def stopping_at(monkeypatch, at: int, how) -> None:
    """Calls `how` before optimizer step number `at`, counted from 0."""
    real = step.Stepper.__call__

    def stopping(self, rows, number, total):
        if number == at:
            how()
        return real(self, rows, number, total)

    monkeypatch.setattr(step.Stepper, "__call__", stopping)


def killed() -> None:
    raise RuntimeError("killed")


def interrupted() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("method,kind,dropout", [("dpo", "none", 0.0), ("kto", "none", 0.0), ("dpo", "lora", 0.2)])
def test_resumed_equals_uninterrupted_bit_for_bit(method, kind, dropout, lab, tmp_path, monkeypatch):
    """Weights and log; what the start model said, sampled and was told of is known again, from the cache or without."""
    more = {"gradient_accumulation": 2, "batch_size": 2, "max_steps": 10, "eval_steps": 2, "save_steps": 3}
    made = recipe(method, kind=kind, dropout=dropout, learning_rate=0.03, **more)
    _, expected, run = lab.train(tmp_path / "whole", made)
    log = log_of(run)
    said = [(row["step"], remark["kind"]) for row in log for remark in row.get("remarks", [])]
    assert kind == "lora" or said[0][0] < 8, "there is something to remember"
    for at, how, cached in ((8, killed, False), (4, interrupted, True), (1, killed, True))[
        : 3 if kind == "none" else 1
    ]:
        out = tmp_path / f"stopped-{at}"
        with monkeypatch.context() as patch, pytest.raises((RuntimeError, Interrupted)):
            stopping_at(patch, at, how)
            lab.train(out, made)
        if not cached:
            shutil.rmtree(history.cache() / "reference")
        _, resumed, run = lab.train(out, made)
        assert same(expected, resumed), f"stopped before step {at + 1}"
        assert log_of(run) == log
        assert len(said) == len({kind for _, kind in said}), "each is said once"


# -- two processes ----------------------------------------------------------------------------------------------------

WAYS = ("ddp", "fsdp")
SHARED = ("dpo", "kto")


def shared_recipe(method: str, way: str) -> Recipe:
    """13 rows: the last step of an epoch has one, fewer than there are processes."""
    more = {"gradient_accumulation": 2, "batch_size": 2, "max_steps": 5, "log_steps": 1, "eval_steps": 3}
    return recipe(method, parallel=way, **more)


def main(model: Path, out: Path) -> None:
    """Every case in one process and in both; process 0 writes how far apart they are as JSON."""
    lab, found, alone = Lab(model, load_tokenizer(model)), {}, {}
    rows = {method: rows_of(method, lab.tokenizer, count=13) for method in SHARED}
    if distributed.asked().first:
        for method in SHARED:
            alone[method] = lab.train(out / f"{method}-1", shared_recipe(method, "ddp"), train_rows=rows[method])
    os.environ["XDG_CACHE_HOME"] = str(out / "another")  # two processes have to compute the reference for themselves
    with distributed.joined() as world:
        for way in WAYS:
            for method in SHARED:
                made = shared_recipe(method, way)
                together = lab.train(out / f"{method}-{way}", made, train_rows=rows[method])
                if world.first:
                    found[f"{way} {method}"] = apart(alone[method], together)
        if world.first:
            (out / "figures.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def figures(tmp_path_factory, tiny_model_folder) -> dict[str, dict[str, float]]:
    from tests.train.test_distributed import output, start

    out = tmp_path_factory.mktemp("processes")
    output(start("--standalone", "--nproc-per-node", 2, Path(__file__), tiny_model_folder, out))
    return json.loads((out / "figures.json").read_text())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", SHARED)
def test_two_processes_equal_one(figures, way, method):
    found = figures[f"{way} {method}"]
    assert found.keys() >= WATCHED and "held_out/rewards/chosen" in found and "loss" in found
    assert alike(found), found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    os._exit(0)  # threads of the groups that were left may outlive the interpreter

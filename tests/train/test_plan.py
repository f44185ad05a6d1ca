"""The plan of a training: what is carried from two shallow models to the whole is exact where it can be, sums follow
the run's own rows, what is left open gets the mildest value that fits, and what is kept on disk may be damaged."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from tunelet import machine
from tunelet.data import pack
from tunelet.data.examples import Origin, Tokens
from tunelet.errors import TuneletError
from tunelet.models import cut, device
from tunelet.models.device import Choice
from tunelet.recipe import Recipe
from tunelet.runs import history
from tunelet.runs.record import PLAN_KEYS, Run
from tunelet.train import calibrate, fit, measure, plan, step
from tunelet.train.cost import Batches, Cost, Curve, Probe
from tunelet.train.run import run_training

CPU = Choice("cpu", "bfloat16", 1)
FLAT = Curve(0.0, (10.0,), (0.0,))
COST = Cost(
    parameters=1_000_000,
    trained=1_000_000,
    seconds_layers=Curve(0.5, (10.0, 30.0), (0.01, 0.02)),
    seconds_rest=(0.25, 0.001),
    seconds_update=2.0,
    seconds_sum=0.125,
    evaluation_layers=Curve(0.0, (10.0,), (0.005,)),
    evaluation_rest=(0.0, 0.0),
    cpu_per_second=1.0,
    bytes_weights=200_000_000,
    bytes_state=1_200_000_000,
    bytes_gradients=200_000_000,
    bytes_sums=400_000_000,
    bytes_checkpoint=1_200_000_000,
    bytes_update=10_000_000,
    saved=Curve(0.0, (10.0,), (1_000_000.0,)),
    at_top=FLAT,
    at_bottom=FLAT,
    at_head=(0.0, 0.0),
    head_chunk=100,
    head_most=0,
    evaluation_body=FLAT,
    evaluation_head=(0.0, 0.0),
    watts=None,
    busy=1.0,
    seconds=1.0,
)


def row(length, trained=None):
    mask = np.arange(length) >= length - (trained or length - 1)
    return Tokens(np.arange(length) % 50, mask, ((0, length, "text"),), Origin("made", 1))


def recipe(folder="", **sections):
    given = {"model": {"path": str(folder), "dtype": "float32", "threads": 1}, **sections}
    given["train"] = {"learning_rate": 1e-3, **given.get("train", {})}
    return Recipe.model_validate(given)


# -- Curve, Batches, Cost ---------------------------------------------------------------------------------------------


def test_a_curve_interpolates_fills_streams_up_and_goes_on_beyond_its_ends():
    curve = Curve(3.0, (10.0, 30.0), (1.0, 3.0))
    assert curve([32, 32]) == pytest.approx(3 + 64 * 3.2)  # two rows of 32: on the line beyond 30
    assert curve([16] * 4) == pytest.approx(3 + 64 * 1.6)
    assert curve([8] * 8) == pytest.approx(3 + 64 * 1.0)  # not below what was measured
    assert curve([16]) == pytest.approx(3 + 64 * 1.6)  # filled up to a multiple of 64
    assert curve([16, 32, 32], [0, 1]) == pytest.approx([3 + 64 * 1.6, 3 + 64 * 3.2])
    assert Curve(0.0, (10.0,), (2.0,))([64]) == pytest.approx(128)


def test_a_cost_survives_json_and_damage_is_seen(tmp_path):
    kept = tmp_path / "deep" / "cost.json"
    assert calibrate.read(kept) is None
    calibrate.keep(kept, COST)
    assert calibrate.read(kept) == COST
    whole = kept.read_text()
    for damaged in (whole[: len(whole) // 2], "[]", "null", "{}", whole.replace("head_chunk", "head_hunk")):
        kept.write_text(damaged)
        assert calibrate.read(kept) is None
    kept.write_bytes(b"\xff\xfe\x00")
    assert calibrate.read(kept) is None


# -- the cut model ----------------------------------------------------------------------------------------------------

SHAPES = {
    "llama": {"num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64},
    "gemma3_text": {
        "num_hidden_layers": 14, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
        "head_dim": 8, "sliding_window": 16,
    },
    "gpt2": {"num_hidden_layers": 5, "num_attention_heads": 4},
}  # fmt: skip


def config_of(kind):
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, vocab_size=120, hidden_size=32, **SHAPES[kind])
    return copy.deepcopy(config)


def test_the_period_of_an_architecture():
    assert [cut.period(config_of(kind)) for kind in SHAPES] == [1, 6, 1]
    short = cut.cut(config_of("gemma3_text"), 6)
    assert short.num_hidden_layers == 6 and len(short.layer_types) == 6


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("kind", SHAPES)
def test_what_a_model_holds_is_carried_exactly(kind, adapter):
    config, asked = config_of(kind), recipe(adapter={"kind": adapter, "rank": 4})
    asked.train.gradient_checkpointing, asked.train.optimizer_state = "off", "float32"
    period, layers = cut.period(config), config.num_hidden_layers
    probes = [Probe((16,), 8), Probe((16, 18, 20), 30)]
    cost = measure.measure(asked, CPU, config, probes, (period, 2 * period))
    whole = measure._Depth(layers, measure._stepper(asked, CPU, config, layers))
    held = whole.held()
    if layers % period == 0:
        assert {key: getattr(cost, key) for key in held} == held
    assert cost.parameters == pytest.approx(held["parameters"], rel=1e-6)  # sliding and global layers are equally large
    assert cost.trained == pytest.approx(held["trained"], rel=1e-6)


@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_bytes_saved_by_a_forward_are_carried_to_the_full_depth(checkpointing):
    config, asked = config_of("llama"), recipe(train={"gradient_checkpointing": checkpointing})
    asked.train.optimizer_state = "float32"
    probes = [Probe((20, 24, 28), 60), Probe((20, 21, 24, 26, 27, 28), 120), Probe((48, 50, 51), 100)]
    cost = measure.measure(asked, CPU, config, probes, (1, 3))
    whole = measure._stepper(asked, CPU, config, config.num_hidden_layers)
    rows = (22, 30, 34, 40, 41, 48)
    read = measure._count(whole, measure._rows(Probe(rows, 120), 120, "sft"), "cpu")
    assert float(cost.saved(rows)[0]) == pytest.approx(read.saved, rel=0.15)
    assert read.saved > 0 and read.top >= 0


def test_allocations_are_counted_and_the_mark_divides_them():
    with measure._Allocations("cpu") as made:
        x = torch.zeros(1000)
        del x
        y = torch.zeros(500)
        made.mark()
        z = torch.zeros(2000)
        del y
    assert max(made.before) == 4000 and made.at_mark == 2000
    assert max(made.after) == 10_000 and made.after[-1] == 8000 and len(z)


# -- adding up --------------------------------------------------------------------------------------------------------


def predicted(asked, rows, held_out=(), cost=COST):
    todo = plan.work(asked, rows, held_out)
    return plan.predict(asked, cost, todo, CPU, base_mb=100.0, disk_mb_per_second=100.0, stored_bytes=2), todo


def test_seconds_are_summed_over_the_steps_that_will_be():
    often = {"eval_steps": 2, "save_steps": 4}
    asked = recipe(train={"batch_size": 2, "max_steps": 6, "optimizer_state": "float32", **often})
    rows, held_out = [row(32), row(32), row(16), row(16)], [row(64), row(64)]
    told, todo = predicted(asked, rows, held_out)
    assert (todo.steps, todo.evaluations, todo.checkpoints, todo.several) == (6, 4, 2, False)
    long, short = 0.5 + 64 * 0.021 + 0.25 + 62 * 0.001, 0.5 + 64 * 0.013 + 0.25 + 30 * 0.001
    assert told.parts_seconds["forward and backward"] == pytest.approx(3 * long + 3 * short)
    assert told.parts_seconds["optimizer"] == 12.0
    assert told.parts_seconds["evaluation"] == pytest.approx(4 * 128 * 0.005)
    assert told.parts_seconds["checkpoints"] == pytest.approx(2 * 12.0)
    assert told.seconds == pytest.approx(sum(told.parts_seconds.values()))
    assert told.disk_mb == pytest.approx(2 * 1200 + 2 + plan.OTHER_FILES_MB)
    assert told.energy_wh > 0 and told.energy_kind == "estimated"


def test_a_long_training_is_looked_at_in_part(monkeypatch):
    asked = recipe(train={"batch_size": 2, "epochs": 50.0})
    rows = [row(20 + 4 * (i % 10)) for i in range(40)]
    whole = predicted(asked, rows)[0]
    monkeypatch.setattr(plan, "MOST_ROWS", 500)
    told, todo = predicted(asked, rows)
    assert todo.share < 0.5
    assert told.seconds == pytest.approx(whole.seconds, rel=0.05)
    assert told.tokens == pytest.approx(whole.tokens, rel=0.05)


def test_memory_is_that_of_the_largest_batch_or_of_the_gradients():
    rows = [row(64), row(64), row(128), row(640)]
    whole = recipe(train={"batch_size": 4, "max_steps": 1})
    told = predicted(whole, rows)[0]
    assert told.parts_mb["activations and gradients"] == pytest.approx(896)
    assert told.peak_mb == pytest.approx(sum(told.parts_mb.values()))
    cut_up = recipe(train={"batch_size": 4, "max_steps": 1, "tokens_per_batch": 256})
    told, todo = predicted(cut_up, rows)
    assert todo.several and told.parts_mb["activations and gradients"] == pytest.approx(640)  # a row stays whole
    assert told.parts_mb["sums of gradients"] == 400
    few = predicted(recipe(train={"batch_size": 1, "max_steps": 1}), [row(64)])[0]
    assert few.parts_mb["activations and gradients"] == pytest.approx(210)  # gradients and the optimizer's scratch


# -- what is left open ------------------------------------------------------------------------------------------------


@pytest.fixture
def machine_of(monkeypatch, tiny_model_folder):
    """machine_of(free MB): a machine, and costs that depend on the mode in a simple way. No measuring."""
    saved = {"off": 1_000_000.0, "on": 100_000.0}
    state = {"float32": 1_200_000_000, "bfloat16": 400_000_000, "float8": 200_000_000}

    def cost_of(asked, choice, config, whole, steps):
        small = {"none": 1, "int8": 2, "int4": 4}[asked.model.quantization]
        lora = asked.adapter.kind == "lora"
        return replace(
            COST,
            saved=Curve(0.0, (10.0,), (saved[asked.train.gradient_checkpointing],)),
            bytes_weights=COST.bytes_weights // small,
            bytes_state=1_000_000 if lora else state[asked.train.optimizer_state],
            bytes_sums=1_000_000 if lora else COST.bytes_sums,
            bytes_gradients=1_000_000 if lora else COST.bytes_gradients,
        )

    def set_up(free, total=100_000):
        monkeypatch.setattr(calibrate, "cost_of", cost_of)
        monkeypatch.setattr(machine, "available_memory_mb", lambda: free)
        monkeypatch.setattr(device, "held_mb", lambda on="cpu": 0.0)
        monkeypatch.setattr(fit, "memory_mb", lambda: total)

        def make(**sections):
            asked = recipe(tiny_model_folder, **sections)
            return fit.make(asked, CPU, None, [row(100)] * 32, [], Path("/"))

        return make

    return set_up


def chosen(made):
    settings = made.recipe.train
    return settings.tokens_per_batch, settings.gradient_checkpointing, settings.optimizer_state


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (9000, (1600, "off", "float32")),  # all of it: 0.2 + 1.2 + 1.6 GB, and holes
        (3300, (800, "off", "float32")),  # smaller micro-batches: 0.2 + 1.2 + 0.4 + 0.8
        (2450, (1600, "on", "float32")),
        (1700, (1600, "on", "bfloat16")),
        (1000, (1600, "on", "float8")),
    ],
)
def test_the_mildest_that_fits_is_chosen(machine_of, free, expected):
    made = machine_of(free)(train={"batch_size": 16})
    assert made.fits and not made.advice
    assert chosen(made)[1:] == expected[1:]
    assert chosen(made)[0] <= expected[0]
    assert set(made.origins) == set(fit.SETTLED)
    assert all(why.startswith("default: ") for why in made.origins.values())


def test_what_is_asked_for_stays_and_the_smallest_change_is_named(machine_of):
    asked = {"batch_size": 16, "tokens_per_batch": 1600, "gradient_checkpointing": "off", "optimizer_state": "float32"}
    made = machine_of(2450)(train=asked)
    assert chosen(made) == (1600, "off", "float32") and not made.fits and not made.origins
    assert "train.gradient_checkpointing=on" in made.advice and "optimizer_state" not in made.advice
    made = machine_of(600)(train=asked)
    assert not made.fits and made.advice.startswith("--adapter lora")
    made = machine_of(300)(train={"batch_size": 4}, adapter={"kind": "lora"})
    assert made.advice.startswith("--set model.quantization=int8")
    assert machine_of(10)(train=asked).advice == ""
    assert not machine_of(10, total=500)(train=asked).fits and machine_of(10, total=500)(train=asked).impossible


# -- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_run(tiny_model_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The light in the kitchen is on at seven. " * 300, encoding="utf-8")

    def make(out="run", console=None, **sections):
        sections["train"] = {"max_steps": 4, "batch_size": 4, **sections.get("train", {})}
        asked = recipe(
            tiny_model_folder,
            method="pretrain",
            data={"train": [str(text)], "max_length": 64, "eval_rows": 4},
            **sections,
        )
        return run_training(asked, tmp_path / out, console=console or Console(quiet=True))

    return make


@pytest.mark.parametrize(("kind", "save_steps"), [("none", 0), ("none", 1), ("lora", 2)])
def test_predicted_and_actual_of_a_real_training(small_run, kind, save_steps):
    run = small_run(adapter={"kind": kind, "rank": 8}, train={"save_steps": save_steps})
    told = run.read_json("plan.json")
    predicted, actual = told["predicted"], told["actual"]
    assert set(predicted) == set(actual) == set(PLAN_KEYS) and all(actual.values()) and all(predicted.values())
    assert predicted["peak_mb"] == pytest.approx(actual["peak_mb"], rel=0.3)
    real = sum(path.stat().st_size for path in run.folder.rglob("*.safetensors")) / 1e6
    assert predicted["disk_mb"] - plan.OTHER_FILES_MB == pytest.approx(real, rel=0.2)  # headers weigh in a tiny model
    settled = run.recipe().train
    assert (settled.gradient_checkpointing, settled.optimizer_state) == ("off", "float32")
    assert settled.tokens_per_batch > 0
    assert run.origins()["train.gradient_checkpointing"] == "default: it fits in memory"
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "predicted" in page and ">error<" in page
    assert str(run.folder.resolve()) in {line.name for line in history.lines([])}


def test_a_run_that_goes_on_keeps_what_it_began_with(small_run, tmp_path, monkeypatch):
    from tunelet.train import loop
    from tunelet.train.progress import Interrupted

    train = loop.train
    monkeypatch.setattr(loop, "train", lambda *_, **__: (_ for _ in ()).throw(Interrupted(tmp_path, 1, 4)))
    with pytest.raises(Interrupted):
        small_run()
    before = (tmp_path / "run" / "resolved.toml").read_text(), Run(tmp_path / "run").read_json("plan.json")
    assert before[1]["predicted"] and before[1]["actual"] is None  # foretold before anything was trained
    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setattr(fit, "make", lambda *_, **__: pytest.fail("planned again"))
    run = small_run()
    assert run.status == "finished"
    assert (run.folder / "resolved.toml").read_text() == before[0]
    assert run.read_json("plan.json")["predicted"] == before[1]["predicted"]


def test_a_machine_that_is_too_small_stops_it_before_anything_is_written(small_run, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "memory_mb", lambda: 50)
    monkeypatch.setattr(machine, "available_memory_mb", lambda: 20)
    with pytest.raises(TuneletError, match="MB of memory"):
        small_run()
    assert not (tmp_path / "run").exists()


def test_a_machine_that_is_busy_now_gets_a_warning(small_run, monkeypatch):
    import io

    out = io.StringIO()
    monkeypatch.setattr(machine, "available_memory_mb", lambda: -10_000)
    run = small_run(console=Console(file=out))
    assert run.status == "finished" and "Warning" in out.getvalue()


def test_a_calibration_is_taken_again_only_where_it_has_to_be(small_run, monkeypatch):
    calls = []
    measured = measure.measure
    monkeypatch.setattr(measure, "measure", lambda *given: calls.append(1) or replace(measured(*given), busy=1.0))
    small_run("a", train={"beta2": 0.9})
    first = len(calls)
    small_run("b", train={"beta2": 0.8})
    assert len(calls) == first  # of the same shape
    small_run("c", adapter={"kind": "lora", "rank": 3})
    assert len(calls) > first


def test_history_is_of_folders_and_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    figures = {"seconds": 110.0, "peak_mb": 900.0, "disk_mb": 1.0, "energy_wh": 1.0}
    for name, seconds in (("a", 100.0), ("b", 220.0)):
        run = Run.create(tmp_path / "runs" / name, Recipe())
        run.plan(figures)
        run.actual({**figures, "seconds": seconds})
        history.note(run)
    Run.create(tmp_path / "runs" / "unfinished", Recipe())
    with (tmp_path / "cache" / "tunelet" / "history.jsonl").open("a") as file:
        file.write('[1]\n{"run": "half')
    for folders in ([], [tmp_path / "runs"], [tmp_path / "gone"]):
        told = history.lines(folders)
        assert [line.errors["seconds"] for line in told] == pytest.approx([0.1, -0.5])
    assert history.median(told)["seconds"] == pytest.approx(0.3) and history.median(told)["peak_mb"] == 0
    assert history.median([]) == {}


def test_the_verb(tiny_model_folder, tmp_path, capsys, monkeypatch):
    from tunelet.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The light in the kitchen is on at seven. " * 300, encoding="utf-8")
    command = ["plan", "pretrain", "--model", str(tiny_model_folder), "--data", "text.txt", "--set", "model.threads=1"]
    command += ["--set", "data.max_length=64", "--json", "plan.json"]
    assert main(command) == 0
    shown, told = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "estimated" in shown and "fits" in shown and "whole batches" in shown
    assert set(told["predicted"]) == set(PLAN_KEYS) and told["fits"] == {"memory": True, "disk": True}
    assert told["chosen"]["train.gradient_checkpointing"] == "off" and told["reasons"]["threads"]
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(machine, "available_memory_mb", lambda: -10_000)
    assert main(command) == 1
    assert "TOO LITTLE" in capsys.readouterr().out
    assert main(["plan", "--history", "--json", "history.json"]) == 0
    assert main(["plan"]) == 2


def test_probes_are_parts_of_real_batches():
    rows = [[row(20), row(22), row(25)], [row(100), row(104), row(110)], [row(300), row(310), row(333)]]
    made = calibrate._probes(Batches.of(rows), 0.5, 4000)
    assert [probe.lengths for probe in made[1:]] == [(300, 310, 333), (20, 22, 25)]
    assert made[0].tokens < made[1].tokens and all(probe.targets == round(probe.tokens / 2) for probe in made)
    equal = calibrate._probes(Batches.of([[row(64)] * 8] * 5), 0.5, 4000)
    assert [probe.tokens for probe in equal] == [128, 512]


def test_micro_batches_of_a_plan_are_those_of_the_step():
    asked = recipe(train={"batch_size": 4, "max_steps": 3, "tokens_per_batch": 60})
    rows = [row(10 + 7 * i) for i in range(8)]
    todo = plan.work(asked, rows, [])
    lengths = [len(one.ids) for one in rows]
    expected = [
        sorted(len(one.ids) for one in part)
        for members in [*pack.batches(lengths, 4, 0, 0), pack.batches(lengths, 4, 0, 1)[0]]
        for part in step.micro_batches([rows[i] for i in members], asked.train)
    ]
    found = np.split(todo.train.lengths, todo.train.starts[1:])
    assert [sorted(part.tolist()) for part in found] == expected

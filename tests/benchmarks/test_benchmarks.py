"""The benchmarks' arithmetic, its rows, its files and its messages; and a whole run on a model of nothing.

No time is asserted: what is fast is not known here, what is counted is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from benchmarks import ladder, peer, report, rows, settings, shapes, train, worker
from benchmarks.measure import Reading

ROOT = Path(__file__).resolve().parents[2]


# --- shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "total"), [("135M", 134_515_008), ("360M", 361_821_120), ("1.7B", 1_711_376_384)])
def test_parameters_are_those_of_the_published_models(shape, total):
    assert shapes.parameters(shape)["total"] == total


def model_of(shape):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in shapes.SHAPES[shape].items() if key != "model_type"}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **values)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def test_parameters_are_those_of_the_model_that_is_built():
    model, counted = model_of("tiny"), shapes.parameters("tiny")
    assert counted["total"] == sum(p.numel() for p in model.parameters())
    linear = [m for name, m in model.named_modules() if type(m).__name__ == "Linear" and "lm_head" not in name]
    assert sorted((m.in_features, m.out_features) for m in linear) == sorted(shapes.linear_layers("tiny"))
    assert counted["body"] == sum(m.weight.numel() for m in linear)


def test_flops_are_what_torch_counts():
    """Of one row, all positions but the last being targets; eager attention does the whole square, we count half."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model, length = model_of("tiny"), 96
    ids = torch.randint(3, 512, (1, length))
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        model.lm_head(hidden).logsumexp(-1).sum().backward()
    ours = shapes.flops("tiny", [length], length - 1)
    assert counter.get_total_flops() == pytest.approx(ours["total"] + ours["attention"], rel=0.005)
    assert ours["total"] == ours["body"] + ours["adapters"] + ours["head"] + ours["attention"]


def test_lora_leaves_out_the_gradients_of_frozen_weights():
    full, lora = shapes.flops("135M", [300], 200), shapes.flops("135M", [300], 200, rank=16)
    assert lora["body"] == pytest.approx(full["body"] * 2 / 3)
    assert lora["head"] == pytest.approx(full["head"] * 2 / 3)
    assert lora["attention"] == full["attention"]
    per_layer = 16 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536))
    assert lora["adapters"] == 6 * 30 * per_layer * 300


# --- rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*rows.KINDS, "64"])
def test_rows_are_as_described(kind):
    made = rows.make(kind, 400, 0, 1000)
    spec = rows.KINDS.get(kind, {"least": 64, "most": 64, "trained": 0.65})
    lengths = [len(row.ids) for row in made]
    assert spec["least"] <= min(lengths)
    assert max(lengths) <= spec["most"]
    share = sum(n - row.prompt for n, row in zip(lengths, made, strict=True)) / sum(lengths)
    assert share == pytest.approx(spec["trained"], abs=0.02)
    assert all(3 <= token < 1000 for row in made for token in row.ids)
    assert rows.make(kind, 400, 0, 1000) == made
    assert rows.make(kind, 400, 1, 1000) != made


def test_rows_by_length_are_the_same_rows_with_less_padding():
    made = rows.make("long", 64, 0, 1000)
    grouped = rows.by_length(made, 8, 0)

    def padded(some):
        return sum(8 * max(len(row.ids) for row in some[at : at + 8]) for at in range(0, len(some), 8))

    assert Counter(grouped) == Counter(made)
    assert padded(grouped) < padded(made)
    assert rows.count(grouped) == rows.count(made)
    assert rows.count(made[1:])["digest"] != rows.count(made)["digest"]


def test_preferences_count_both_answers():
    made = rows.make("short", 20, 0, 1000, preferences=True)
    counted = rows.count(made)
    assert counted["tokens"] == sum(len(row.ids) + row.prompt + len(row.rejected) for row in made)
    assert counted["targets"] == sum(len(row.ids) - row.prompt + len(row.rejected) for row in made)


# --- figures ----------------------------------------------------------------------------------------------------


def pair(ours: float, default: float, best: float, gemm: float = 100.0) -> dict:
    def of(rate: float, peak: float) -> dict:
        return {
            "tokens_per_cpu_second": rate,
            "tokens_per_second": rate,
            "cpu_seconds_per_step": 1 / rate,
            "gflops_per_cpu_second": rate / 2,
            "peak_mb": peak,
            "flops": {"attention": 1.0, "total": 4.0},
            "facts": {"loss": 1.0},
        }

    named = {"tunelet": of(ours, 500), "trl-default": of(default, 1000), "trl-best": of(best, 2000)}
    return {"gemm": {"gflops_per_cpu_second": gemm}, **named}


def test_ratios_are_of_each_pair_and_then_the_median():
    pairs = [pair(100, 10, 50), pair(60, 20, 50), pair(10, 10, 1)]  # medians of rates would give 6, not 3
    got = train.summary(pairs, ["tunelet", "trl-default", "trl-best"])
    assert got["ratios"] == {"default": [10, 3, 1], "best": [2, 1.2, 10]}
    assert got["ratio_default"] == 3
    assert got["ratio_best"] == 2
    assert got["gemm_fraction"] == pytest.approx(0.3)
    assert got["contestants"]["tunelet"]["gemm_fraction_without_attention"] == pytest.approx(0.3 * 0.75)
    assert got["peak_ratio"] == 0.5
    assert got["peak_ratio_best"] == 0.25


def test_what_was_not_measured_is_null():
    alone = {key: value for key, value in pair(100, 10, 50).items() if key in ("gemm", "tunelet")}
    got = train.summary([alone], ["tunelet"])
    assert [got[key] for key in ("ratio_default", "ratio_best", "peak_ratio")] == [None, None, None]
    assert got["gemm_fraction"] == pytest.approx(0.5)
    assert "x the peer" not in train.table({**got, "device": "cpu"})


def test_a_rate_is_tokens_of_the_timed_rows_by_cpu_seconds():
    spec = {"device": "cpu", "shape": "tiny", "rank": 0, "steps": 2, "contestant": "tunelet"}
    made = rows.make("short", 16, 0, 512)
    tokens = sum(len(row.ids) for row in made)
    got = worker.figures(spec, made, Reading(cpu=4.0, wall=8.0), {})
    assert got["tokens_per_cpu_second"] == tokens / 4
    assert got["tokens_per_second"] == tokens / 8
    assert got["cpu_seconds_per_step"] == 2
    assert got["gflops_per_cpu_second"] == pytest.approx(got["flops"]["total"] / 4e9)
    assert worker.figures({**spec, "device": "cpu"}, made, Reading(4.0, 8.0), {})["peak_mb"] > 10


def test_settings_that_are_tried_make_steps_of_the_same_size():
    for given in settings.tried(8).values():
        assert given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] == 8
    for kind in rows.KINDS:
        best = peer.settings("trl-best", kind, 8, {})
        assert best in settings.tried(8).values(), "what is called the best was not tried"


@pytest.mark.parametrize(("digest", "loss"), [("b", 6.0), ("a", 6.3)])
def test_unequal_work_is_noticed(digest, loss):
    one = {"timed": {"digest": "a"}, "facts": {"loss": 6.0}}
    train.check_same_work([one, {"timed": {"digest": "a"}, "facts": {"loss": 6.05}}])
    with pytest.raises(AssertionError):
        train.check_same_work([one, {"timed": {"digest": digest}, "facts": {"loss": loss}}])


def test_peer_settings():
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    assert peer.settings("trl-default", "long", 8, {}) == whole
    best = peer.settings("trl-best", "short", 8, {"bf16": True})
    assert best["per_device_train_batch_size"] * best["gradient_accumulation_steps"] == 8
    assert best["bf16"] is True
    assert peer.settings("trl-best", "long", 7, {})["per_device_train_batch_size"] == 7  # 7 rows are not cut by two


# --- the ladder's file and the page -------------------------------------------------------------------------------


def rung(**given) -> dict:
    key = {"shape": "tiny", "mode": "full", "rows": "long", "batch_size": 8, "set": [], "device": "cpu", "threads": 1}
    figures = {"tokens_per_cpu_second": 1234.0, "gemm_fraction": 0.5, "peak_mb": 2000.0}
    return {**key, **figures, "timed": {"mean_length": 257.0}, **given}


def test_a_rung_measured_again_takes_the_place_of_the_old():
    found = ladder.merged([], rung())
    found = ladder.merged(found, rung(mode="lora"))
    found = ladder.merged(found, rung(tokens_per_cpu_second=99.0))
    assert [(one["mode"], one["tokens_per_cpu_second"]) for one in found] == [("full", 99.0), ("lora", 1234.0)]
    assert len(ladder.table(found).splitlines()) == 3


def test_every_mode_is_a_recipe():
    from benchmarks import ours

    for rank, sets in ladder.MODES.values():
        spec = {"method": "sft", "model": "starter", "device": "cpu", "threads": 1, "batch_size": 8, "seed": 0}
        recipe = ours.recipe({**spec, "rank": rank, "set": list(sets)})
        assert (recipe.adapter.kind == "lora") == bool(rank)


def result(**given) -> dict:
    names = ["tunelet", "trl-default", "trl-best"]
    return {
        "benchmark": "train",
        "method": "sft",
        "peer": "trl",
        "device": "cpu",
        "threads": 1,
        "machine": {"cpu": "a CPU", "cores": 2},
        "versions": {"torch": "2", "transformers": "5", "peft": "0", "trl": "1"},
        "time": "2026-01-02T03:04:05Z",
        "work": {"rows": "long", "shape": "135M", "steps": 2, "set": []},
        **train.summary([pair(100, 10, 50)], names),
        **given,
    }


PAGE = "Before.\n<!-- train: a.json b.json -->\nold\n<!-- end -->\n<!-- ladder: l.json -->\n<!-- end -->\nAfter.\n"


def test_the_page_is_filled_from_the_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(result()))
    (tmp_path / "l.json").write_text(json.dumps({"benchmark": "ladder", "rungs": [rung()]}))
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert cli.main(["report", "--results", str(tmp_path), "--page", str(page), "--check"]) == 1
    assert page.read_text() == PAGE
    assert cli.main(["report", "--results", str(tmp_path), "--page", str(page)]) == 0
    text = page.read_text()
    assert "**10.00x**" in text
    assert "| tiny | full | long (257) | 8 | 1,234 | 50 | 2,000 |" in text
    assert "`b.json` has not been measured yet." in text
    assert "old" not in text
    assert text.startswith("Before.\n") and text.endswith("After.\n")
    assert cli.main(["report", "--results", str(tmp_path), "--page", str(page), "--check"]) == 0


def test_compile_is_a_recipe_key_and_its_start_is_told(tmp_path):
    options = cli.parser().parse_args(["train", "--compile", "--set", "train.seed=3"])
    assert train.work(options)["set"] == ["train.compile=true", "train.seed=3"]
    content = result(work={"rows": "long", "shape": "135M", "steps": 2, "warm": 3, "set": ["train.compile=true"]})
    content["contestants"]["tunelet"]["facts"]["warm_seconds"] = 41.7
    (tmp_path / "c.json").write_text(json.dumps(content))
    text = report.fill("<!-- train: c.json -->\n<!-- end -->\n", tmp_path)
    assert "SFT, all weights, long, compiled" in text
    assert "the first 3 steps took 42 s" in text


def test_tried_settings_are_shown_fastest_first(tmp_path):
    tried = [
        {"name": "slow", "tokens_per_cpu_second": 10.0, "peak_mb": 1.0},
        {"name": "broken", "error": "no"},
        {"name": "fast", "tokens_per_cpu_second": 20.0, "peak_mb": 1.0},
    ]
    content = {"benchmark": "settings", "method": "sft", "work": {"rows": "long"}, "tried": tried}
    (tmp_path / "s.json").write_text(json.dumps(content))
    text = report.fill("<!-- settings: s.json -->\n<!-- end -->\n", tmp_path)
    assert text.index("fast") < text.index("slow") < text.index("broken | failed")


def test_the_documents_tables_are_those_of_its_files():
    assert cli.main(["report", "--check"]) == 0


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    assert cli.main(["plot", "--results", str(tmp_path)]) == 2
    (tmp_path / "a.json").write_text(json.dumps(result()))
    (tmp_path / "l.json").write_text(json.dumps({"benchmark": "ladder", "rungs": [rung(), rung(shape="135M")]}))
    assert cli.main(["plot", "--results", str(tmp_path)]) == 0
    assert (tmp_path / "step.png").stat().st_size > 5000
    assert (tmp_path / "ladder.png").stat().st_size > 5000


# --- messages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["train", "--set", "train.batchsize=3"], "train.batch_size"),
        (["train", "--peer", "trl", "--only", "trl"], "no contestant trl"),
        (["train", "--peer", "trl", "--peer-set", "bf16"], "not KEY=JSON"),
        (["train", "--peer", "trl", "--peer-set", "per_device_train_batch_size=3"], "a step of 3 rows"),
        (["ladder", "--rows", "middling"], "no rows 'middling'"),
        (["ladder", "--json", "README.md"], "holds no ladder"),
        (["report", "--page", "nowhere.md"], "nowhere.md cannot be read"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(args, told, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("benchmarks.process.measure", lambda *_: pytest.fail("something was measured"))
    scratch = [] if args[0] == "report" else ["--scratch", str(tmp_path)]
    assert cli.main([*args, *scratch]) == 2
    assert told in capsys.readouterr().err


def test_a_peer_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["train", "--peer", "trl"]) == 2
    assert "make install-parity" in capsys.readouterr().err


# --- whole runs ---------------------------------------------------------------------------------------------------


def command(*args: object, **given):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *map(str, args)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **given,
    )


TINY = ("train", "--shape", "tiny", "--rows", "short", "--pairs", 1, "--steps", 1, "--batch-size", 2)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """One folder for all whole runs: they share the checkpoint."""
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "peers"), [("sft", "trl-default"), ("lora", "trl-best")])
def test_a_run_beside_the_peer(method, peers, tmp_path, scratch):
    pytest.importorskip("trl")
    out, only = tmp_path / "out.json", ("--only", "tunelet", "--only", peers)
    run = command(*TINY, "--method", method, "--peer", "trl", *only, "--scratch", scratch, "--json", out)
    told, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    got = json.loads(out.read_text())
    ratio, none = ("ratio_default", "ratio_best") if method == "sft" else ("ratio_best", "ratio_default")
    assert got[ratio] > 0
    assert got[none] is None
    assert 0 < got["gemm_fraction"] < 1
    facts = {name: one["facts"] for name, one in got["contestants"].items()}
    default = method == "sft"
    assert facts[peers]["settings"]["gradient_checkpointing"] is facts[peers]["settings"]["bf16"] is default
    assert facts[peers]["weights"] == ("float32" if default else "bfloat16")
    expected = shapes.parameters("tiny")["total"] if default else shapes.lora_parameters("tiny", 16)
    assert {one["trained_parameters"] for one in facts.values()} == {expected}
    assert "(median of 1 pairs)" in told


def hear_ctrl_c():
    """Tests that were started in the background have it switched off, and hand that down."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_leaves_nothing_running(scratch):
    run = command(
        *TINY, "--pairs", 50, "--steps", 500, "--scratch", scratch, start_new_session=True, preexec_fn=hear_ctrl_c
    )
    for line in run.stderr:
        if "tunelet: step" in line:
            break
    os.kill(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    assert "interrupted" in errors
    time.sleep(0.5)
    with pytest.raises(ProcessLookupError):
        os.killpg(run.pid, 0)

"""From recipe to saved model: full, LoRA and from random weights; the same call again; failures on record."""

from __future__ import annotations

import contextlib
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from tunelet.align import align
from tunelet.errors import TuneletError
from tunelet.models import weights
from tunelet.recipe import Recipe
from tunelet.runs.record import Run
from tunelet.train import defaults, step
from tunelet.train.run import opened, resolve, run_training

QUIET = Console(quiet=True)


@pytest.fixture
def chats(tmp_path):
    lines = []
    for i in range(24):
        turns = [
            {"role": "user", "content": f"Set the light in room {i} to {i * 3}."},
            {"role": "assistant", "content": f"light {i} {i * 3}"},
        ]
        lines.append(json.dumps({"messages": turns}))
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe(path, rows, method="sft", **sections):
    values = {
        "method": method,
        "model": {"path": str(path), "dtype": "bfloat16", "threads": 1},
        "data": {"train": [str(rows)], "max_length": 128, "eval_rows": 4, "bad_rows": "drop"},
        "train": {"batch_size": 4, "max_steps": 6, "log_steps": 2, "learning_rate": 3e-3},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return Recipe.model_validate(values)


def test_full_tuning_saves_in_the_dtype_that_came_in(tiny_model_folder, chats, tmp_path):
    """A float32 checkpoint trained in bfloat16 comes out in float32: from the master, not from the working copy."""
    from transformers import AutoModelForCausalLM

    run = run_training(recipe(tiny_model_folder, chats), tmp_path / "run", console=QUIET)
    assert run.status == "finished"
    done = run.read_json("DONE")
    assert done["steps"] == 6 and done["held_out_loss"] > 0 and done["peak_mb"] > 0
    assert weights.stored_dtype(run.folder / "model") == "float32"
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    norm = model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(norm, norm.bfloat16().float())
    assert run.read_json("plan.json")["actual"]["seconds"] > 0
    assert run.read_json("env.json")["choice"]["dtype"] == "bfloat16"
    assert run.read_json("data.json")


def test_a_tuned_model_stops_in_plain_transformers_and_its_files_can_be_read(tiny_model_folder, chats, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    run = run_training(recipe(tiny_model_folder, chats), tmp_path / "run", console=QUIET)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    ends = GenerationConfig.from_pretrained(run.folder / "model").eos_token_id
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in (ends if isinstance(ends, list) else [ends])
    modes = {path.stat().st_mode for path in (run.folder / "model").iterdir()}
    assert len(modes) == 1, "weights and configuration are readable by the same people"


def test_a_plain_training_leaves_the_same_records_as_align(tiny_model_folder, chats, tmp_path):
    run = run_training(recipe(tiny_model_folder, chats), tmp_path / "run", console=QUIET)
    energy = run.read_json("energy.json")
    assert list(energy["parts"]) == ["loading", "training"] and energy["energy_wh"] > 0
    assert energy["kind"] in ("measured", "estimated")
    actual = run.read_json("plan.json")["actual"]
    assert set(actual) == {"seconds", "peak_mb", "disk_mb", "energy_wh"}
    assert actual["energy_wh"] == pytest.approx(energy["parts"]["training"]["energy_wh"])
    assert "tl-row" in (run.folder / "masks.html").read_text(encoding="utf-8")
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "finished" in page and energy["kind"] in page and "tl-row" in page


def test_two_processes_in_one_folder(tiny_model_folder, chats, tmp_path, monkeypatch):
    """The second is refused and touches nothing, whether it finds the folder at once or after its checks."""
    from tunelet.train import prepare

    made, out = recipe(tiny_model_folder, chats, train={"save_steps": 2}), tmp_path / "run"
    with opened(made, out, {}, contextlib.nullcontext()):
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        with pytest.raises(TuneletError, match="in use"):
            run_training(made, out, console=QUIET)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert run_training(made, out, console=QUIET).status == "finished"
    late, real = tmp_path / "late", prepare.prepare

    def slowly(*arguments):
        monkeypatch.setattr(prepare, "prepare", real)
        stack.enter_context(opened(made, late, {}, contextlib.nullcontext()))
        return real(*arguments)

    monkeypatch.setattr(prepare, "prepare", slowly)
    with contextlib.ExitStack() as stack:
        with pytest.raises(TuneletError, match="in use"):
            run_training(made, late, console=QUIET)
        assert (late / "resolved.toml").exists()
    with monkeypatch.context() as patch:  # the first was done, and let go, while the second still checked its rows
        patch.setattr("tunelet.train.run.is_run", lambda _: False)
        with pytest.raises(TuneletError, match="already holds a run"):
            run_training(made, late, console=QUIET)
    assert (late / "resolved.toml").exists()


def test_a_model_that_cannot_be_loaded_leaves_no_folder(tiny_model_folder, chats, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(tiny_model_folder, bad)
    whole = load_file(bad / "model.safetensors")
    name = next(iter(whole))
    save_file({**whole, name: torch.full_like(whole[name], float("nan"))}, bad / "model.safetensors", {"format": "pt"})
    for work in (lambda out: run_training(recipe(bad, chats), out, console=QUIET),
                 lambda out: align(recipe(bad, chats), out, QUIET)):  # fmt: skip
        with pytest.raises(TuneletError, match="damaged"):
            work(tmp_path / "run")
        assert not (tmp_path / "run").exists()
    run = Run.create(tmp_path / "run", recipe(bad, chats))  # one that was there stays, and says what happened
    with pytest.raises(TuneletError, match="damaged"):
        run_training(recipe(bad, chats), run.folder, console=QUIET)
    assert run.status == "failed"


def test_lora_writes_an_adapter_that_can_be_trained_on(tiny_model_folder, chats, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    made = recipe(tiny_model_folder, chats, adapter={"kind": "lora", "rank": 4})
    run = run_training(made, tmp_path / "run", console=QUIET)
    assert (run.folder / "adapter").is_dir() and not (run.folder / "model").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), run.folder / "adapter")
    log = [row["held_out_loss"] for row in run.log_rows() if "held_out_loss" in row]
    assert log[-1] < log[0]
    again = made.model_copy(deep=True)
    again.model.path = str(run.folder)
    second = run_training(again, tmp_path / "second", console=QUIET)
    first_row = next(row for row in second.log_rows() if "held_out_loss" in row)
    assert first_row["held_out_loss"] == pytest.approx(log[-1], abs=0.02)


def test_first_training_from_random_weights(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    data = tmp_path / "text.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"The light in room {i} is on at {i % 24}:00 today."}) + "\n" for i in range(200))
    )
    shape = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "num_attention_heads": 4,
    }
    made = recipe(
        "", data, "pretrain", model={"architecture": shape}, tokenizer={"vocab_size": 320}, data={"max_length": 32}
    )
    run = run_training(made, tmp_path / "run", console=QUIET)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert weights.stored_dtype(run.folder / "model") == "bfloat16"
    assert model.config.eos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]


def test_the_same_call_again(tiny_model_folder, chats, tmp_path, monkeypatch):
    """Unfinished: goes on. Finished: a clear error. Another recipe: a clear error that names the setting."""

    made = recipe(tiny_model_folder, chats, train={"save_steps": 2})
    real = step.Stepper.__call__

    def failing(self, rows, number, total):
        if number == 4:
            raise RuntimeError("a bug")
        return real(self, rows, number, total)

    with monkeypatch.context() as broken, pytest.raises(RuntimeError):
        broken.setattr(step.Stepper, "__call__", failing)
        run_training(made, tmp_path / "run", console=QUIET)
    failed = Run(tmp_path / "run")
    assert failed.status == "failed" and "a bug" in failed.read_json("FAILED.json")["what"]
    with pytest.raises(TuneletError, match="another recipe") as caught:
        run_training(
            recipe(tiny_model_folder, chats, train={"save_steps": 2, "seed": 9}), tmp_path / "run", console=QUIET
        )
    assert "train.seed" in caught.value.why
    import io

    console = Console(file=io.StringIO(), width=200)
    run = run_training(made, tmp_path / "run", console=console)
    assert "from step 4 of 6" in console.file.getvalue()
    assert run.status == "finished" and not (run.folder / "FAILED.json").exists()
    with pytest.raises(TuneletError, match="finished"):
        run_training(made, tmp_path / "run", console=QUIET)


def test_a_mistake_found_before_training_leaves_no_folder(tiny_model_folder, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for model, data in (
        (tiny_model_folder, empty),
        (tiny_model_folder, tmp_path / "missing.jsonl"),
        (tmp_path / "nowhere", empty),
    ):
        with pytest.raises(TuneletError):
            run_training(recipe(model, data), tmp_path / "run", console=QUIET)
        assert not (tmp_path / "run").exists()


def test_default_learning_rates_are_filled_in_and_recorded(tiny_model_folder, chats, tmp_path):
    made, origins = resolve(recipe(tiny_model_folder, chats, train={"learning_rate": 0}), {})
    assert made.train.learning_rate == 1e-3 and "default for sft" in origins["train.learning_rate"]
    given, untouched = resolve(recipe(tiny_model_folder, chats), {})
    assert given.train.learning_rate == 3e-3 and untouched == {}
    run = run_training(
        recipe(tiny_model_folder, chats, train={"learning_rate": 0, "max_steps": 1}), tmp_path / "run", console=QUIET
    )
    assert "learning_rate = 0.001  # default for sft, full" in (run.folder / "resolved.toml").read_text()


def test_the_table_of_default_rates():
    rate = lambda *a: defaults.learning_rate(*a)[0]  # noqa: E731
    assert rate("sft", "none", 135_000_000, False) == 3e-4
    assert rate("sft", "none", 1_700_000_000, False) == 5e-5
    assert rate("sft", "lora", 135_000_000, False) == 2e-3
    assert rate("sft", "lora", 1_700_000_000, False) == pytest.approx(5e-4)
    assert rate("pretrain", "none", 5_000_000, True) == 2e-3

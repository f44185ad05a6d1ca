"""The loop: 1x8 equals 8x1, resumed equals uninterrupted, logs, early stopping, NaN, Ctrl-C, and failing disks."""

from __future__ import annotations

import errno
import json
import os
import signal

import pytest
import torch
from rich.console import Console

from tunelet import methods
from tunelet.data.examples import Origin, Tokens
from tunelet.errors import TuneletError
from tunelet.models.device import Choice
from tunelet.recipe import Recipe
from tunelet.runs.record import Run
from tunelet.train import checkpoint, loop, step
from tunelet.train.progress import Interrupted

CPU = {"float32": Choice("cpu", "float32", 1), "bfloat16": Choice("cpu", "bfloat16", 1)}


def rows(n=40, seed=0, vocabulary=64):
    """Rows with something to learn: each token is the one before plus one or two."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        length = int(torch.randint(4, 24, (1,), generator=generator))
        steps = torch.randint(1, 3, (length,), generator=generator)
        ids = ((int(torch.randint(0, vocabulary, (1,), generator=generator)) + steps.cumsum(0)) % vocabulary).tolist()
        out.append(
            Tokens(
                tuple(ids),
                tuple(j > length // 3 for j in range(length)),
                ((0, length, "text"),),
                Origin("test.jsonl", i + 1),
            )
        )
    return out


def model(dtype="float32", dropout=0.0):
    from transformers import GPT2Config, LlamaConfig

    from tunelet.models import load

    if dropout:
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=2, n_positions=64, resid_pdrop=dropout, attn_pdrop=dropout, embd_pdrop=dropout
        )
    else:
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    return load.new_model({**config.to_dict(), "vocab_size": 64}, 64, {"eos": 0, "pad": 0, "bos": None}, 0, CPU[dtype])


def recipe(method="sft", **train):
    settings = {"batch_size": 4, "max_steps": 12, "learning_rate": 5e-3, "log_steps": 3, "seed": 3, **train}
    return Recipe(method=method, train=settings)


def run_of(folder, made):
    return Run.open_or_create(folder, made)[0]


def train(
    folder, made=None, *, dtype="float32", dropout=0.0, eval_rows=(), train_rows=None, the_model=None, console=None
):
    made = made or recipe()
    run = run_of(folder, made)
    built = the_model or model(dtype, dropout)
    trained = loop.train(
        made,
        run,
        model=built,
        tokenizer=None,
        train_rows=rows() if train_rows is None else train_rows,
        eval_rows=list(eval_rows),
        choice=CPU[dtype],
        console=console or Console(quiet=True),
    )
    return trained, built, run


def weights(built):
    return {key: value.clone() for key, value in built.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


def test_loss_falls_and_the_log_has_every_figure(tmp_path):
    held = rows(8, seed=1)
    trained, _, run = train(tmp_path / "run", recipe(max_steps=30, eval_steps=10), eval_rows=held)
    log = run.log_rows()
    steps = [row for row in log if "loss" in row]
    assert [row["step"] for row in steps] == list(range(3, 31, 3))
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert set(steps[0]) == {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "trained_tokens",
        "tokens_per_second",
        "tokens_per_cpu_second",
        "peak_mb",
        "elapsed_seconds",
    }
    assert steps[-1]["tokens_per_second"] > 0 and steps[-1]["peak_mb"] > 50
    held_out = [row for row in log if "held_out_loss" in row]
    assert [row["step"] for row in held_out] == [0, 10, 20, 30]
    assert trained.held_out_loss == held_out[-1]["held_out_loss"] < held_out[0]["held_out_loss"]
    assert trained.steps == 30 and trained.tokens == steps[-1]["tokens"]


def test_1x8_equals_8x1(tmp_path):
    """The loss of a step is normalised by the targets of the whole step, so cutting it changes nothing but rounding."""
    results = {}
    for name, size, accumulation in (("8x1", 8, 1), ("1x8", 1, 8), ("3x3", 3, 3)):
        made = recipe(batch_size=size, gradient_accumulation=accumulation, max_steps=6, log_steps=1, weight_decay=0.01)
        _, built, run = train(tmp_path / name, made)
        results[name] = (
            weights(built),
            [(row["loss"], row["grad_norm"], row["trained_tokens"]) for row in run.log_rows()],
        )
    for (a, norm_a, targets_a), (b, norm_b, targets_b) in zip(results["8x1"][1], results["1x8"][1], strict=True):
        assert targets_a == targets_b
        assert a == pytest.approx(b, rel=2e-6)
        assert norm_a == pytest.approx(norm_b, rel=2e-5)
    for key, value in results["8x1"][0].items():
        torch.testing.assert_close(value, results["1x8"][0][key], atol=2e-5, rtol=1e-4)
    assert results["3x3"][1][0][2] != results["8x1"][1][0][2], "nine rows are not eight"


def test_rows_of_a_step_do_not_depend_on_where_training_begins():
    made = recipe(max_steps=25)
    data = rows()
    whole = list(loop.step_rows(data, made, 0, 25))
    for start in (1, 9, 10, 24):
        assert list(loop.step_rows(data, made, start, 25)) == whole[start:]
    epoch = [row.origin.line for step in whole[:10] for row in step]
    assert sorted(epoch) == list(range(1, 41))
    assert epoch != [row.origin.line for step in whole[10:20] for row in step]


@pytest.mark.parametrize("dtype,dropout", [("float32", 0.0), ("bfloat16", 0.0), ("float32", 0.2)])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, monkeypatch, dtype, dropout):
    made = recipe(save_steps=2, eval_steps=5, gradient_accumulation=2, batch_size=2, warmup=3, keep_checkpoints=20)
    held = rows(6, seed=1)
    _, whole, run = train(tmp_path / "whole", made, dtype=dtype, dropout=dropout, eval_rows=held)
    expected, log = weights(whole), run.log_rows()
    real = methods.losses()["sft"]
    for stop_at in (1, 2, 7, 11):
        folder = tmp_path / f"stopped-{stop_at}"
        calls = iter(range(10_000))

        def failing(*arguments, at=stop_at, calls=calls):
            if next(calls) // 2 == at:
                raise RuntimeError("killed")
            return real(*arguments)

        monkeypatch.setattr(step, "losses", lambda failing=failing: {"sft": failing})
        with pytest.raises(RuntimeError, match="killed"):
            train(folder, made, dtype=dtype, dropout=dropout, eval_rows=held)
        monkeypatch.setattr(step, "losses", lambda: {"sft": real})
        _, resumed, run = train(folder, made, dtype=dtype, dropout=dropout, eval_rows=held)
        assert same(expected, weights(resumed)), f"stopped in step {stop_at + 1}"
        timeless = ("tokens_per_second", "tokens_per_cpu_second", "peak_mb", "elapsed_seconds")
        cleaned = [
            [{k: v for k, v in row.items() if k not in timeless} for row in some] for some in (log, run.log_rows())
        ]
        assert cleaned[0] == cleaned[1]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, monkeypatch):
    made, before = recipe(), signal.getsignal(signal.SIGINT)
    _, whole, _ = train(tmp_path / "whole", made)
    real, calls = methods.losses()["sft"], iter(range(1000))

    def interrupted(*arguments):
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(step, "losses", lambda: {"sft": interrupted})
    with pytest.raises(Interrupted, match="step 5 of 12") as caught:
        train(tmp_path / "stopped", made)
    assert caught.value.exit_code == 130
    assert caught.value.fix.endswith(f"tunelet train --resume {tmp_path / 'stopped'}")
    assert checkpoint.steps(Run(tmp_path / "stopped")) == [5]
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(step, "losses", lambda: {"sft": real})
    _, resumed, _ = train(tmp_path / "stopped", made)
    assert same(weights(whole), weights(resumed))


def test_early_stopping_restores_the_best_weights(tmp_path):
    """A rate that destroys what was learned: held-out loss falls, then rises; the best weights come back."""
    held = rows(12, seed=1)
    made = recipe(
        max_steps=60, eval_steps=2, early_stopping=2, learning_rate=0.3, schedule="constant", warmup=40, max_grad_norm=0
    )
    trained, built, run = train(tmp_path / "run", made, eval_rows=held)
    losses = [row["held_out_loss"] for row in run.log_rows() if "held_out_loss" in row]
    assert trained.steps < 60
    assert losses[-1] > min(losses) and losses[-2] > min(losses)
    assert trained.best_loss == min(losses) == trained.held_out_loss < losses[0]
    assert step.Stepper(built, None, made, "cpu").held_out(held)[0] == pytest.approx(min(losses), rel=1e-5)


def test_early_stopping_resumes_the_same(tmp_path, monkeypatch):
    held = rows(12, seed=1)
    made = recipe(
        max_steps=60, eval_steps=2, early_stopping=2, learning_rate=0.3, schedule="constant", warmup=40, save_steps=3
    )
    trained, whole, _ = train(tmp_path / "whole", made, eval_rows=held)
    assert trained.steps < 60
    real, calls = methods.losses()["sft"], iter(range(1000))

    def failing(*arguments):
        if next(calls) == trained.steps - 2:
            raise RuntimeError("killed")
        return real(*arguments)

    monkeypatch.setattr(step, "losses", lambda: {"sft": failing})
    with pytest.raises(RuntimeError):
        train(tmp_path / "killed", made, eval_rows=held)
    monkeypatch.setattr(step, "losses", lambda: {"sft": real})
    again, resumed, _ = train(tmp_path / "killed", made, eval_rows=held)
    assert again.steps == trained.steps and same(weights(whole), weights(resumed))
    # a run that had already stopped early stays stopped
    once_more, same_again, _ = train(tmp_path / "killed", made, eval_rows=held)
    assert once_more.steps == trained.steps and same(weights(whole), weights(same_again))


def test_nan_stops_with_a_clear_error_and_leaves_the_checkpoint(tmp_path, monkeypatch):
    real, calls = methods.losses()["sft"], iter(range(1000))

    def broken(*arguments):
        loss, told = real(*arguments)
        return loss * (float("nan") if next(calls) == 6 else 1.0), told

    monkeypatch.setattr(step, "losses", lambda: {"sft": broken})
    with pytest.raises(TuneletError, match="step 7") as caught:
        train(tmp_path / "run", recipe(save_steps=3))
    assert "learning_rate" in caught.value.fix and "step-000006" in caught.value.fix
    run = Run(tmp_path / "run")
    assert checkpoint.latest(run) == "step-000006"
    tensors, state = checkpoint.load(run, "step-000006")
    assert state["step"] == 6 and all(tensor.isfinite().all() for tensor in tensors.values())


def test_a_step_without_targets_names_the_row(tmp_path):
    bad = [Tokens((1, 2, 3), (True, False, False), ((0, 3, "user"),), Origin("bad.jsonl", 7))]
    with pytest.raises(TuneletError) as caught:
        train(tmp_path / "run", recipe(max_steps=1), train_rows=bad)
    assert "bad.jsonl, line 7" in str(caught.value)


@pytest.mark.parametrize("where", ["tensors", "rename"])
def test_disk_full_leaves_the_last_checkpoint(tmp_path, monkeypatch, where):
    real_write, real_replace, saves = checkpoint._write_tensors, type(tmp_path).rename, iter(range(100))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(tensors, path):
        if next(saves) == 1:
            path.write_bytes(b"half")
            raise full
        real_write(tensors, path)

    def rename(path, target):
        if str(target).endswith("step-000006"):
            raise full
        return real_replace(path, target)

    if where == "tensors":
        monkeypatch.setattr(checkpoint, "_write_tensors", write)
    else:
        monkeypatch.setattr(type(tmp_path), "rename", rename)
    with pytest.raises(TuneletError, match="Cannot write") as caught:
        train(tmp_path / "run", recipe(save_steps=3))
    assert "full" in caught.value.why
    run = Run(tmp_path / "run")
    assert checkpoint.steps(run) == [3]
    assert checkpoint.load(run, "step-000003")[1]["step"] == 3
    monkeypatch.undo()
    _, resumed, _ = train(tmp_path / "run", recipe(save_steps=3))
    _, whole, _ = train(tmp_path / "whole", recipe(save_steps=3))
    assert same(weights(whole), weights(resumed))


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    made = recipe(save_steps=3, max_steps=3)
    train(tmp_path / "run", made)
    os.chmod(tmp_path / "run" / "checkpoints", 0o500)
    with pytest.raises(TuneletError, match="Cannot write"):
        checkpoint.save(Run(tmp_path / "run"), 9, {}, {}, keep=1)


def test_read_only_file_system(tmp_path, monkeypatch):
    def refuse(*arguments, **kw):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run = run_of(tmp_path / "run", recipe())
    monkeypatch.setattr(checkpoint, "_write_tensors", refuse)
    with pytest.raises(TuneletError, match="Cannot write") as caught:
        checkpoint.save(run, 1, {}, {}, keep=1)
    assert "read-only" in caught.value.why and checkpoint.steps(run) == []


def test_checkpoints_are_kept_to_n_and_a_damaged_one_is_named(tmp_path):
    _, _, run = train(tmp_path / "run", recipe(save_steps=2, keep_checkpoints=3))
    assert checkpoint.steps(run) == [8, 10, 12]
    path = run.folder / "checkpoints" / "step-000012" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TuneletError, match="step-000012") as caught:
        train(tmp_path / "run", recipe(save_steps=2, keep_checkpoints=3))
    assert "step 10" in caught.value.fix


def test_plain_lines_in_a_pipe_and_a_bar_on_a_terminal(tmp_path):
    import io

    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        train(tmp_path / str(terminal), recipe(eval_steps=6), eval_rows=rows(4, seed=1), console=console)
        text = console.file.getvalue()
        assert "held-out loss" in text and "tokens/s" in text
        assert ("\x1b[" in text) == terminal
        if not terminal:
            assert "step 12/12" in text and "left 0 s" in text


def test_state_json_is_readable(tmp_path):
    _, _, run = train(tmp_path / "run")
    state = json.loads((run.folder / "checkpoints" / "step-000012" / "state.json").read_text())
    assert state["step"] == 12 and state["tokens"] > 0

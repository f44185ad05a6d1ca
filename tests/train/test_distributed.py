"""Several processes: two equal one (ddp and fsdp), however a step is cut; resumed equals uninterrupted; another number
of processes goes on; rows are divided evenly; an error in one process ends all with one message."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_docs import blocks

import tunelet
from tunelet import cli
from tunelet.data.examples import Origin, Tokens
from tunelet.errors import TuneletError
from tunelet.models import device
from tunelet.recipe import Recipe
from tunelet.train import distributed, follow, loop, prepare, run, sharding

FLOAT32 = ["--set", "model.dtype=float32", "--set", "train.max_steps=4", "--set", "train.save_steps=2"]


def start(*arguments, cwd: Path | None = None) -> subprocess.Popen:
    """torchrun with these arguments."""
    env = {**os.environ, "PYTHONPATH": str(Path(tunelet.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.Popen(command, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def output(child: subprocess.Popen) -> str:
    """All that it prints; it has to end well."""
    try:
        told, _ = child.communicate(timeout=240)
    finally:
        child.terminate()  # torchrun then ends its processes
    assert child.returncode == 0, told
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What processes.py leaves behind."""
    out = tmp_path_factory.mktemp("processes")
    output(start("--standalone", "--nproc-per-node", 2, Path(__file__).with_name("processes.py"), out))
    return out


@pytest.fixture(scope="module")
def figures(folder) -> dict:
    return json.loads((folder / "figures.json").read_text())


ALIKE = ["full", "1x8", "2x4", "cut", "lora", "thin lora", "prompt", "prefix", "few", "best"]
ALIKE += [f"{a} onward with {b}: {case}" for case in ("full", "lora") for a, b in ((1, 2), (2, 1))]


@pytest.mark.parametrize("way,case", [(w, c) for w in ("ddp", "fsdp") for c in (ALIKE[:-2] if w == "ddp" else ALIKE)])
def test_two_processes_equal_one_in_float32(figures, way, case):
    """Losses, gradient norms, held-out losses and the weights in the end, relative. "onward": a checkpoint of as many
    processes, gone on with by another number."""
    found = figures[way][case]
    assert found["loss"] < 2e-6 and found["held_out_loss"] < 2e-6 and found["weights"] < 3e-6
    assert found["grad_norm"] < 5e-6


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize("case", ["bfloat16", "narrow"])
def test_two_processes_are_close_to_one_in_bfloat16(figures, way, case):
    """Products are rounded to three digits, differently where rows are cut differently."""
    found = figures[way][case]
    assert found["loss"] < 2e-3 and found["held_out_loss"] < 2e-3 and found["weights"] < 0.05


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_all_at_one_step_and_resumed_equals_uninterrupted(figures, way):
    assert all(0 < step < 6 for step in figures[way]["stopped at"])
    assert figures[way]["resumed full"], "bit for bit"
    assert way == "ddp" or figures[way]["resumed lora"]


def test_a_mistake_in_one_process_ends_all_and_is_told_once(folder):
    told = json.loads((folder / "failing-1.json").read_text())
    assert told[0] == "TuneletError" and "process 1 alone" in told[1] and told[2] == 2
    assert json.loads((folder / "failing-0.json").read_text()) == ["SystemExit", "2", 2]


def row(length: int, number: int = 0) -> Tokens:
    return Tokens((1,) * length, (True,) * length, ((0, length, "text"),), Origin("a.jsonl", number))


def test_rows_are_divided_by_tokens_and_keep_their_order():
    rows = [row(length, i) for i, length in enumerate([9, 1, 1, 1, 5, 4, 3])]
    parts = distributed.divide(rows, 3)
    assert sorted(sum(len(r.ids) for r in part) for part in parts) == [7, 8, 9]
    assert sorted(r.origin.line for part in parts for r in part) == list(range(7))
    for part in parts:
        assert [r.origin.line for r in part] == sorted(r.origin.line for r in part)
    assert parts == distributed.divide(rows, 3)
    assert [len(part) for part in distributed.divide(rows[:1], 3)] == [1, 0, 0]
    assert distributed.divide(rows, 1) == [rows]


def test_alone_nothing_is_joined(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    with distributed.joined() as world:
        assert world is distributed.ALONE and world.first
        assert world.sums(1.5, 2) == [1.5, 2] and world.told({"a": 1}) == {"a": 1}
    import torch.distributed

    assert not torch.distributed.is_initialized()


# -- the command line, as docs/scale.md shows it ----------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny_model_folder) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Light {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(30)
    ]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny_model_folder, tmp_path / "MODEL")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documented(word: str) -> list[str]:
    """The arguments of the one command in docs/scale.md with this word in it."""
    (line,) = [line for block in blocks("docs/scale.md") for line in block if word in line]
    return shlex.split(line)[1:]


def alike(a: Path, b: Path) -> bool:
    one, two = load_file(a), load_file(b)
    return one.keys() == two.keys() and all(torch.allclose(one[k], two[k], rtol=1e-4, atol=2e-6) for k in one)


def test_two_processes_on_the_command_line_and_one_that_goes_on(workplace):
    told = output(start(*documented("--out runs/two"), *FLOAT32))
    assert "2 processes, ddp (weights, gradients and optimizer state take" in told
    assert told.count("Saved runs/two/model.") == 1, "one process speaks"
    single = documented("--out runs/two")
    single = single[single.index("train") : -1]
    assert cli.main([*single, "runs/one", *FLOAT32]) == 0
    two = workplace / "runs" / "two"
    assert alike(two / "model" / "model.safetensors", workplace / "runs" / "one" / "model" / "model.safetensors")
    assert {path.name for path in two.iterdir()} == {path.name for path in (workplace / "runs" / "one").iterdir()}
    choice = json.loads((two / "env.json").read_text())["choice"]
    assert choice["processes"] == 2 and "shared by 2 processes" in choice["reasons"]["threads"]
    # as if it had been stopped after step 2
    shutil.move(two / "model", workplace / "whole")
    shutil.rmtree(two / "checkpoints" / "step-000004")
    (two / "DONE").unlink()
    assert cli.main(documented("--resume")) == 0
    assert alike(two / "model" / "model.safetensors", workplace / "whole" / "model.safetensors")
    assert json.loads((two / "env.json").read_text())["choice"]["processes"] == 1


def test_two_machines_share_no_disk(workplace, loopback):
    """Two torchruns, each in a folder of its own, meet at an address and shard an adapter and its base: the run is in
    one of the folders."""
    with socket.socket() as free:
        free.bind((loopback, 0))
        endpoint = f"{loopback}:{free.getsockname()[1]}"
    arguments = [endpoint if part == "FIRST:29500" else part for part in documented("--nnodes")]
    machines = [workplace / name for name in ("one", "two")]
    for machine in machines:
        machine.mkdir()
        shutil.copytree(workplace / "MODEL", machine / "MODEL")
        shutil.copy(workplace / "my.jsonl", machine)
    more = [*FLOAT32, "--adapter", "lora", "--set", "train.parallel=fsdp"]
    children = [start(*arguments, *more, cwd=machine) for machine in machines]
    told = "".join([output(child) for child in children])
    there = [machine for machine in machines if (machine / "runs").exists()]
    assert len(there) == 1 and (there[0] / "runs" / "many" / "DONE").exists()
    assert told.count("2 processes, fsdp (asked for)") == told.count("Saved runs/many/adapter.") == 1
    single = arguments[arguments.index("train") : -1]
    assert cli.main([*single, "runs/one", *more]) == 0
    saved = "adapter/adapter_model.safetensors"
    assert alike(there[0] / "runs" / "many" / saved, workplace / "runs" / "one" / saved)


def test_other_verbs_refuse_several_processes(monkeypatch, capsys):
    for rank in ("0", "1"):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        if rank == "0":
            assert cli.main(["align", "starter"]) == 2
        else:
            with pytest.raises(SystemExit, match="2"):
                cli.main(["align", "starter"])
    told = capsys.readouterr().err
    assert told.count("tunelet align runs in one process, and torchrun started 2") == 1 and "fix:" in told


def test_threads_are_shared_and_torchruns_one_is_not_a_wish(monkeypatch):
    monkeypatch.setattr(device, "_threads_per_core", lambda: 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert device.choose("cpu", "bfloat16").threads == 4
    assert device.choose("cpu", "bfloat16", 3).threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert device.choose("cpu", "bfloat16").threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert device.choose("cpu", "bfloat16").threads == 1, "alone it is one"


def test_what_does_not_fit_is_sharded(monkeypatch, tiny_model):
    """By weights (4 bytes here), gradients (4) and optimizer state (12), against the memory of each process."""
    world, settings = distributed.World(0, 2, 0, 2), Recipe().train
    need = 20 * sum(p.numel() for p in tiny_model.parameters())
    chosen = []
    monkeypatch.setattr(sharding, "shard", lambda *_: chosen.append("fsdp"))
    monkeypatch.setattr(distributed.World, "told", lambda self, value: value)
    for megabytes, expected in ((2 * need / 0.69e6, []), (2 * need / 0.71e6, ["fsdp"])):
        monkeypatch.setattr(sharding, "memory_mb", lambda megabytes=megabytes: megabytes)
        sharding.shard_if_wanted(tiny_model, settings, "cpu", world, Console(quiet=True))
        assert chosen == expected
    settings.parallel = "ddp"
    assert sharding.shard_if_wanted(tiny_model, settings, "cpu", world, Console(quiet=True)) is None


def test_eight_bit_moments_are_not_sharded(tiny_model):
    settings = Recipe().train
    settings.parallel, settings.optimizer_state = "fsdp", "float8"
    with pytest.raises(TuneletError, match="does not go with"):
        sharding.shard_if_wanted(tiny_model, settings, "cpu", distributed.World(0, 2, 0, 2), Console(quiet=True))


def test_a_follower_prepares_the_same_rows_or_says_so(tmp_path, monkeypatch):
    """First training from random weights: the tokenizer that process 0 has trained is sent, not trained again."""
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"The light in room {n} is on, and the fan is off." for n in range(80)))
    recipe = Recipe.model_validate(
        {
            "method": "pretrain",
            "model": {"path": ""},
            "tokenizer": {"vocab_size": 300},
            "data": {"train": [str(file)], "max_length": 32},
        }
    )
    folder, said, trained = tmp_path / "tokenizer", [], {}
    prepared = prepare.prepare(recipe, folder)
    monkeypatch.setattr(distributed, "world", lambda: distributed.World(0, 2, 0, 2))
    monkeypatch.setattr(distributed.World, "told", lambda self, value: said.append(json.dumps(value)))
    follow.tell_recipe(recipe)
    follow.tell_settled(recipe, device.Choice("cpu", "float32", 1), prepared, folder)
    monkeypatch.setattr(distributed, "world", lambda: distributed.World(1, 2, 1, 2))
    monkeypatch.setattr(run, "load_for_training", lambda *_: None)
    monkeypatch.setattr(loop, "train", lambda *_, **given: trained.update(given))
    monkeypatch.setattr("tunelet.train.tokenizer.train_tokenizer", lambda *_: pytest.fail("trained again"))
    for changed in (False, True):
        if changed:
            file.write_text(file.read_text() + " More.")
        waiting = [json.loads(value) for value in said]
        monkeypatch.setattr(distributed.World, "told", lambda self, waiting=waiting: waiting.pop(0))
        if changed:
            with pytest.raises(TuneletError, match="Process 1 has read other rows than process 0"):
                follow.follow()
        else:
            follow.follow()
    assert [list(r.ids) for r in trained["train_rows"]] == [list(r.ids) for r in prepared.train_rows]
    assert len(trained["eval_rows"]) == len(prepared.eval_rows) > 0

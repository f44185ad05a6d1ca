"""Several processes: two equal one (ddp and fsdp), however a step is cut; resumed equals uninterrupted; another number
of processes goes on; rows are divided evenly; an error in one process ends all with one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tunelet
from tunelet.data.examples import Origin, Tokens
from tunelet.train import distributed

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(tunelet.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def torchrun(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*TORCHRUN, *map(str, arguments)], env=environment(), capture_output=True, text=True, timeout=300, **options
    )


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict:
    told = torchrun(Path(__file__).with_name("processes.py"), tmp_path_factory.mktemp("processes"))
    assert told.returncode == 0, told.stdout + told.stderr
    return json.loads(told.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "case",
    ["full", "1x8", "2x4", "cut", "checkpointing", "lora", "thin lora", "few"]
    + [f"{a} onward with {b}: {case}" for a, b in ((1, 2), (2, 1)) for case in ("full", "lora")],
)
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
    assert figures[way]["resumed full"] and figures[way]["resumed lora"], "bit for bit"


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

"""kill -9 at random instants, resumed each time: the end is bit-identical to a run that was never killed.

TUNELET_KILLS sets how many instants are tried (3 by default; the full acceptance check uses 10).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import tunelet

CHILD = """
import sys
from pathlib import Path
from rich.console import Console
from tunelet.recipe import Recipe
from tunelet.train.run import run_training
folder, data, out = sys.argv[1:]
recipe = Recipe.model_validate({
    "method": "pretrain",
    "model": {"path": folder, "dtype": "bfloat16", "threads": 1},
    "data": {"train": [data], "max_length": 32, "eval_rows": 4},
    "train": {"batch_size": 4, "gradient_accumulation": 2, "max_steps": 60, "learning_rate": 3e-3, "save_steps": 4,
    "eval_steps": 10,
              "log_steps": 5, "seed": 11},
})
print("ready", flush=True)
run_training(recipe, Path(out), console=Console())
"""


def start(*arguments):
    env = {**os.environ, "PYTHONPATH": str(Path(tunelet.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_killed_at_random_instants_ends_bit_identical(tiny_model_folder, tmp_path):
    words = "the little light kitchen is on and off again at seven evening".split()  # noqa: SIM905
    rng = random.Random(5)
    data = tmp_path / "text.jsonl"
    data.write_text("".join(json.dumps({"text": " ".join(rng.choices(words, k=30))}) + "\n" for _ in range(120)))
    whole = start(tiny_model_folder, data, tmp_path / "whole")
    began = time.monotonic()
    _, err = whole.communicate(timeout=240)
    assert whole.returncode == 0, err
    seconds = time.monotonic() - began
    expected = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    kills, stopped_in = int(os.environ.get("TUNELET_KILLS", "3")), []
    target = tmp_path / "killed"
    for _ in range(kills):
        child = start(tiny_model_folder, data, target)
        child.stdout.readline()  # imports are over
        time.sleep(rng.uniform(0.05, max(0.3, 0.6 * seconds)) / 2)
        child.kill()
        child.communicate()
        finished = (target / "DONE").exists()
        stopped_in.append("finished" if finished else len(list(target.glob("checkpoints/step-*"))))
        if finished:  # try again with a new folder: this instant was too late
            target = tmp_path / f"killed-{len(stopped_in)}"
    last = start(tiny_model_folder, data, target)
    _out, err = last.communicate(timeout=240)
    assert last.returncode == 0, f"{stopped_in}: {err}"
    found = load_file(target / "model" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected), stopped_in
    assert not list(target.rglob(".tmp-*"))
    steps = [json.loads(line)["step"] for line in (target / "log.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]

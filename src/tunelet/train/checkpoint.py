"""Checkpoints of a run: everything that training needs to go on as if it had never stopped, whole on the disk or not
there at all.

Not the finished model (models/save.py). A checkpoint is `checkpoints/step-000200/` with state.safetensors (fp32 weights
and moments) and state.json (cursor, counters). The rounding noise, the order of rows and dropout are functions of
(seed, step): nothing of them is stored. With several processes the files are the same: process 0 alone writes and reads
them, whole, so that any number of processes can go on.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet.errors import TuneletError
from tunelet.runs.record import Run

if TYPE_CHECKING:
    import torch

    from tunelet.train.distributed import World
    from tunelet.train.optimizer import AdamW
    from tunelet.train.sharding import Shards

FOLDER = "checkpoints"
BEST = "best"


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of one training. All its processes make each call at the same step; run: None but in process 0."""

    run: Run | None
    optimizer: AdamW
    world: World
    shards: Shards | None

    def save(self, step: int, state: dict[str, Any], keep: int) -> None:
        tensors = self._whole(self.optimizer.state())
        if self.run:
            save(self.run, step, tensors, state, keep=keep)

    def go_on(self) -> dict[str, Any] | None:
        """Put the newest checkpoint back, and return its state; None where there is none yet."""
        name = latest(self.run) if self.run else None
        tensors, state = load(self.run, name) if name else ({}, None)
        state = self.world.told(state)
        if state is not None:
            self.optimizer.load_state(self._parts(self.optimizer.state(), tensors), state["step"])
        return state

    def save_best(self, step: int) -> None:
        tensors = self._whole(self.optimizer.weights())
        if self.run:
            save(self.run, step, tensors, {}, keep=1, name=BEST)

    def load_best(self) -> None:
        tensors = load(self.run, BEST)[0] if self.run else {}
        self.optimizer.load_weights(self._parts(self.optimizer.weights(), tensors))

    def finish(self) -> None:
        """The end of the training: the model that was trained holds the optimizer's weights, whole."""
        if self.shards is None:
            self.optimizer.finish()
            return
        weights = self.shards.gathered(self.optimizer.weights())
        self.optimizer.finish()
        self.shards.restore(weights)

    def _whole(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.shards.gathered(tensors) if self.shards else tensors

    def _parts(self, mine: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return self.shards.scattered(mine, given) if self.shards else self.world.shared(mine, given)


def save(
    run: Run, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], *, keep: int, name: str | None = None
) -> Path:
    """Write a checkpoint under a temporary name, sync it, rename it, and then remove all but the newest `keep`.

    Raises TuneletError where the disk is full or read-only; the checkpoints that were there stay as they are.
    """
    target = f"{FOLDER}/{name or f'step-{step:06d}'}"
    with run.folder_in_the_making(target) as folder:
        _write_tensors(tensors, folder / "state.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n", encoding="utf-8")
    if name is None:
        for old in steps(run)[:-keep]:
            shutil.rmtree(run.folder / FOLDER / f"step-{old:06d}")
    return run.folder / target


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from tunelet.models.save import disk_error

    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise disk_error(error) from error


def steps(run: Run) -> list[int]:
    """Steps of the run's checkpoints, rising."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in (run.folder / FOLDER).glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def latest(run: Run) -> str | None:
    """Name of the newest checkpoint, None where there is none."""
    found = steps(run)
    return f"step-{found[-1]:06d}" if found else None


def load(run: Run, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint. Raises TuneletError where it was damaged after it was written."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = run.folder / FOLDER / name
    try:
        return load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (SafetensorError, json.JSONDecodeError, FileNotFoundError, UnicodeDecodeError) as error:
        raise TuneletError(
            f"The checkpoint {folder} cannot be read.",
            why=f"{error}; it was changed after it was written, or the disk is failing",
            fix=f"Delete that folder and run the same command again: it goes on from {_before(run, name)}.",
        ) from error


def _before(run: Run, name: str) -> str:
    older = [step for step in steps(run) if f"step-{step:06d}" != name]
    return f"step {older[-1]}" if older else "the start"

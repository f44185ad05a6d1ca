"""Checkpoints of a run: everything that training needs to go on as if it had never stopped, whole on the disk or not
there at all.

Not the finished model (models/save.py). A checkpoint is `checkpoints/step-000200/` with state.safetensors (fp32 weights
and moments) and state.json (cursor, counters). The rounding noise, the order of rows and dropout are functions of
(seed, step): nothing of them is stored.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet.errors import TuneletError
from tunelet.runs.record import Run

if TYPE_CHECKING:
    import torch

FOLDER = "checkpoints"
BEST = "best"


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

"""Predicted against actual, over the runs of a folder and over all runs of this machine: `tunelet plan --history`.

Not for predicting (train/plan.py). What each finished training predicted and took is also kept in
~/.cache/tunelet/history.jsonl (or $XDG_CACHE_HOME), so that it is known from anywhere; deleting that file is safe.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunelet.runs.record import PLAN_KEYS, Run, is_run

MOST_LINES = 2000  # of the machine's file that are read


@dataclass(frozen=True)
class Line:
    """One run. errors: by key of PLAN_KEYS, predicted / actual - 1, where both are known."""

    name: str
    predicted: dict[str, float]
    actual: dict[str, float]
    errors: dict[str, float]


def cache() -> Path:
    """Where tunelet keeps what it may measure again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tunelet"


def note(run: Run) -> None:
    """Add a finished training to the machine's file. Where that cannot be written the run itself still has it."""
    told = run.read_json("plan.json", {})
    if not (told.get("predicted") and told.get("actual")):
        return
    line = {"run": str(run.folder.resolve()), "predicted": told["predicted"], "actual": told["actual"]}
    with contextlib.suppress(OSError):
        cache().mkdir(parents=True, exist_ok=True)
        with (cache() / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def lines(folders: Sequence[Path]) -> list[Line]:
    """Of every run in or below the folders (one level), then of the machine's file, each run once."""
    found: dict[str, Line] = {}
    for folder in folders:
        for place in [folder, *(sorted(folder.iterdir()) if folder.is_dir() else [])]:
            if is_run(place):
                told = Run.open(place).read_json("plan.json", {})
                _add(found, str(place.resolve()), str(place), told)
    for told in _kept():
        _add(found, str(told.get("run")), str(told.get("run")), told)
    return list(found.values())


def _kept() -> Iterable[dict[str, Any]]:
    file = cache() / "history.jsonl"
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines()[-MOST_LINES:]:
        with contextlib.suppress(json.JSONDecodeError):  # cut short by a kill
            told = json.loads(line)
            if isinstance(told, dict):
                yield told


def _add(found: dict[str, Line], key: str, name: str, told: dict[str, Any]) -> None:
    predicted, actual = told.get("predicted"), told.get("actual")
    if key in found or not (isinstance(predicted, dict) and isinstance(actual, dict)):
        return
    errors = {
        key: predicted[key] / actual[key] - 1
        for key in PLAN_KEYS
        if isinstance(predicted.get(key), int | float) and actual.get(key)
    }
    found[key] = Line(name, predicted, actual, errors)


def median(told: Sequence[Line]) -> dict[str, float]:
    """By key the median of the errors' sizes."""
    sizes = {key: [abs(line.errors[key]) for line in told if key in line.errors] for key in PLAN_KEYS}
    return {key: statistics.median(values) for key, values in sizes.items() if values}

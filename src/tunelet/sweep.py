"""A sweep: the cells of a grid, each an `align` run in DIR/cells/NAME, predicted first, and held against each other.

Not for the grid (sweep_grid.py), the judging (sweep_judge.py) or how it is shown (commands/sweep.py,
runs/sweep_page.py). sweep.json is written after every cell; a sweep killed at any instant goes on with the same call
and repeats nothing that is finished.
"""

from __future__ import annotations

import gc
import json
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet import stages, sweep_judge
from tunelet.align import align
from tunelet.errors import TuneletError
from tunelet.recipe import BASELINE_KEYS, EvalSection, Recipe
from tunelet.runs import lock, sweep_page
from tunelet.runs.files import LOCK, TEMPORARY, disk, finite, write_atomically
from tunelet.runs.record import Run, is_run
from tunelet.sweep_grid import Cell, Grid, asked
from tunelet.train import run as training
from tunelet.train.progress import duration

if TYPE_CHECKING:
    from rich.console import Console

NAME = "sweep.json"
CELLS = "cells"
FORMAT = 1
WAITING, RUNNING, FINISHED, LEFT_OUT, FAILED = "waiting", "running", "finished", "left out", "failed"
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}

Told = dict[str, Any]


class Stopped(TuneletError):
    """The sweep was asked to stop; what is finished stays."""

    exit_code = 130


def seconds_of(text: str) -> float:
    """Seconds of a budget like 45m, 2h, 90s or 1h30m. Raises TuneletError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([hms])", text.lower())
    total = sum(float(number) * UNITS[unit] for number, unit in parts)
    if not total or re.sub(r"(\d+(?:\.\d+)?)\s*[hms]\s*", "", text.lower()).strip():
        raise TuneletError(
            f"--budget {text}: is not a length of time",
            why="it needs a unit, and more than nothing" if re.fullmatch(r"[\d.]+", text) or parts else "",
            fix="write for example --budget 45m, 2h, 90s or 1h30m",
        )
    return total


# -- the folder -------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Told | None:
    """What sweep.json of a folder says; None where there is none. Raises TuneletError where it cannot be read."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TuneletError(
            f"{path} is not valid JSON.",
            why=str(error),
            fix="It was changed by hand; restore it, or take another --out.",
        ) from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise TuneletError(f"{path} is of another version of tunelet.", fix="Take another --out.")
    return told


def matches(told: Told, grid: Grid) -> bool:
    """Whether every cell of the sweep in a folder is one of the grid's, by name and recipe; the grid may have more."""
    return not _strangers(told, grid)


def unfinished(folder: Path, grid: Grid) -> bool:
    """Whether a folder holds a sweep of just this grid that has something left to do."""
    told = read(folder)
    same = told is not None and matches(told, grid) and len(told["cells"]) == len(grid.cells)
    return same and any(one["state"] != FINISHED for one in told["cells"])


def _strangers(told: Told, grid: Grid) -> list[str]:
    mine = {cell.name: finite(asked(cell.recipe)) for cell in grid.cells}
    return [one["name"] for one in told["cells"] if mine.get(one["name"]) != one["asked"]]


def _open(grid: Grid, out: Path) -> Told:
    """What is known of the sweep in `out`. Raises TuneletError where the folder holds something else."""
    told = read(out)
    if told is None:
        names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
        others = [name for name in names if name != LOCK and not name.startswith(TEMPORARY)]
        if others or out.is_file():
            raise TuneletError(
                f"{out} is not a sweep's folder.",
                why=f"it holds {', '.join(others[:3])}" if others else "it is a file",
                fix="Choose an --out that does not exist yet.",
            )
    elif strangers := _strangers(told, grid):
        raise TuneletError(
            f"{out} holds a sweep of another grid.",
            why=f"these of its cells are not in this one, or differ: {', '.join(strangers[:6])}",
            fix="Give the same settings to go on (more choices may be added), or choose another --out.",
        )
    known = {one["name"]: one for one in told["cells"]} if told else {}
    fresh = {"state": WAITING, "why": "", "predicted": None, "figures": None}
    cells = [
        {"name": cell.name, "folder": f"{CELLS}/{cell.name}", "varied": cell.varied, "asked": asked(cell.recipe)}
        | {key: known.get(cell.name, fresh)[key] for key in fresh}
        for cell in grid.cells
    ]
    for one in cells:
        folder = out / one["folder"]
        done = is_run(folder) and Run.open(folder).status == "finished"
        if one["state"] != FINISHED or not done:
            one |= {"state": WAITING, "figures": None}
    dimensions = {key: list(of) for key, of in grid.dimensions.items()}
    return {"format": FORMAT, "dimensions": dimensions, "notes": list(grid.notes), "cells": cells}


def _write(told: Told, out: Path) -> None:
    with disk(out):
        write_atomically(out / NAME, json.dumps(finite(told), ensure_ascii=False, indent=1) + "\n")


# -- predicting -------------------------------------------------------------------------------------------------------


def predict(cells: Sequence[tuple[Cell, Told]], out: Path, console: Console) -> None:
    """Fill in "predicted" of each cell that has none: seconds of training, peak_mb, disk_mb, trained, fits (memory).

    Data is prepared anew only where a cell's differs. Raises TuneletError for what is wrong with a cell's data or
    model.
    """
    todo = [pair for pair in cells if pair[1]["predicted"] is None]
    seen: dict[str, Any] = {}
    for number, (cell, one) in enumerate(todo, 1):
        console.print(f"Predicting {number} of {len(todo)}: {cell.name}", markup=False, highlight=False)
        try:
            one["predicted"] = _predicted(cell, out / one["folder"], seen)
        except TuneletError as error:
            raise TuneletError(f"cell {cell.name}: {error.what}", why=error.why, fix=error.fix) from error


def _predicted(cell: Cell, folder: Path, seen: dict[str, Any]) -> Told:
    from tunelet.models import load, weights
    from tunelet.train import fit

    first, made = cell.recipe, []
    for stage in stages.of(cell.recipe, cell.origins, folder):
        recipe = stage.recipe.model_copy(deep=True)
        if made:  # the run it goes on from does not exist yet: a model of the same shape stands for it
            recipe.model.path = first.model.path
            if not recipe.model.path:
                break
        recipe, _ = training.resolve(recipe, stage.origins)
        parts = recipe.method.name, recipe.train.seed, recipe.model, recipe.tokenizer, recipe.data
        key = json.dumps([part if isinstance(part, (str, int)) else part.model_dump() for part in parts], default=str)
        if key not in seen:
            seen[key] = training.looked_at(recipe)
        prepared, choice = seen[key]
        made.append(fit.make(recipe, choice, prepared.tokenizer, prepared.train_rows, prepared.eval_rows, folder))
    path = first.model.path
    return {
        "seconds": sum(one.prediction.seconds for one in made),
        "peak_mb": max(one.prediction.peak_mb for one in made),
        "disk_mb": sum(one.prediction.disk_mb for one in made),
        "trained": made[0].cost.trained,
        "parameters": weights.count_parameters(load.resolve(path)) if path else made[0].cost.parameters,
        "fits": all(one.fits for one in made),
    }


# -- running ----------------------------------------------------------------------------------------------------------


def sweep(grid: Grid, out: Path, console: Console, *, budget: float | None = None, show: Any = None) -> Told:
    """Predict and run the cells of a grid in `out`, and return what sweep.json says (also where cells failed).

    The cheapest first. budget: seconds; a cell that is predicted to take longer than what is left of it is left out.
    show: called with what is known, once all is predicted. Goes on with a sweep in `out`: finished cells stay as they
    are. Raises TuneletError for mistakes found before anything is trained, Stopped after Ctrl-C.
    """
    began = time.monotonic()
    first = _open(grid, out)
    predict(list(zip(grid.cells, first["cells"], strict=True)), out, console)
    with lock.held(out):  # which makes the folder: a mistake found before leaves none behind
        told = _open(grid, out)  # once more: another process may have worked here since
        pairs = list(zip(grid.cells, told["cells"], strict=True))
        for (_, one), before in zip(pairs, first["cells"], strict=True):
            one["predicted"] = before["predicted"]
        _write(told, out)
        if show is not None:
            show(told)
        todo = [pair for pair in pairs if pair[1]["state"] != FINISHED]
        for _, one in pairs:
            if one["state"] == FINISHED:  # what the run itself says is the truth
                one["figures"] = sweep_judge.figures(out / one["folder"], one["predicted"])
                console.print(f"Finished before: {one['name']}", markup=False, highlight=False)
        todo.sort(key=lambda pair: (not is_run(out / pair[1]["folder"]), pair[1]["predicted"]["seconds"]))
        try:
            _run_all(todo, told, out, console, None if budget is None else began + budget)
        except KeyboardInterrupt:
            raise _stopped(told, out, "") from None
        except TuneletError as error:
            if error.exit_code != Stopped.exit_code:
                raise
            raise _stopped(told, out, f" ({error.what})") from None
        told |= {"metrics": sweep_judge.metrics(told), "verdicts": sweep_judge.verdicts(told)}
        _write(told, out)
        sweep_page.write(told, out)
    return told


def evaluating(told: Told) -> float:
    """Seconds that a cell takes beside its training, as the finished cells show; 0 before one is."""
    figures = [one["figures"] for one in told["cells"] if one["figures"]]
    return statistics.median(of["seconds"] - of["training_seconds"] for of in figures) if figures else 0.0


def _run_all(todo: Sequence[tuple[Cell, Told]], told: Told, out: Path, console: Console, until: float | None) -> None:
    """until: of the monotonic clock; None: all of them run."""
    for number, (cell, one) in enumerate(todo, 1):
        left = None if until is None else until - time.monotonic()
        needed = one["predicted"]["seconds"] + evaluating(told)
        if left is not None and needed > left:
            one |= {"state": LEFT_OUT, "why": f"predicted {duration(needed)}, {duration(max(0.0, left))} left"}
            console.print(f"Left out: {one['name']} ({one['why']})", style="yellow", markup=False, highlight=False)
            _write(told, out)
            continue
        one |= {"state": RUNNING, "why": ""}
        _write(told, out)
        words = f"Cell {number} of {len(todo)}: {one['name']}"
        console.print(words, style="bold", markup=False, highlight=False)
        try:
            recipe, origins = unprompted(cell)
            align(recipe, out / one["folder"], console, origins=origins)
            one |= {"state": FINISHED, "figures": sweep_judge.figures(out / one["folder"], one["predicted"])}
        except (TuneletError, MemoryError) as error:
            if isinstance(error, TuneletError) and error.exit_code == Stopped.exit_code:
                raise
            one |= {"state": FAILED, "why": str(error) or "not enough memory"}
            console.print(f"Failed: {one['name']}: {one['why']}", style="red", markup=False, highlight=False)
        _write(told, out)
        gc.collect()  # models of finished cells, held in circles, would count as the next one's memory


def unprompted(cell: Cell) -> tuple[Recipe, dict[str, str]]:
    """A cell's recipe and origins, without prompts of the start model: cells are held against each other, and the
    prompts would be the same in each. Where eval.baselines is asked for they stay."""
    recipe, origins = cell.recipe.model_copy(deep=True), dict(cell.origins)
    if origins.get("eval.baselines", "default") == "default":
        recipe.eval.baselines = False
        origins["eval.baselines"] = "off in a sweep"
        for key in BASELINE_KEYS:  # which nobody reads then
            setattr(recipe.eval, key, EvalSection.model_fields[key].default)
            origins[f"eval.{key}"] = "default"
    return recipe, origins


def _stopped(told: Told, out: Path, why: str) -> Stopped:
    where = ""
    for one in told["cells"]:
        if one["state"] == RUNNING:
            one["state"], where = WAITING, f" in cell {one['name']}"
    _write(told, out)
    done = sum(one["state"] == FINISHED for one in told["cells"])
    return Stopped(
        f"Stopped{where}{why}; {done} of {len(told['cells'])} cells are finished.", fix="Go on with the same command."
    )

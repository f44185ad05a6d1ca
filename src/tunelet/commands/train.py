"""The verbs that train: demo, align, train. Which steps a run takes is decided in `align.py` and `train/`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tunelet.commands.common import (
    METHODS,
    Adapter,
    Columns,
    Data,
    Json,
    Model,
    Out,
    Sets,
    choose_out,
    flags_of,
    load_recipe,
    open_console,
    write_json,
)
from tunelet.errors import TuneletError, did_you_mean


def demo(out: Out = None, sets: Sets = None, json_to: Json = None) -> None:
    """Align the model that ships with tunelet and show before and after. Needs no network and a few minutes.

    The run goes to runs/starter; to runs/starter-2, ... after finished runs. The same command after a crash goes on.
    """
    _align("starter", out, sets, json_to)


def align(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file (write one: tunelet recipe init).")],
    model: Model = None,
    data: Data = None,
    columns: Columns = None,
    adapter: Adapter = None,
    sets: Sets = None,
    out: Out = None,
    json_to: Json = None,
) -> None:
    """From a recipe to a report: check the data, evaluate, tune, evaluate again, show before and after."""
    _align(recipe, out, sets, json_to, flags_of(model, data, columns, adapter))


def train(
    method: Annotated[
        str | None, typer.Argument(metavar="METHOD", help="pretrain, sft, dpo, orpo, simpo or kto.")
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", metavar="FILE", help="A recipe to start from.")] = None,
    model: Model = None,
    data: Data = None,
    columns: Columns = None,
    adapter: Adapter = None,
    sets: Sets = None,
    out: Out = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", metavar="DIR", help="Go on with this unfinished run; nothing else is needed."),
    ] = None,
    json_to: Json = None,
) -> None:
    """Train a model: on plain text (pretrain), conversations (sft), pairs of answers (dpo, orpo, simpo) or answers with
    verdicts (kto). The same command after a crash goes on.

    Several processes or GPUs: torchrun --nproc-per-node N -m tunelet train ... (docs/scale.md).
    """
    from tunelet.train import distributed

    with distributed.joined() as world:
        if world.first:
            _first(method, recipe, model, data, columns, adapter, sets, out, resume, json_to)
        else:
            from tunelet.train import follow

            follow.follow()


def _first(
    method: str | None,
    recipe: str | None,
    model: str | None,
    data: list[str] | None,
    columns: list[str] | None,
    adapter: str | None,
    sets: list[str] | None,
    out: Path | None,
    resume: Path | None,
    json_to: str | None,
) -> None:
    console = open_console(json_to)
    if resume is not None:
        given = {"METHOD": method, "--recipe": recipe, "--model": model, "--data": data, "--column": columns,
                 "--adapter": adapter, "--set": sets, "--out": out}  # fmt: skip
        if extra := [name for name, value in given.items() if value]:
            raise TuneletError(
                f"--resume {resume}: does not go with {', '.join(extra)}",
                why="a resumed run keeps its own recipe, so that it ends as it would have without the stop",
                fix=f"tunelet train --resume {resume}",
            )
        _resume(resume, console, json_to)
        return
    if method is None and recipe is None:
        raise TuneletError(
            "which method?", fix=f"tunelet train sft (one of {', '.join(METHODS)}), or tunelet train --resume DIR"
        )
    if method is not None and method not in METHODS:
        raise TuneletError(
            f"there is no method '{method}'.{did_you_mean(method, METHODS)}",
            fix=f"the methods are {', '.join(METHODS)}",
        )
    loaded = load_recipe(recipe, sets, {"METHOD": ("method.name", method), **flags_of(model, data, columns, adapter)})
    if loaded.recipe.then:
        console.print(f"Only {recipe} is trained: what it names in `then` is for tunelet align.", markup=False)
        loaded.recipe.then = []
    folder = choose_out(out, loaded.recipe, console)
    _train(loaded.recipe, folder, loaded.origins, console, json_to)


def _align(
    file: str, out: Path | None, sets: list[str] | None, json_to: str | None, flags: dict[str, Any] | None = None
) -> None:
    console = open_console(json_to)
    loaded = load_recipe(file, sets, flags)
    folder = choose_out(out, loaded.recipe, console)
    from tunelet.align import align as run_align

    summary = run_align(loaded.recipe, folder, console, origins=loaded.origins)
    write_json(summary, json_to)


def _resume(folder: Path, console: Any, json_to: str | None) -> None:
    from tunelet.runs.record import Run

    run = Run.open(folder)
    if run.status == "finished":
        raise TuneletError(
            f"{folder}: this run is finished, there is nothing to go on with",
            fix=f"train further from it with: tunelet train {run.recipe().method.name} --model {folder} --out OTHER",
        )
    console.print(f"[bold]Going on with the {run.status} run in {folder}[/]")
    _train(run.recipe(), folder, run.origins(), console, json_to)


def _train(recipe: Any, folder: Path, origins: dict[str, str], console: Any, json_to: str | None) -> None:
    from tunelet.train.run import run_training

    run = run_training(recipe, folder, origins=origins, console=console)
    write_json(run.read_json("DONE", {}) | {"run": str(run.folder)}, json_to)

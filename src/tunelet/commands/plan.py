"""The verb plan: what a training will take, whether it fits, and what would make it fit. Foretold in train/fit.py."""

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
    flags_of,
    free_folder,
    load_recipe,
    open_console,
    write_json,
)
from tunelet.errors import TuneletError


def plan(
    recipe: Annotated[
        list[str] | None, typer.Argument(metavar="RECIPE", help="A recipe file, or a method: sft, dpo, ...")
    ] = None,
    model: Model = None,
    data: Data = None,
    columns: Columns = None,
    adapter: Adapter = None,
    sets: Sets = None,
    out: Out = None,
    history: Annotated[
        bool, typer.Option("--history", help="Predicted against actual of the runs in runs/ (or the folders given).")
    ] = False,
    json_to: Json = None,
) -> None:
    """How long will it take, and will it fit? Time, memory, disk and energy of a training, before it starts.

    Exit code 1 where it does not fit in this machine's memory or disk as it is now.
    """
    console = open_console(json_to)
    if history:
        _history([Path(folder) for folder in recipe or ["runs"]], console, json_to)
        return
    if not recipe or len(recipe) > 1:
        raise TuneletError("which recipe?", fix="tunelet plan RECIPE, tunelet plan sft, or tunelet plan --history")
    method = recipe[0] if recipe[0] in METHODS else None
    flags = {"METHOD": ("method.name", method), **flags_of(model, data, columns, adapter)}
    loaded = load_recipe(None if method else recipe[0], sets, flags)
    if loaded.recipe.then and json_to != "-":
        console.print(f"Only {recipe[0]} is planned, not what it names in `then`.", markup=False, highlight=False)
    from tunelet.train import fit
    from tunelet.train import run as training

    asked, origins = training.resolve(loaded.recipe, loaded.origins)
    prepared, choice = training.looked_at(asked)
    made = fit.make(
        asked, choice, prepared.tokenizer, prepared.train_rows, prepared.eval_rows, out or free_folder(asked)
    )
    figures = _figures(made, choice)
    if json_to != "-":
        _show(made, choice, origins, console)
    write_json(figures, json_to)
    if not (made.fits and made.fits_disk):
        raise typer.Exit(1)


def _figures(made: Any, choice: Any) -> dict[str, Any]:
    told, room = made.prediction, made.room
    return {
        "predicted": told.figures(),
        "energy_kind": "estimated",
        "fits": {"memory": made.fits, "disk": made.fits_disk},
        "room": {"memory_free_mb": room.free_mb, "memory_mb": room.total_mb, "disk_mb": room.disk_mb},
        "advice": made.advice,
        "chosen": {
            "device": choice.device,
            "dtype": choice.dtype,
            "threads": choice.threads,
            **{key: getattr(made.recipe.train, key.partition(".")[2]) for key in made.settled},
        },
        "reasons": {**choice.reasons, **made.origins},
        "steps": made.work.steps,
        "tokens": told.tokens,
        "parameters": made.cost.parameters,
        "trained_parameters": made.cost.trained,
        "seconds_by_part": told.parts_seconds,
        "memory_by_part_mb": told.parts_mb,
        "calibration_seconds": made.measured_seconds,
        "notes": list(made.notes),
    }


def _show(made: Any, choice: Any, origins: dict[str, str], console: Any) -> None:
    from rich.table import Table

    from tunelet.train.progress import duration

    told, room, cost, settings = made.prediction, made.room, made.cost, made.recipe.train

    def parts(of: dict[str, float], text: Any) -> str:
        return ", ".join(f"{name} {text(value)}" for name, value in of.items() if value)

    def fits(good: bool, free: float | None) -> str:
        return "" if free is None else f"{'fits: ' if good else 'TOO LITTLE: '}{free / 1e3:,.1f} GB free; "

    table = Table(box=None, show_header=False, pad_edge=False)
    rows = [
        ("time", duration(told.seconds), parts(told.parts_seconds, duration)),
        ("memory", f"{told.peak_mb / 1e3:,.2f} GB", fits(made.fits, room.free_mb)
         + parts(told.parts_mb, lambda mb: f"{mb / 1e3:.2f}")),
        ("disk", f"{told.disk_mb / 1e3:,.2f} GB", fits(made.fits_disk, room.disk_mb) + "model and checkpoints"),
        ("energy", f"{told.energy_wh:.3g} Wh", "estimated"),
        ("work", f"{made.work.steps:,} steps",
         f"{told.tokens:,} tokens; {cost.trained / 1e6:,.1f}M of {cost.parameters / 1e6:,.1f}M parameters are trained"),
        ("device", f"{choice.device}, {choice.dtype}", choice.reasons.get("dtype", "")),
        ("threads", str(choice.threads), choice.reasons.get("threads", "")),
        ("learning rate", f"{settings.learning_rate:.3g}", origins.get("train.learning_rate", "")),
        *((key.partition(".")[2].replace("_", " "), str(getattr(settings, key.partition(".")[2])),
           made.origins.get(key, "asked for").removeprefix("default: ")) for key in made.settled),
    ]  # fmt: skip
    for what, value, why in rows:
        table.add_row(what, f"[bold]{value}[/]", f"[dim]{why}[/]")
    console.print(table, soft_wrap=False)
    took = f"measured in {made.measured_seconds:.0f} s on this machine, cut down to a few layers"
    console.print(f"All of it predicted, {took}.", markup=False)
    for note in made.notes:
        console.print(f"Note: {note}.", style="yellow", markup=False)
    if not made.fits:
        console.print(
            f"To make it fit, add: {made.advice}"
            if made.advice
            else "Nothing that tunelet knows makes it fit: take a smaller model, or a smaller data.max_length.",
            style="yellow",
            markup=False,
        )


def _history(folders: list[Path], console: Any, json_to: str | None) -> None:
    from rich.table import Table

    from tunelet.runs import history
    from tunelet.train.progress import duration

    told = history.lines(folders)
    middle = history.median(told)
    table = Table(title="Predicted and actual", title_justify="left")
    shown = {"seconds": ("time", duration), "peak_mb": ("memory", lambda mb: f"{mb:,.0f} MB")}
    table.add_column("run", overflow="fold")
    for title, _ in shown.values():
        table.add_column(title, justify="right")
    for name in ("disk", "energy"):
        table.add_column(name, justify="right")
    for line in told:
        cells = [
            f"{text(line.predicted[key])}, was {text(line.actual[key])} ({line.errors[key]:+.0%})"
            if key in line.errors
            else "-"
            for key, (_, text) in shown.items()
        ]
        rest = [f"{line.errors[key]:+.0%}" if key in line.errors else "-" for key in ("disk_mb", "energy_wh")]
        table.add_row(line.name, *cells, *rest)
    if json_to != "-":
        if not told:
            console.print("No run with a prediction was found.", markup=False)
        else:
            console.print(table, soft_wrap=False)
            every = ", ".join(f"{key} {value:.0%}" for key, value in middle.items())
            console.print(f"Median size of the error over {len(told)} runs: {every}.", markup=False)
    write_json({"runs": [vars(line) for line in told], "median_error": middle}, json_to)

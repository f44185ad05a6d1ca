"""The verb sweep: a grid of settings, each cell aligned, all held against each other. Run in sweep.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunelet.commands.common import (
    Adapter,
    Columns,
    Data,
    Json,
    Model,
    flags_of,
    open_console,
    print_wrapped,
    write_json,
)
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from tunelet.sweep_grid import Grid

STATES = ("waiting", "running", "left out", "failed")  # stand where a cell has no figures
Choices = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=A,B,C", help="A recipe key and its values; with one value, a setting. Repeat."),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The sweep's folder. Default: runs/sweep-NAME.")]


def sweep(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe file; without: defaults.")] = None,
    model: Model = None,
    data: Data = None,
    columns: Columns = None,
    adapter: Adapter = None,
    sets: Choices = None,
    out: Out = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", metavar="TIME", help="45m, 2h, 90s: cells predicted not to fit in are left out."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full/--no-full", help="One more cell that tunes all weights, where adapters vary.")
    ] = True,
    json_to: Json = None,
) -> None:
    """Which settings are best? Every combination of the values is predicted, aligned, and held against the others.

    For example: tunelet sweep my.toml --set adapter.kind=lora,dora --set adapter.rank=2,8,32 --budget 30m. Keys that
    hold lists take an array of arrays: --set 'adapter.target_modules=[["q_proj"],["q_proj","v_proj"]]'.

    The cheapest cells run first. The same command after a stop goes on. Exit code 1 where a cell failed.
    """
    console = open_console(json_to)
    from tunelet import sweep_grid

    grid = sweep_grid.make(recipe, sets or [], flags_of(model, data, columns, adapter), full=full)
    from tunelet import sweep as running

    seconds = running.seconds_of(budget) if budget is not None else None
    folder = out or _free_folder(grid)
    console.print(f"Sweep folder: {folder}, {len(grid.cells)} cells", markup=False)
    for note in grid.notes:
        print_wrapped(console, note)
    told = running.sweep(
        grid, folder, console, budget=seconds, show=lambda told: _show_predicted(told, seconds, console)
    )
    _show(told, folder, console)
    write_json(told, json_to)
    if any(one["state"] == running.FAILED for one in told["cells"]):
        raise typer.Exit(1)


def _free_folder(grid: Grid) -> Path:
    """runs/sweep-NAME, or the next free number after finished sweeps; an unfinished one of this grid is taken up."""
    from tunelet import sweep as running

    base = Path("runs") / f"sweep-{grid.name}"
    for number in range(1, 10_000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())) or running.unfinished(folder, grid):
            return folder
    raise TuneletError(f"{base}: 10,000 folders of that name are taken", fix="choose one with --out")


def _show_predicted(told: dict[str, Any], budget: float | None, console: Any) -> None:
    """What each cell will take, and all of them."""
    from tunelet.train.progress import duration

    todo = [one for one in told["cells"] if one["state"] != "finished"]
    if not todo:
        return
    titles = ["cell", "training", "memory", "disk", "trained"]
    rows = []
    for one in told["cells"]:
        of = one["predicted"]
        tight = "" if of["fits"] else " (more than is free)"
        cells = [one["name"] + ("" if one in todo else " (finished)"), duration(of["seconds"])]
        rows.append([*cells, f"{of['peak_mb']:,.0f} MB{tight}", f"{of['disk_mb']:,.1f} MB", f"{of['trained']:,}"])
    _print(titles, rows, 1, console, "Predicted")
    total = duration(sum(one["predicted"]["seconds"] for one in todo))
    words = f"Predicted in all: {total} of training, and the evaluations, whose time the first finished cell shows."
    words += " The cheapest cell runs first."
    if budget is not None:
        words += f" The budget is {duration(budget)}: what does not fit into what is left of it is left out."
    print_wrapped(console, words)


def _show(told: dict[str, Any], folder: Path, console: Any) -> None:
    from tunelet.runs import sweep_page

    columns, rows = sweep_page.table(told)
    stars = {"best": " *", "tied": " ~", "": ""}
    said = [[text + stars[mark] for text, mark in row] for row in rows]
    labels = sum(not column.number for column in columns)
    _print([column.title for column in columns], said, labels, console, "Sweep")
    if any(mark for row in rows for _, mark in row):
        console.print("* best, ~ its 95 % interval overlaps that of the best.", markup=False)
    for verdict in told["verdicts"]:
        print_wrapped(console, verdict["text"])
    for one in told["cells"]:
        if one["why"]:
            print_wrapped(console, f"{one['name']} {one['state']}: {one['why']}", "yellow")
    console.print(f"Page: {folder / sweep_page.NAME}", markup=False)


def _print(titles: list[str], rows: list[list[str]], left: int, console: Any, title: str) -> None:
    """A table on a terminal; in a pipe a line for each row. left: columns of words, which come first."""
    if not console.is_terminal:
        for row in rows:
            named = [(of, text) for of, text in zip(titles[1:], row[1:], strict=True) if text not in ("", "-")]
            said = "; ".join(text if text in STATES else f"{of} {text}" for of, text in named)
            console.print(f"{row[0]}: {said}", markup=False)
        return
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", pad_edge=False, box=box.SIMPLE_HEAD, show_edge=False)
    for place, column in enumerate(titles):
        table.add_column(column, justify="left" if place < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)

"""The verbs about recipes: show what a run would use and where each value comes from; write a first recipe."""

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
    Sets,
    column_map,
    flags_of,
    free_file,
    load_recipe,
    open_console,
    write_json,
)
from tunelet.errors import TuneletError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show a recipe's values, or write a first recipe.")


@app.command(short_help="Every value, and where it comes from.")
def show(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="A recipe file. Without: the defaults.")
    ] = None,
    model: Model = None,
    data: Data = None,
    columns: Columns = None,
    adapter: Adapter = None,
    sets: Sets = None,
    json_to: Json = None,
) -> None:
    """Every value a run would use, and where it comes from: default, recipe, --set or a flag."""
    console = open_console(json_to)
    loaded = load_recipe(recipe, sets, flags_of(model, data, columns, adapter))
    from tunelet.recipe_io import values
    from tunelet.recipe_text import inline

    rows: dict[str, Any] = {
        key: {"value": value, "origin": loaded.origins[key]} for key, value in values(loaded.recipe).items()
    }
    if json_to != "-":
        width = max(map(len, rows))
        for key, row in rows.items():
            line = f"{key:{width}}  {inline(row['value'])}"
            plain = row["origin"] == "default"
            console.print(f"{line:{width + 30}}  {row['origin']}", style="dim" if plain else "bold", markup=False)
    write_json(rows, json_to)


@app.command(short_help="Write a first recipe for your model and data.")
def init(
    model: Model = None,
    data: Data = None,
    columns: Columns = None,
    adapter: Adapter = None,
    method: Annotated[str, typer.Option(metavar="METHOD", help="pretrain, sft, dpo, orpo, simpo or kto.")] = "sft",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to write it. Default: print it.")
    ] = None,
) -> None:
    """Write a first recipe for your model and data: every key with its meaning, yours filled in."""
    from tunelet import recipe_io, recipe_text

    if method not in METHODS:
        raise TuneletError(f"there is no method '{method}'", fix=f"the methods are {', '.join(METHODS)}")
    given: dict[str, Any] = {
        "name": out.stem if out else "my-run",
        "method.name": method,
        "model.path": model or "starter",
    }
    given["data.train"] = data or ["starter"]
    if columns:
        given["data.columns"] = column_map(columns)
    if adapter:
        given["adapter.kind"] = adapter
    recipe_io.load(None, flags={f"--{key}": (key, value) for key, value in given.items()})  # refuse what could not load
    text = recipe_text.commented(given)
    if out is None:
        typer.echo(text, nl=False)
        return
    free_file(out)
    out.write_text(text, encoding="utf-8")
    typer.echo(f"Wrote {out}. Look at it, then: tunelet align {out}")

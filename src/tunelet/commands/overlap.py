"""The verb data overlap: which evaluation items stand in the training rows. Finding them is data/overlap.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunelet.commands.common import Json, bar, open_console, print_wrapped, write_json
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from rich.console import Console

    from tunelet.data.overlap import Overlap
    from tunelet.data.sources import Row

SHOWN = 20  # items named; --json has them all
ASKED = ("question", "prompt", "instruction", "ctx", "goal", "sentence", "premise", "input", "text")


def overlap(
    sources: Annotated[
        list[str] | None, typer.Argument(metavar="TRAIN ...", help="Training rows: starter, files, folders, hub ids.")
    ] = None,
    items: Annotated[
        list[str] | None, typer.Option("--items", metavar="FILE", help="Evaluation items. Repeat for more.")
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Which column of an item is its question. Default: question, prompt, ..."),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="RUN", help="A run of tunelet align: its training rows, and what it answered."),
    ] = None,
    json_to: Json = None,
) -> None:
    """Evaluation items that stand in the training rows: word for word, or with words changed. Rows are named.

    With --run also the scores without these items. Exit code 1 where there are any.
    """
    console = open_console(json_to)
    if bool(run) == bool(items) or (run and sources) or (items and not sources):
        raise TuneletError(
            "data overlap: which training rows, and which items?",
            fix="tunelet data overlap TRAIN.jsonl --items EVAL.jsonl, or tunelet data overlap --run RUN",
        )
    from tunelet.data import overlap as finding

    answered: list[dict[str, Any]] = []
    if run:
        sources, answered = _of_run(run)
    rows = [(str(row.origin), _text(row.value)) for source in sources or [] for row in _rows(source)]
    asked = [("\n".join(m["content"] for m in row["messages"] if m["role"] == "user"), row["item"]) for row in answered]
    for name in items or []:
        asked += [(_question(row.value, field, str(row.origin)), str(row.origin)) for row in _rows(name)]
    with bar(console, "Comparing") as progress:
        found = finding.find([text for _, text in rows], [text for text, _ in asked], lambda n: progress(n, len(rows)))
    names = [name for _, name in asked]
    figures = {
        "rows": len(rows),
        "items": len(asked),
        "too_short": len(found.short),
        "tainted": [
            {"item": names[m.item], "row": rows[m.row][0], "kind": m.kind, "share": m.share, "words": m.words}
            for m in found.matches
        ],
    }
    _tell(figures, found, console)
    if run:
        from tunelet.evals.tainted import cleaned

        table = cleaned(answered, found.tainted)
        figures["scores"] = [one.as_dict() for one in table]
        _tell_scores(table, console)
    write_json(figures, json_to)
    if found.matches:
        raise typer.Exit(1)


def _of_run(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """(sources of its training rows, the items that it answered)."""
    import json

    from tunelet.runs.record import Run

    run = Run.open(folder)
    path = run.folder / "eval" / "after.jsonl"
    if not path.is_file():
        raise TuneletError(
            f"{folder}: this run has answered nothing",
            why="there is no eval/after.jsonl",
            fix="take a run of tunelet align, or name rows and items: tunelet data overlap TRAIN --items FILE",
        )
    answered = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return run.recipe().data.train, [row for row in answered if row.get("messages")]


def _rows(source: str) -> Sequence[Row]:
    from tunelet.data import sources

    found = sources.read_rows(source)
    if not found.rows:
        raise TuneletError(f"{source}: holds no rows", fix="name a file with rows")
    return found.rows


def _text(value: Any) -> str:
    """All that a row says."""

    def parts(of: Any) -> Iterator[str]:
        if isinstance(of, str):
            yield of
        elif isinstance(of, dict):
            for inner in of.values():
                yield from parts(inner)
        elif isinstance(of, list):
            for inner in of:
                yield from parts(inner)

    return "\n".join(parts(value))


def _question(value: Any, field: str | None, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        keys = [field] if field else [key for key in ASKED if isinstance(value.get(key), str)]
        if keys and isinstance(value.get(keys[0]), str):
            return value[keys[0]]
        if field is None and isinstance(value.get("messages"), list):
            return "\n".join(str(m.get("content", "")) for m in value["messages"] if m.get("role") == "user")
        there = ", ".join(map(str, list(value)[:8]))
        raise TuneletError(f"{where}: which column is the question?", why=f"it has {there}", fix="--field COLUMN")
    raise TuneletError(f"{where}: not an item", why=f"it is {type(value).__name__}", fix="give rows of objects or text")


def _tell(figures: dict[str, Any], found: Overlap, console: Console) -> None:
    tainted = figures["tainted"]
    kinds = {kind: sum(one["kind"] == kind for one in tainted) for kind in ("verbatim", "8-gram", "fuzzy")}
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    share = len(tainted) / figures["items"] if figures["items"] else 0.0
    console.print(
        f"{len(tainted)} of {figures['items']:,} items ({share:.1%}) stand in the {figures['rows']:,} training rows"
        + (f": {told}." if told else "."),
        markup=False,
    )
    if found.short:
        console.print(f"{len(found.short)} items have too few words to tell.", markup=False)
    for one in tainted[:SHOWN]:
        line = f"{one['item']}  in  {one['row']}  ({one['kind']}, {one['share']:.0%}): {one['words']}"
        print_wrapped(console, line)
    if len(tainted) > SHOWN:
        console.print(f"... and {len(tainted) - SHOWN} more: --json FILE has them all.", markup=False)


def _tell_scores(table: Sequence[Any], console: Console) -> None:
    from rich.table import Table

    shown = Table(pad_edge=False)
    for number, title in enumerate(("", "all items", "without tainted", "tainted alone")):
        shown.add_column(title, justify="right" if number else "left")
    for one in table:
        cells = [
            "-" if of is None else f"{of.value:.1%} ({of.low:.1%}-{of.high:.1%}), n = {of.n}"
            for of in (one.all, one.clean, one.tainted)
        ]
        shown.add_row(one.metric, *cells)
    console.print(shown, soft_wrap=False)

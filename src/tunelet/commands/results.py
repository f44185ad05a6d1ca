"""The verbs about results: eval (score a model), report (write a run's page). Scoring is done in `evals/`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunelet.commands.common import (
    Columns,
    Device,
    Dtype,
    Json,
    Template,
    Trust,
    choice_of,
    column_map,
    open_console,
    open_engine,
    write_json,
)
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from rich.console import Console

TASKS = ("starter", "held_out")
RunOrModel = Annotated[
    str, typer.Argument(metavar="MODEL_OR_RUN", help="A run's folder, starter, a model folder or a hub id.")
]


def evaluate(
    model: RunOrModel,
    task: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="starter: does it do what is asked? held_out: loss and stop rate on --data. "
            "Default: held_out with --data, else starter.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="D", help="held_out: rows kept from training.")
    ] = None,
    want: Annotated[str, typer.Option(metavar="KIND", help="held_out: rows are chat or text.")] = "chat",
    items: Annotated[int, typer.Option(min=1, metavar="N", help="starter: held-out commands in each language.")] = 500,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="held_out: the first so many rows; 0: all.")] = 200,
    max_length: Annotated[
        int, typer.Option(min=8, metavar="N", help="held_out: tokens of a row; longer ones are cut.")
    ] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts answered at the same time.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")] = 128,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Which held-out commands of the starter are asked.")
    ] = 0,
    columns: Columns = None,
    template: Template = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    json_to: Json = None,
) -> None:
    """Score a model or a run; every figure with its 95 % interval."""
    console = open_console(json_to)
    task = task or ("held_out" if data else "starter")
    choice_of("--task", task, TASKS)
    if task == "held_out" and not data:
        raise TuneletError("--task held_out: which rows?", fix="name rows that were not trained on: --data FILE")
    if task == "starter" and data:
        raise TuneletError("--task starter has its own items", fix="leave out --data, or take --task held_out")
    loaded = _rows(data, want, columns, limit) if data else None  # its mistakes show before a model is loaded
    started = time.monotonic()
    engine = open_engine(model, device=device, dtype=dtype, trust=trust, template=template)
    figures: dict[str, Any] = {"model": model, "task": task}
    if loaded is None:
        from tunelet.evals import starter

        with _bar(console, "Answering") as progress:
            scored = starter.evaluate(
                engine, items=items, seed=seed, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
            )
        metrics, answered = scored.metrics, scored.items
    else:
        metrics, answered = _held_out(engine, loaded, max_length, max_new_tokens, batch_size)
    for name, found in metrics.items():
        console.print(
            f"{name:<20} {found['value']:8.3f}   {found['low']:.3f} to {found['high']:.3f}   n = {found['n']}"
        )
    write_json(figures | {"metrics": metrics, "seconds": time.monotonic() - started, "items": answered}, json_to)


def _rows(data: list[str], want: str, columns: list[str] | None, limit: int) -> list[Any]:
    from tunelet.data import formats

    choice_of("--want", want, ("chat", "text"))
    loaded = formats.load(data, want=want, columns=column_map(columns), limit=limit, split="test")
    errors = [str(finding) for finding in loaded.findings if finding.severity == "error"]
    if errors or not loaded.examples:
        listed = "\n".join(errors[:20]) + (f"\n... and {len(errors) - 20} more" if len(errors) > 20 else "")
        raise TuneletError(
            f"{', '.join(data)}: {len(errors)} rows can't be scored\n{listed}"
            if errors
            else f"{data[0]}: holds no rows",
            fix=f"mend or remove them; all that can be mended: tunelet data doctor {data[0]} --fix FILE",
        )
    return loaded.examples


def _held_out(
    engine: Any, examples: list[Any], max_length: int, max_new_tokens: int, batch_size: int
) -> tuple[dict[str, Any], list[Any]]:
    from tunelet.data.doctor_tokens import cut
    from tunelet.evals import held_out

    renderer = engine.renderer
    made = [renderer.chat(example) if hasattr(example, "messages") else renderer.text(example) for example in examples]
    length = min(max_length, engine.max_length or max_length)
    found = held_out.held_out_loss(engine.model, [cut(row, length) for row in made])
    if found is None:
        raise TuneletError("no row has a trained token left after the cut", fix="give a larger --max-length")
    answered = held_out.answers(engine, examples, max_new_tokens=max_new_tokens, batch_size=batch_size)
    stops = held_out.stop_rate(answered)
    return {"held_out_loss": found} | ({"stop_rate": stops} if stops else {}), answered


@contextlib.contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing in a pipe: the figures follow."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    json_to: Json = None,
) -> None:
    """Write (again) the run's report.html: one file, no network."""
    console = open_console(json_to)
    from tunelet.runs import report as page
    from tunelet.runs.record import Run

    path = page.write(Run.open(run))
    console.print(f"Wrote {path}", markup=False)
    write_json({"run": str(run), "report": str(path)}, json_to)

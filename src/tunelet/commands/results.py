"""The verbs about results: eval (score a model), report (write a run's page)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunelet.commands.common import (
    Columns,
    Device,
    Dtype,
    Json,
    Template,
    Trust,
    choice_of,
    open_console,
    write_json,
)

TASKS = ("starter", "loss")
RunOrModel = Annotated[
    str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder, starter, a model folder or a hub id.")
]


def evaluate(
    model: RunOrModel,
    task: Annotated[
        str, typer.Option(metavar="T", help="starter: does it do what is asked? loss: held-out loss of --data.")
    ] = "starter",
    data: Annotated[list[str] | None, typer.Option("--data", metavar="D", help="Held-out rows of task loss.")] = None,
    items: Annotated[int, typer.Option(min=1, help="starter: held-out commands in each language.")] = 500,
    limit: Annotated[int, typer.Option(min=0, help="loss: score the first so many rows; 0: all.")] = 200,
    max_length: Annotated[int, typer.Option(min=8, help="loss: tokens of a row.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts answered at the same time.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    columns: Columns = None,
    template: Template = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    json_to: Json = None,
) -> None:
    """Score a model or a run; every figure with its 95 % interval."""
    console = open_console(json_to)
    choice_of("--task", task, TASKS)
    raise NotImplementedError


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

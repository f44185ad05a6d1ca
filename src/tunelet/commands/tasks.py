"""`tunelet eval --task` for benchmarks and tasks of one's own: reads the rows, scores, prints and writes the figures.

Not for the starter, held-out rows and pairs (results.py). The work is done in `evals/`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunelet.commands.common import write_json
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from rich.console import Console

    from tunelet.evals.suite import Outcome

RunCode = Annotated[
    bool,
    typer.Option(
        "--run-code",
        help="humaneval, mbpp: run the programs that the model writes, each in a process limited in time and memory, "
        "without files, network or other processes. Off unless you ask.",
    ),
]


def listed(console: Console, own: dict[str, str], json_to: str | None) -> None:
    """`tunelet eval --tasks`: names, what they are, and where their rows come from. own: name -> words."""
    from tunelet.evals import tasks

    found = {name: tasks.load(name).task for name in tasks.shipped()}
    width = max(map(len, [*own, *found]))
    for name, told in own.items():
        console.print(f"{name:<{width}}  {told}", markup=False)
    for name, task in found.items():
        console.print(f"{name:<{width}}  {task.description}", markup=False)
    console.print("Rows come from the hub, or from your files: --data FOLDER. Your own task: --task FILE.toml")
    figures = {
        name: {"description": task.description, "kind": task.kind, "hub": task.rows.hub, "files": list(task.rows.files)}
        for name, task in found.items()
    }
    write_json({"tasks": figures | {name: {"description": told} for name, told in own.items()}}, json_to)


def check_length(max_new_tokens: int | None) -> None:
    """Raises TuneletError where the length of answers is asked for: a task says it."""
    if max_new_tokens is not None:
        raise TuneletError(
            "--max-new-tokens: a benchmark's task says how long an answer may be",
            fix="leave it out, or set max_new_tokens in a task file of your own",
        )


def evaluate(
    names: Sequence[str],
    data: Sequence[str],
    opened: Callable[[], Any],
    console: Console,
    *,
    model: str,
    num_fewshot: int | None,
    limit: int,
    only: Sequence[str],
    chat: bool,
    multiturn: bool,
    system: str,
    seed: int | None,
    batch_size: int,
    out: Path | None,
    run_code: bool,
    others: Sequence[str],
) -> dict[str, Any]:
    """The figures of these tasks. `opened` loads the model: after all rows were read, so that mistakes in them show at
    once. others: names of tasks that are not scored here, which a misspelt name may mean."""
    from tunelet.evals import code_task, suite, tasks
    from tunelet.evals.prompts import SEED, Style

    if multiturn and not chat:
        raise TuneletError("--multiturn goes with --chat", why="turns are the chat template's", fix="add --chat")
    if out is not None and out.exists() and not out.is_dir():
        raise TuneletError(f"--out {out}: is a file", fix="name a folder")
    for name in names:
        tasks.load(name, others)
    plan = suite.prepare(names, data, num_fewshot=num_fewshot, limit=limit, only=only)
    code_task.check([prepared.task for prepared in plan.tasks], run_code)
    engine = opened()
    style = Style(chat, multiturn, system, SEED if seed is None else seed)
    with _bar(console, len(plan.tasks)) as progress:
        outcome = suite.run(
            engine, plan, style, batch_size=batch_size, model_name=model, run_code=run_code, progress=progress
        )
    _show(console, outcome)
    figures: dict[str, Any] = {"results": outcome.results["results"], "metrics": outcome.metrics}
    if out is not None:
        path = suite.write(outcome, out)
        console.print(f"Wrote {path}, and each item beside it", markup=False)
        figures["out"] = str(path)
    figures["items"] = [
        {key: line[key] for key in line if key not in ("arguments", "doc", "doc_hash", "prompt_hash", "target_hash")}
        | {"task": name}
        for name, lines in outcome.samples.items()
        for line in lines
    ]
    return figures


@contextlib.contextmanager
def _bar(console: Console, number: int) -> Iterator[Callable[[str, int, int], None]]:
    """One bar over all tasks; its text is the task's name."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        whole = shown.add_task("tasks", total=number) if number > 1 else None
        part = shown.add_task("", total=None)
        seen: list[str] = []

        def progress(name: str, done: int, of: int) -> None:
            if name not in seen:
                seen.append(name)
                if whole is not None:
                    shown.update(whole, completed=len(seen) - 1)
                if not console.is_terminal:
                    at = f" (task {len(seen)} of {number})" if number > 1 else ""
                    console.print(f"{name}{at}: {of} answers to score", markup=False)
            shown.update(part, description=name, completed=done, total=of)

        yield progress


def _show(console: Console, outcome: Outcome) -> None:
    """A line for each figure; of a task with subsets its groups alone: all are in the files."""
    groups = outcome.results["groups"]
    inside = {name for group in groups for name in outcome.results["group_subtasks"][group]} - set(groups)
    few = len(inside) <= 12
    rows = [
        (f"{name}/{key.removesuffix(',none')}", value, outcome.metrics.get(f"{name}/{key.removesuffix(',none')}"))
        for name, figures in outcome.results["results"].items()
        if few or name not in inside
        for key, value in figures.items()
        if "," in key and "_stderr," not in key
    ]
    width = max(len(name) for name, _, _ in rows)
    for name, value, found in rows:
        interval = f"   {found['low']:.3f} to {found['high']:.3f}   n = {found['n']}" if found else ""
        console.print(f"{name:<{width}} {value:8.3f}{interval}", markup=False)

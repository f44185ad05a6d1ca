"""Which tasks and subsets will be run, and where the rows of each come from: all read and checked before a model is
loaded.

Not for what a row means (task_rows.py) nor for running (suite.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunelet.errors import TuneletError, did_you_mean
from tunelet.evals import task_rows, tasks
from tunelet.evals.task_rows import Item
from tunelet.evals.tasks import Loaded, Task

SHIPPED = Path(__file__).with_name("data")  # rows that come with tunelet


@dataclass(frozen=True)
class Prepared:
    """A task, or one subset of it, with its items. all_items: how many there are without --limit."""

    name: str
    alias: str
    loaded: Loaded
    items: list[Item]
    pool: list[Item]
    number: int
    same_rows: bool
    subset: str
    all_items: int
    source: str
    digest: str

    @property
    def task(self) -> Task:
        return self.loaded.task


@dataclass(frozen=True)
class Plan:
    """What will be run. groups: name -> names of tasks and groups in it, the outermost first."""

    tasks: list[Prepared]
    groups: dict[str, list[str]]


def prepare(
    names: Sequence[str],
    data: Sequence[str] = (),
    *,
    num_fewshot: int | None = None,
    limit: int = 0,
    only: Sequence[str] = (),
) -> Plan:
    """Read and check the rows of these tasks. data: a folder with the tasks' files, or the file of one task (a second
    one holds its examples); without, the hub. limit: the first so many items of each. only: subsets.

    Raises TuneletError where a task, file or row is not as it has to be.
    """
    chosen: list[Prepared] = []
    groups: dict[str, list[str]] = {}
    for name in names:
        _add(name, data, num_fewshot, limit, only, chosen, groups)
    return Plan(chosen, groups)


def _add(
    name: str,
    data: Sequence[str],
    num_fewshot: int | None,
    limit: int,
    only: Sequence[str],
    chosen: list[Prepared],
    groups: dict[str, list[str]],
) -> str:
    loaded = tasks.load(name)
    task = loaded.task
    if task.kind == "group":
        groups[task.name] = []
        groups[task.name] += [_add(m, data, num_fewshot, limit, only, chosen, groups) for m in task.members]
        return task.name
    if not task.subsets:
        if task.name not in [other.name for other in chosen]:
            chosen.append(_prepared(loaded, "", data, num_fewshot, limit))
        return task.name
    known = [subset for subsets in task.subsets.values() for subset in subsets]
    for subset in only:
        if subset not in known:
            raise TuneletError(
                f"task {task.name} has no subset '{subset}'.{did_you_mean(subset, known)}",
                fix=f"one of {', '.join(known)}",
            )
    groups[task.name] = []
    for group, subsets in task.subsets.items():
        kept = [subset for subset in subsets if not only or subset in only]
        if kept:
            groups[task.name].append(f"{task.name}_{group}")
            groups[f"{task.name}_{group}"] = [_name(task, subset) for subset in kept]
            chosen += [_prepared(loaded, subset, data, num_fewshot, limit) for subset in kept]
    return task.name


def _prepared(loaded: Loaded, subset: str, data: Sequence[str], num_fewshot: int | None, limit: int) -> Prepared:
    task = loaded.task
    number = task.fewshot.number if num_fewshot is None else num_fewshot
    if task.kind == "perplexity" and number:
        raise TuneletError(f"task {task.name}: a text has no examples before it", fix="leave out --num-fewshot")
    reader = task_rows.Reader(task, subset)
    source = _source(loaded, subset, data)
    found = task_rows.read(source, task.rows.columns)
    items = reader.items(found)
    pool, same = [], False
    if number:
        if task.fewshot.examples:
            shown = [(f"{loaded.source}, example {n}", dict(row)) for n, row in enumerate(task.fewshot.examples, 1)]
            pool = reader.items(task_rows.Read(shown, loaded.source))
        else:
            other = _fewshot_source(task, subset, data, source)
            same = other == source
            pool = items if same else reader.items(task_rows.read(other, task.rows.columns), f"{other} (examples)")
    name, kept = _name(task, subset), items[:limit] if limit else items
    return Prepared(
        name, subset or task.name, loaded, kept, pool, number, same, subset, len(items), source, found.digest
    )


def _name(task: Task, subset: str) -> str:
    return f"{task.name}_{subset.lower().replace('-', '_')}" if subset else task.name


def _source(loaded: Loaded, subset: str, data: Sequence[str]) -> str:
    task = loaded.task
    if data:
        path = Path(data[0]).expanduser()
        if not path.is_dir():
            if subset and path.exists():
                raise TuneletError(
                    f"--data {data[0]}: task {task.name} has many subsets, each with a file of its own",
                    fix=f"name the folder that holds them ({_patterns(task.rows.files)})",
                )
            return data[0]
        if not task.rows.files:
            return str(path)
        found = task_rows.find(task.rows.files, path, subset)
        if found is None:
            raise TuneletError(
                f"--data {data[0]}: holds no rows for task {task.name}{f', subset {subset}' if subset else ''}",
                why=f"looked for {_patterns(task.rows.files).replace('{subset}', subset)}",
                fix="name the folder that holds these files, or a file itself",
            )
        return str(found)
    if task.rows.hub:
        return _hub(task, subset, task.rows.split)
    beside = Path(loaded.source).parent if loaded.source.endswith((".toml", ".py")) else SHIPPED
    found = task_rows.find(task.rows.files, beside, subset)
    if found is None:
        raise TuneletError(
            f"task {task.name}: which rows?",
            why="it names no hub id, and no file of rows.files lies beside it" if task.rows.files else "it names none",
            fix="--data FILE, or rows.hub or rows.files in the task",
        )
    return str(found)


def _fewshot_source(task: Task, subset: str, data: Sequence[str], source: str) -> str:
    if len(data) > 1:
        return data[1]
    if data:
        folder = Path(data[0]).expanduser()
        if folder.is_dir() and task.fewshot.files:
            found = task_rows.find(task.fewshot.files, folder, subset)
            if found is None:
                raise TuneletError(
                    f"--data {data[0]}: holds no examples for task {task.name}{f', subset {subset}' * bool(subset)}",
                    why=f"looked for {_patterns(task.fewshot.files).replace('{subset}', subset)}",
                    fix="--num-fewshot 0, or name two files: --data ROWS --data EXAMPLES",
                )
            return str(found)
        return source
    return _hub(task, subset, task.fewshot.split) if task.rows.hub and task.fewshot.split else source


def _hub(task: Task, subset: str, split: str) -> str:
    config = task.rows.config.replace("{subset}", subset) or "default"  # the hub's own name for the only one
    return f"{task.rows.hub}:{config}:{split}"


def _patterns(files: Sequence[str]) -> str:
    return ", ".join(files)

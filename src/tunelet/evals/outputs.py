"""What an evaluation wrote, read again: results and items of `tunelet eval --out`, or of lm-eval with its samples.

Not for writing them (suite.py) and not for tests of two of them (versus.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError

Key = tuple[Any, ...]  # of an item: its number and the hash of its row


@dataclass(frozen=True)
class Task:
    """The items of one task. values: "metric,filter" -> item -> what was counted; asked: item -> hash of its
    prompt."""

    values: dict[str, dict[Key, Any]]
    asked: dict[Key, str]


@dataclass(frozen=True)
class Output:
    """One evaluation. results: its results file; groups: name -> its tasks, the outermost groups first; others: how
    many results of the same folder were not taken."""

    path: Path
    results: dict[str, Any]
    tasks: dict[str, Task]
    groups: dict[str, list[str]]
    others: int

    def higher_is_better(self, task: str, metric: str) -> bool:
        return self.results.get("higher_is_better", {}).get(task, {}).get(metric) is not False


def is_output(path: Path) -> bool:
    """Whether `path` is what an evaluation wrote: a folder or a results file. Reads nothing."""
    return path.suffix == ".json" if path.is_file() else bool(_files(path))


def _files(folder: Path) -> list[Path]:
    """The results in a folder, else in a folder below (lm-eval writes into one by the model's name)."""
    return sorted(folder.glob("results_*.json")) or sorted(folder.glob("*/results_*.json"))


def read(path: Path) -> Output:
    """The newest results there. Raises TuneletError where they can't be read, or have no items beside them."""
    files = [path] if path.is_file() else _files(path)
    if not files:
        raise TuneletError(
            f"{path}: holds no results", why="looked for results_*.json", fix="tunelet eval MODEL --task T --out DIR"
        )
    if len({file.parent for file in files}) > 1:
        found = ", ".join(str(folder) for folder in sorted({file.parent for file in files}))
        raise TuneletError(f"{path}: holds results of several models", why=found, fix="name one of these folders")
    file = files[-1]  # their names end in the date
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        leaves = list(results["n-samples"])
        metrics = {name: [key for key in results["results"][name] if _is_metric(key)] for name in leaves}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TuneletError(
            f"{file}: is no results file",
            why=f"{type(error).__name__}: {error}",
            fix="name a folder, or results_DATE.json, that tunelet eval --out or lm-eval wrote",
        ) from error
    date = file.stem.removeprefix("results_")
    places = {name: file.with_name(f"samples_{name}_{date}.jsonl") for name in leaves}
    if missing := [place.name for place in places.values() if not place.is_file()]:
        raise TuneletError(
            f"{file}: its items are not beside it ({missing[0]})",
            why="two results are compared item by item",
            fix="keep the samples files with the results; with lm-eval: --log_samples",
        )
    groups = {name: list(of) for name, of in results.get("group_subtasks", {}).items() if of}
    tasks = {name: _task(place, metrics[name]) for name, place in places.items()}
    return Output(path, results, tasks, groups, len(files) - 1)


def _is_metric(key: str) -> bool:
    return "," in key and "_stderr," not in key


def _task(file: Path, metrics: Sequence[str]) -> Task:
    task = Task({key: {} for key in metrics}, {})
    # splitlines() would cut at U+2028 and its like, which stand in rows
    for number, line in enumerate(file.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            item = (row["doc_id"], row["doc_hash"])
            task.asked[item] = row["prompt_hash"]
        except (ValueError, KeyError, TypeError) as error:
            raise TuneletError(
                f"{file}, line {number}: is no item of an evaluation",
                why=f"{type(error).__name__}: {error}",
                fix="it was changed after it was written: restore it, or evaluate again",
            ) from error
        for key in metrics:
            metric, _, name = key.partition(",")
            if row.get("filter", "none") == name and row.get(metric) is not None:
                task.values[key][item] = row[metric]
    return task


# Pairs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairing:
    """Items of a task that both have, as (first's key, second's key), and those that one alone has. by: "row" or,
    where the two programs wrote the rows differently, "prompt"."""

    both: list[tuple[Key, Key]]
    only_first: list[Key]
    only_second: list[Key]
    by: str = "row"


def pair(first: Task, second: Task) -> Pairing:
    """By number and row. Where no row is the same, as between lm-eval and tunelet, which adds columns: by number
    and prompt."""
    both = [(key, key) for key in first.asked if key in second.asked]
    by = "row"
    if not both:
        known = {(key[0], asked): key for key, asked in second.asked.items()}
        both = [(key, known[key[0], asked]) for key, asked in first.asked.items() if (key[0], asked) in known]
        by = "prompt" if both else by
    seen = {a for a, _ in both}, {b for _, b in both}
    return Pairing(
        both,
        [key for key in first.asked if key not in seen[0]],
        [key for key in second.asked if key not in seen[1]],
        by,
    )


# Settings ----------------------------------------------------------------------------------------------------------

WHOLE = {
    "chat_template": ("one was asked through the chat template and the other was not", bool),
    "fewshot_as_multiturn": ("examples are turns of the conversation in one of them", bool),
    "system_instruction": ("their system messages differ", lambda found: found or ""),
}


def cautions(first: Output, second: Output, names: Sequence[str]) -> list[str]:
    """Sentences on why the two may not be held against each other, and on what is in one alone."""
    out = []
    for one, name in zip((first, second), names, strict=True):
        if one.others:
            out.append(f"{name}: the folder holds {one.others + 1} results, and the newest is taken.")
    for key, (text, shape) in WHOLE.items():
        if shape(first.results.get(key)) != shape(second.results.get(key)):
            out.append(f"{text[0].upper()}{text[1:]}.")
    shared = [task for task in first.tasks if task in second.tasks]
    for key, text in (("n-shot", "examples before a question"), ("versions", "version of the task")):
        found = [[of.results.get(key, {}).get(task) for of in (first, second)] for task in shared]
        if differ := [(task, *of) for task, of in zip(shared, found, strict=True) if of[0] != of[1]]:
            listed = ", ".join(f"{task}: {a} and {b}" for task, a, b in differ[:3])
            out.append(f"They differ in the {text} ({listed}{_more(differ, 3)}).")
    limits = [(task, *(_limit(of, task) for of in (first, second))) for task in shared]
    if differ := [(task, a, b) for task, a, b in limits if a != b]:
        listed = ", ".join(f"{task}: {a or 'all'} and {b or 'all'}" for task, a, b in differ[:3])
        out.append(f"They differ in how many items were asked ({listed}{_more(differ, 3)}).")
    for place, (one, other) in enumerate(((first, second), (second, first))):
        if alone := [task for task in one.tasks if task not in other.tasks]:
            out.append(f"{names[place]} alone has {', '.join(alone[:5])}{_more(alone, 5)}.")
    return out + _of_items(first, second, names, shared)


def _of_items(first: Output, second: Output, names: Sequence[str], shared: Sequence[str]) -> list[str]:
    pairs = {task: pair(first.tasks[task], second.tasks[task]) for task in shared}
    plain = not any(of.results.get("chat_template") for of in (first, second))
    out = []
    for name, alone in (
        (names[0], {task: found.only_first for task, found in pairs.items() if found.only_first}),
        (names[1], {task: found.only_second for task, found in pairs.items() if found.only_second}),
    ):
        if alone:
            listed = [
                f"{task}: number {', '.join(str(key[0]) for key in keys[:3])}{_more(keys, 3)}"
                for task, keys in alone.items()
            ]
            number = sum(map(len, alone.values()))
            told = f"{'; '.join(listed[:3])}{_more(listed, 3)}"
            out.append(f"{number} items are in {name} alone and left out ({told}).")
    if other := [task for task, found in pairs.items() if found.by == "prompt"]:
        told = f"{', '.join(other[:3])}{_more(other, 3)}"
        out.append(f"Two programs wrote the rows of {told}, so items are paired by their prompts.")
    differ = {}
    for task, found in pairs.items():
        shots = [of.results.get("n-shot", {}).get(task) for of in (first, second)]
        if plain and shots[0] == shots[1]:
            differ[task] = sum(first.tasks[task].asked[a] != second.tasks[task].asked[b] for a, b in found.both)
    if any(differ.values()):
        listed = [f"{task}: {number} of {len(pairs[task].both)}" for task, number in differ.items() if number]
        out.append(f"Items were asked with another prompt ({', '.join(listed[:3])}{_more(listed, 3)}).")
    return out


def _limit(of: Output, task: str) -> int:
    """How many items were asked where these are not all; else 0."""
    counted: Mapping[str, int] = of.results["n-samples"][task]
    return counted["effective"] if counted.get("effective") != counted.get("original") else 0


def _more(found: Sequence[Any], shown: int) -> str:
    return f" and {len(found) - shown} more" if len(found) > shown else ""

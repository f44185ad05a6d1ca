"""A task's rows -> items with prompt, choices and the right answer, all checked before a model is loaded.

Not for how several of them become one context (prompts.py). Rows are read by data/sources.py; only tables without a
header are read here, because a task knows their columns' names.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError
from tunelet.evals import task_template
from tunelet.evals.task_template import BadRow
from tunelet.evals.tasks import Task

SHOWN = 10  # rows that an error lists


@dataclass(frozen=True)
class Item:
    """One question. doc: the row with the task's columns; where: its file and line. gold: number of the right choice;
    right: of each choice, whether it is right (tasks with `correct`); target: the text of the right answer, as it
    stands in examples; continuation: what is scored after every choice (partial scoring), else None."""

    number: int
    doc: dict[str, Any]
    where: str
    prompt: str
    choices: tuple[str, ...] = ()
    gold: int = -1
    right: tuple[bool, ...] = ()
    target: str = ""
    continuation: str | None = None


@dataclass(frozen=True)
class Read:
    """Raw rows with their places. source: file or hub id; digest: of its bytes; left_out: by rows.where."""

    rows: list[tuple[str, dict[str, Any]]]
    source: str
    digest: str = ""


class Reader:
    """Makes items of a task's rows; the templates are compiled once."""

    def __init__(self, task: Task, subset: str = ""):
        self.task, self.subset = task, subset
        self._set = {name: task_template.value(source, f"set.{name}") for name, source in task.set.items()}
        self._shapes = [
            (shape.has, {n: task_template.value(s, f"shapes.set.{n}") for n, s in shape.set.items()})
            for shape in task.shapes
        ]
        self._where = task_template.value(task.rows.where, "rows.where") if task.rows.where else None
        self._prompt = task_template.text(task.prompt, "prompt")
        self._continuation = task_template.text(task.continuation, "continuation") if task.continuation else None
        if isinstance(task.choices, str):
            self._choices: Any = task_template.value(task.choices, "choices")
        else:
            self._choices = [task_template.text(choice, "choices") for choice in task.choices]
        answer = task.answer
        self._answer = task_template.value(answer, "answer") if isinstance(answer, str) else (lambda _: answer)
        self._correct = task_template.value(task.correct, "correct") if task.correct else None

    def items(self, read: Read, what: str = "") -> list[Item]:
        """Raises TuneletError that names the rows which are wrong, or where none is left."""
        out, problems, left_out = [], [], 0
        columns: dict[tuple[str, ...], str] = {}
        for where, row in read.rows:
            columns.setdefault(tuple(sorted(row)), where)
            try:
                doc = self.doc(row)
                if self._where is not None and not self._where(doc):
                    left_out += 1
                    continue
                out.append(self.item(len(out), doc, where))
            except BadRow as bad:
                problems.append((where, f"{bad}" + (f" ({bad.fix})" if bad.fix else "")))
        if problems:
            raise self._told(read, problems, columns)
        if not out:
            raise TuneletError(
                f"task {self.task.name}: {what or read.source} has no items",
                why=f"rows.where leaves out all {left_out} rows" if left_out else "it holds no rows",
                fix="check the file, and rows.where of the task" if left_out else "name another file: --data FILE",
            )
        return out

    def _told(
        self, read: Read, problems: list[tuple[str, str]], columns: Mapping[tuple[str, ...], str]
    ) -> TuneletError:
        rows: dict[str, list[str]] = {}
        for where, problem in problems:
            rows.setdefault(problem, []).append(where)
        lines = [
            f"{', '.join(places[:3])}{f' and {len(places) - 3} more' if len(places) > 3 else ''}: {problem}"
            for problem, places in rows.items()
        ]
        more = f"\n... and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        listed = "\n".join(lines[:SHOWN]) + more
        why = ""
        if len(columns) > 1:
            (first, at), (second, where) = list(columns.items())[:2]
            differ = ", ".join(sorted(set(first) ^ set(second))[:8])
            why = f"the rows do not have the same columns: {at} and {where} differ in {differ}"
        return TuneletError(
            f"task {self.task.name}: {len(problems)} of {len(read.rows)} rows of {read.source} can't be used\n{listed}",
            why=why,
            fix="mend or remove these rows, or change the task's fields",
        )

    def doc(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with the task's own columns."""
        doc = {"subset": self.subset, **row}
        for has, columns in self._shapes:
            if all(column in row for column in has):
                for name, compute in columns.items():
                    doc[name] = compute(doc)
                break
        for name, compute in self._set.items():
            doc[name] = compute(doc)
        return doc

    def item(self, number: int, doc: dict[str, Any], where: str) -> Item:
        """Raises BadRow."""
        kind = self.task.kind
        prompt = self._prompt(doc)
        if kind == "perplexity":
            if not prompt:
                raise BadRow("the text is empty")
            return Item(number, doc, where, prompt)
        if kind == "generate":
            target = self._answer(doc)
            return Item(number, doc, where, prompt, target="" if target is None else str(target))
        choices, labels = self._choices_of(doc)
        continuation = self._continuation(doc) if self._continuation else None
        if self._correct is not None:
            right = self._right(doc, len(choices))
            gold = right.index(True)
        else:
            right, gold = (), gold_of(self._answer(doc), choices, labels)
        target = choices[gold] if continuation is None else continuation
        return Item(number, doc, where, prompt, choices, gold, right, target, continuation)

    def _choices_of(self, doc: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        labels: tuple[str, ...] = ()
        if isinstance(self._choices, list):
            found: Any = [choice(doc) for choice in self._choices]
        else:
            found = self._choices(doc)
            if isinstance(found, Mapping):
                if "text" not in found:
                    raise BadRow(f"choices is an object without text (it has {', '.join(map(str, found))})")
                labels = tuple(str(label).strip() for label in found.get("label", ()))
                found = found["text"]
        if isinstance(found, str) or not isinstance(found, Sequence):
            raise BadRow(f"choices is {type(found).__name__}, not a list", "name a column that holds a list")
        if bad := [choice for choice in found if not isinstance(choice, str | int | float)]:
            raise BadRow(f"a choice is {type(bad[0]).__name__}, not text")
        choices = tuple(str(choice) for choice in found)
        if len(choices) < 2:
            raise BadRow(f"has {len(choices)} choice{'s' * (len(choices) != 1)}: nothing to choose from")
        for number, choice in enumerate(choices):
            if not choice.strip():
                raise BadRow(f"choice {number} is empty")
        double = [choice for number, choice in enumerate(choices) if choice in choices[:number]]
        if double and self.task.duplicates == "error":
            raise BadRow(f"two choices are the same: {double[0][:60]!r}", 'or say duplicates = "keep" in the task')
        if labels and len(labels) != len(choices):
            raise BadRow(f"has {len(choices)} choices and {len(labels)} labels")
        return choices, labels

    def _right(self, doc: dict[str, Any], number: int) -> tuple[bool, ...]:
        found = self._correct(doc) if self._correct else ()
        if not isinstance(found, Sequence) or isinstance(found, str) or len(found) != number:
            raise BadRow(f"correct says {found!r} of {number} choices", "one value for each choice")
        right = tuple(bool(value) for value in found)
        if not any(right) or all(right):
            raise BadRow(f"{'all' if all(right) else 'none'} of its choices are right")
        return right


def gold_of(answer: Any, choices: Sequence[str], labels: Sequence[str]) -> int:
    """The number of the right choice: the answer is its number from 0, its label, its text, or its letter. Raises
    BadRow where it is none of these."""
    number = answer
    if isinstance(answer, str):
        told = answer.strip()
        if told in labels:
            number = labels.index(told)
        elif answer in choices:
            number = choices.index(answer)
        elif told.lstrip("-").isdecimal():
            number = int(told)
        elif len(told) == 1 and told.isascii() and told.isalpha():
            number = ord(told.upper()) - ord("A")
    elif isinstance(answer, float) and answer.is_integer():
        number = int(answer)
    if not isinstance(number, int):
        raise BadRow(
            f"the answer is {answer!r:.60}, which is no choice",
            f"the number of a choice from 0, {'one of ' + ', '.join(labels) if labels else 'its letter, or its text'}",
        )
    if not 0 <= number < len(choices):
        raise BadRow(
            f"the answer is {answer!r}: out of range",
            f"there are {len(choices)} choices, numbered from 0 to {len(choices) - 1}",
        )
    return int(number)


# Reading -----------------------------------------------------------------------------------------------------------


def find(patterns: Sequence[str], folder: Path, subset: str) -> Path | None:
    """The first file below `folder` that one of the patterns names, in their order."""
    for pattern in patterns:
        found = sorted(folder.glob(pattern.replace("{subset}", subset)))
        if found:
            return found[0]
    return None


def read(source: str, columns: Sequence[str] = ()) -> Read:
    """All rows of a file, folder or hub id. Raises TuneletError where one is broken or no object."""
    from tunelet.data import sources

    path = Path(source).expanduser()
    if columns and path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        bare = _without_header(path, columns)
        if bare is not None:
            return bare
    found = sources.read_rows(source)
    problems = [str(finding) for finding in found.findings if finding.severity == "error"]
    problems += [f"{row.origin}: is no object" for row in found.rows if not isinstance(row.value, Mapping | str)]
    if problems:
        listed = "\n".join(problems[:SHOWN])
        raise TuneletError(f"{source}: {len(problems)} rows can't be read\n{listed}", fix="mend or remove these rows")
    rows = [
        (str(row.origin), {"text": row.value} if isinstance(row.value, str) else dict(row.value)) for row in found.rows
    ]
    return Read(rows, source, next(iter(found.sha256.values()), ""))


def _without_header(path: Path, columns: Sequence[str]) -> Read | None:
    """Rows of a table whose first line is a row; None where it is a header: it has the columns with long names."""
    import hashlib

    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TuneletError(f"{path}, line {line}: not UTF-8 text", why=str(error), fix="save it as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    rows, problems, at = [], [], 1
    for cells in reader:
        where, at = f"{path}, line {at}", reader.line_num + 1
        if not rows and {name.lower() for name in columns if len(name) > 1} <= {cell.lower() for cell in cells}:
            return None
        if len(cells) == len(columns):
            rows.append((where, dict(zip(columns, cells, strict=True))))
        elif cells:
            problems.append(f"{where}: has {len(cells)} cells, not {len(columns)} ({', '.join(columns)})")
    if problems:
        listed = "\n".join(problems[:SHOWN])
        raise TuneletError(f"{path}: {len(problems)} rows can't be read\n{listed}", fix="mend or remove these rows")
    return Read(rows, str(path), hashlib.sha256(data).hexdigest())

"""Rows become examples: each row's format is detected by itself, converted, or refused with the reason and the fix.

Not for converting one row (from_rows.py), reading files (sources.py) or judging content (doctor.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunelet.data import pairs, sources
from tunelet.data.detect import Want, detect
from tunelet.data.examples import Counts, Example, Finding, Labelled, Origin, Preference, Text
from tunelet.data.from_rows import FORMATS
from tunelet.data.pairs import first
from tunelet.data.shapes import Bad, columns_fix, loaded
from tunelet.errors import TuneletError, did_you_mean

ROLES = {
    "messages": "a list of messages",
    "prompt": "what is asked: text, or messages",
    "input": "more of the prompt, put after it",
    "completion": "the answer",
    "system": "the system message",
    "tools": "descriptions of tools",
    "thinking": "the reasoning before the answer",
    "text": "plain text",
    "chosen": "the better answer",
    "rejected": "the worse answer",
    "label": "whether the answer is good",
}
SYNONYMS = {
    **{name: "prompt" for name in ("instruction", "question", "user", "query", "q", "human")},
    **{name: "completion" for name in ("answer", "response", "output", "assistant", "a", "target", "gpt")},
    "conversations": "messages",
    "context": "input",
    "document": "text",
    "accepted": "chosen",
}
MAIN_ROLES = {"messages", "prompt", "completion", "text", "chosen", "rejected"}


@dataclass(frozen=True)
class Loaded:
    """Everything the sources held: `examples` in order, and for each row that gave none a finding of its reason.

    A row that makes several examples (a list of rejected answers, instances, a pair as two verdicts) counts as so many.
    """

    examples: list[Example]
    counts: Counts
    findings: list[Finding]
    formats: dict[str, int]
    sha256: dict[str, str]


def _refuse_pairs(row: Mapping[str, Any], name: str) -> None:
    """Raises Bad for a row with two answers or a verdict where a chat is wanted; the fix names the row's columns."""
    good, asked = first(row, (*pairs.CHOSEN, "response_j")), first(row, pairs.PROMPTS)
    if name == "labelled":
        mapping = columns_fix(prompt=asked, completion=first(row, pairs.ANSWERS))
        raise Bad(
            "labelled_row",
            "a row with a verdict on its answer: training on all answers would train on the bad ones too",
            f"to learn from them: `tunelet train kto` (`tunelet data`: --want labelled); to train on all: {mapping}",
        )
    if name.startswith("preference"):
        better = {"prompt": asked, "completion": good} if asked else {"messages": good}
        pairs_too = "to learn from both: `tunelet train dpo` (`tunelet data`: --want preference)"
        raise Bad(
            "preference_row",
            f"the row has a better and a worse answer (format {name}), and a chat has one",
            f"{pairs_too}; to train on the better answers: {columns_fix(**better)}" if good else pairs_too,
        )


def _fit(example: Example, want: Want, name: str) -> None:
    """Raises Bad where a sound example is not of the wanted kind. Plain text does for a chat: all of it is trained."""
    if want == "text" and not isinstance(example, Text):
        raise Bad(
            "not_text",
            f"a row of the format {name}, and first training takes plain text",
            f"tune on it with `tunelet train sft`, or take one column: {columns_fix(text='NAME')}",
        )
    if want == "preference" and isinstance(example, Labelled):
        raise Bad(
            "not_a_preference",
            "a row with a verdict on one answer, and a pair has two answers",
            "to learn from verdicts: `tunelet train kto` (`tunelet data`: --want labelled)",
        )
    if want == "preference" and not isinstance(example, Preference):
        raise Bad(
            "not_a_preference",
            f"a row of the format {name}, without a better and a worse answer",
            "give prompt, chosen and rejected, or name them: " + columns_fix(chosen="NAME", rejected="NAME"),
        )
    if want == "labelled" and not isinstance(example, (Labelled, Preference)):  # a pair is two verdicts
        raise Bad(
            "not_labelled", f"a row of the format {name}, without a verdict", "name it: " + columns_fix(label="NAME")
        )


def _mapped(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with its columns under the names of their roles; only the named ones where a main role is among them."""
    named = {}
    exact = {str(key).strip().lower(): key for key in row}  # names are told, and taken, without regard to case
    for role, column in columns.items():
        column = column if column in row else exact.get(column.strip().lower(), column)
        if column not in row:
            optional = role not in MAIN_ROLES
            if optional:  # a row without its own system message or tools is sound
                continue
            raise Bad(
                "missing_column",
                f"no column '{column}' (for {role}).{did_you_mean(column, map(str, row))}",
                f"its columns: {', '.join(map(str, list(row)[:10]))}",
            )
        named[role] = row[column]
    if MAIN_ROLES & set(columns):
        return named
    return {**{str(key).strip().lower(): value for key, value in row.items()}, **named}


def _detected(row: dict[str, Any], want: Want) -> str:
    """The format by the columns that have a value (tables of mixed rows fill the others with null), else by all."""
    filled = {key: value for key, value in row.items() if value is not None}
    try:
        return detect(filled, want)
    except Bad:
        if len(filled) == len(row):
            raise
        return detect(row, want)


def _examples(
    value: Any, origin: Origin, want: Want, format: str, columns: Mapping[str, str], system: str
) -> list[tuple[str, Example | Finding]]:
    """All examples of one row with their formats; a finding in the place of each that could not be made."""
    out: list[tuple[str, Example | Finding]] = []
    try:
        parts = _parts(_row(value, columns), want)
    except Bad as bad:
        return [("", _refused(bad, origin))]
    for row in parts:
        try:
            name, example = _convert(row, origin, want, format, system)
        except Bad as bad:
            out.append(("", _refused(bad, origin)))
            continue
        if want == "labelled" and isinstance(example, Preference):  # of several rejected answers the chosen one is one
            out += [(name, each) for each in pairs.verdicts(example) if (name, each) not in out]
        else:
            out.append((name, example))
    return out


def _refused(bad: Bad, origin: Origin) -> Finding:
    return Finding(bad.kind, bad.severity, str(bad), origin, bad.fix)


def _row(value: Any, columns: Mapping[str, str]) -> dict[str, Any]:
    """The row as a dict, its columns in lower case or under the names of their roles."""
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, Mapping):
        raise Bad(
            "not_an_object",
            f"the row is {type(value).__name__}, not an object",
            'write {"prompt": ..., "completion": ...}',
        )
    if columns:
        return _mapped(dict(value), columns)
    return {str(key).strip().lower(): cell for key, cell in value.items()}


def _parts(row: dict[str, Any], want: Want) -> list[dict[str, Any]]:
    """A row with several instances, or several rejected answers, is as many rows; any other row is itself."""
    instances = loaded(row.get("instances"))
    if isinstance(instances, list) and len(instances) > 1:
        return [{**row, "instances": [instance]} for instance in instances]
    return pairs.one_rejected_each(row) if want in ("preference", "labelled") else [row]


def _convert(row: dict[str, Any], origin: Origin, want: Want, format: str, system: str) -> tuple[str, Example]:
    name = _detected(row, want) if format == "auto" else format
    if want == "chat":
        _refuse_pairs(row, name)
    example = FORMATS[name](row, origin, system, name)
    _fit(example, want, name)
    return name, example


def row_to_example(
    value: Any,
    origin: Origin,
    want: Want = "chat",
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    system: str = "",
) -> Example | Finding:
    """One row as an example of the wanted kind, or the finding that says why not. Never raises for a row."""
    check_options(format, columns or {})
    made = _examples(value, origin, want, format, columns or {}, system)
    if len(made) == 1:
        return made[0][1]
    return Finding("several_examples", "error", f"the row makes {len(made)} examples", origin, "use formats.load")


def check_options(format: str, columns: Mapping[str, str]) -> None:
    """Raises TuneletError for a format or a role of a column that does not exist."""
    if format != "auto" and format not in FORMATS:
        raise TuneletError(
            f"there is no format '{format}'.{did_you_mean(format, FORMATS)}",
            fix=f"use auto, or one of {', '.join(FORMATS)}",
        )
    for role in columns:
        if role not in ROLES:
            raise TuneletError(
                f"'{role}' is no role of a column.{did_you_mean(role, ROLES, SYNONYMS)}",
                why="columns names for each role the column that plays it: {prompt = 'Q', completion = 'A'}",
                fix=f"use the roles {', '.join(ROLES)}",
            )


def load(
    names: list[str],
    *,
    want: Want = "chat",
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    system: str = "",
    limit: int = 0,
    seed: int = 0,
    split: str = "train",
) -> Loaded:
    """All rows of all sources as examples, each row's format found by itself.

    A row that cannot be used is dropped with a finding that names file and row; the caller may stop at its errors.
    `limit` takes the first rows only; `seed` and `split` say which of the starter's rows are meant.
    Raises TuneletError where a source, the format or a role does not exist.
    """
    columns = columns or {}
    check_options(format, columns)
    kind = {"chat": "chat", "text": "text"}.get(want, "preference")
    examples: list[Example] = []
    findings: list[Finding] = []
    dropped: dict[str, int] = {}
    formats: dict[str, int] = {}
    hashes: dict[str, str] = {}
    rows_in = taken = 0
    for name in names:
        if limit and taken >= limit:
            break
        read = sources.read_rows(name, kind=kind, seed=seed, split=split, limit=limit - taken if limit else 0)
        taken += len(read.rows) + sum(read.broken.values())
        findings += read.findings
        hashes.update(read.sha256)
        for reason, count in read.broken.items():
            dropped[reason] = dropped.get(reason, 0) + count
            rows_in += count
        for row in read.rows:
            for found, made in _examples(row.value, row.origin, want, format, columns, system):
                rows_in += 1
                if isinstance(made, Finding):
                    findings.append(made)
                    dropped[made.kind] = dropped.get(made.kind, 0) + 1
                else:
                    examples.append(made)
                    formats[found] = formats.get(found, 0) + 1
    if want == "chat" and formats.get("text"):
        findings.append(
            Finding(
                "plain_text",
                "info",
                f"{formats['text']} rows are plain text: all of their tokens are trained, without a chat template",
            )
        )
    return Loaded(examples, Counts(rows_in, len(examples), dropped), findings, formats, hashes)

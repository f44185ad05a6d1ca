"""Rows become examples: each row's format is detected by itself, converted, or refused with the reason and the fix.

Not for reading files (sources.py) nor for judging content (doctor.py). Data is never rendered: {{name}} stays {{name}}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunelet.data import pairs, sources
from tunelet.data.detect import AFTER, BEFORE, LISTS, SINGLE, TEXTS, Want, detect
from tunelet.data.examples import Chat, Counts, Example, Finding, Labelled, Message, Origin, Preference, Text
from tunelet.data.pairs import first
from tunelet.data.shapes import (
    Bad,
    checked_chat,
    checked_prompt,
    columns_fix,
    loaded,
    messages_of,
    text_of,
    tools_of,
    with_system,
)
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
    """Everything the sources held: `examples` in order, and for each row that gave none an error finding."""

    examples: list[Example]
    counts: Counts
    findings: list[Finding]
    formats: dict[str, int]
    sha256: dict[str, str]


# Conversion --------------------------------------------------------------------------------------------------------


def _system(row: Mapping[str, Any], system: str) -> str:
    own = first(row, ("system", "system_prompt"))
    return text_of(row[own], f"'{own}'") if own and row[own] else system


def _tools(row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    key = first(row, ("tools", "functions"))
    return tools_of(row[key]) if key else ()


def _chat(row: Mapping[str, Any], turns: tuple[Message, ...], origin: Origin, system: str) -> Chat:
    thinking = row.get("thinking")
    if thinking and turns[-1].role == "assistant" and turns[-1].thinking is None:
        last = turns[-1]
        turns = (
            *turns[:-1],
            Message("assistant", last.content, last.weight, text_of(thinking, "'thinking'"), last.tool_calls),
        )
    turns = with_system(turns, _system(row, system))
    checked_chat(turns)
    return Chat(turns, origin, _tools(row))


def _from_messages(row: Mapping[str, Any], origin: Origin, system: str, name: str) -> Chat:
    key = first(row, LISTS)
    if key is None:
        raise Bad("missing_column", "the row has no list of messages", f"format {name} needs a column 'messages'")
    return _chat(row, messages_of(row[key]), origin, system)


def _from_single(row: Mapping[str, Any], origin: Origin, system: str, name: str) -> Chat:
    found = next(((p, first(row, a)) for n, p, a in SINGLE if n == name and p in row and first(row, a)), None)
    if found is None:
        needs = " or ".join(f"'{p}' and '{a[0]}'" for n, p, a in SINGLE if n == name)
        raise Bad(
            "missing_column", f"the row has the columns {', '.join(list(row)[:8])}", f"format {name} needs {needs}"
        )
    prompt_key, answer_key = found
    prompt, answer = row[prompt_key], row[answer_key]
    turns = _history(row)
    if isinstance(prompt, list):
        turns += messages_of(prompt)
    else:
        text = text_of(prompt, f"'{prompt_key}'")
        extra = BEFORE if prompt_key in ("question", "query", "q") else AFTER
        key = first({k: v for k, v in row.items() if k != prompt_key}, extra)
        more = row[key] if key else None
        if isinstance(more, str) and more.strip():
            text = f"{more}\n\n{text}" if extra is BEFORE else f"{text}\n\n{more}" if text.strip() else more
        if not text.strip():
            raise Bad("empty_prompt", f"'{prompt_key}' is empty", "give it content, or remove the row")
        turns += (Message("user", text),)
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        turns += messages_of(answer)
    elif answer is None:
        raise Bad("no_answer", f"'{answer_key}' is null", "add the answer, or remove the row")
    else:
        turns += (Message("assistant", text_of(answer, f"'{answer_key}'")),)
    return _chat(row, turns, origin, system)


def _history(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """LLaMA-Factory's column of earlier turns: [[asked, answered], ...]."""
    turns: list[Message] = []
    history = loaded(row.get("history"))
    for pair in history if isinstance(history, list) else []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Bad("bad_history", "'history' is not a list of pairs", "write [[asked, answered], ...]")
        turns += [Message("user", text_of(pair[0], "'history'")), Message("assistant", text_of(pair[1], "'history'"))]
    return tuple(turns)


def _from_instances(row: Mapping[str, Any], origin: Origin, system: str, name: str) -> Chat:
    instances = loaded(row.get("instances"))
    if not isinstance(instances, list) or not instances or not all(isinstance(item, dict) for item in instances):
        raise Bad("no_answer", "the row has no instances", 'write instances as [{"input": ..., "output": ...}]')
    if len(instances) > 1:
        raise Bad(
            "several_instances", f"the row has {len(instances)} instances", "formats.load makes an example of each"
        )
    one = {
        "instruction": row.get("instruction"),
        "output": None,
        **{str(k).lower(): v for k, v in instances[0].items()},
    }
    return _from_single(one, origin, system, "alpaca")


def _from_text(row: Mapping[str, Any], origin: Origin, system: str, name: str) -> Text:
    key = first(row, TEXTS)
    if key is None:
        raise Bad(
            "missing_column", f"the row has the columns {', '.join(list(row)[:8])}", "format text needs a column 'text'"
        )
    text = text_of(row[key], f"'{key}'")
    if not text.strip():
        raise Bad("empty_text", f"'{key}' is empty", "remove the row")
    return Text(text, origin)


def _from_pair(row: Mapping[str, Any], origin: Origin, system: str, name: str) -> Preference:
    prompt, chosen, rejected = pairs.preference(dict(row), name)
    prompt = with_system(prompt, _system(row, system))
    checked_prompt(prompt)
    return Preference(prompt, chosen, rejected, origin, _tools(row))


def _from_labelled(row: Mapping[str, Any], origin: Origin, system: str, name: str) -> Labelled:
    prompt, answer, label = pairs.labelled(dict(row))
    prompt = with_system(prompt, _system(row, system))
    checked_prompt(prompt)
    return Labelled(prompt, answer, label, origin, _tools(row))


FORMATS: dict[str, Callable[[Mapping[str, Any], Origin, str, str], Example]] = {
    "messages": _from_messages,
    "sharegpt": _from_messages,
    "alpaca": _from_single,
    "instruction-response": _from_single,
    "prompt-completion": _from_single,
    "question-answer": _from_single,
    "self-instruct": _from_instances,
    "text": _from_text,
    "preference": _from_pair,
    "preference-implicit": _from_pair,
    "preference-responses": _from_pair,
    "preference-label": _from_pair,
    "labelled": _from_labelled,
}


def _refuse_pairs(row: Mapping[str, Any], name: str) -> None:
    """Raises Bad for a row with two answers or a verdict where a chat is wanted; the fix names the row's columns."""
    good, asked = first(row, (*pairs.CHOSEN, "response_j")), first(row, pairs.PROMPTS)
    if name == "labelled":
        mapping = columns_fix(prompt=asked, completion=first(row, pairs.ANSWERS))
        raise Bad(
            "labelled_row",
            "a row with a verdict on its answer: training on all answers would train on the bad ones too",
            f"to train on all of them: {mapping}; `tunelet data` reads the verdicts with --want labelled",
        )
    if name.startswith("preference"):
        better = {"prompt": asked, "completion": good} if asked else {"messages": good}
        pairs_too = "`tunelet data` reads pairs with --want preference"
        raise Bad(
            "preference_row",
            f"the row has a better and a worse answer (format {name}), and a chat has one",
            f"to train on the better answers: {columns_fix(**better)}; {pairs_too}" if good else pairs_too,
        )


def _fit(example: Example, want: Want, name: str) -> None:
    """Raises Bad where a sound example is not of the wanted kind. Plain text does for a chat: all of it is trained."""
    if want == "text" and not isinstance(example, Text):
        raise Bad(
            "not_text",
            f"a row of the format {name}, and first training takes plain text",
            f"tune on it with `tunelet train sft`, or take one column: {columns_fix(text='NAME')}",
        )
    if want == "preference" and not isinstance(example, Preference):
        raise Bad(
            "not_a_preference",
            f"a row of the format {name}, without a better and a worse answer",
            "give prompt, chosen and rejected, or name them: " + columns_fix(chosen="NAME", rejected="NAME"),
        )
    if want == "labelled" and not isinstance(example, Labelled):
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


def _convert(
    value: Any, origin: Origin, want: Want, format: str, columns: Mapping[str, str], system: str
) -> tuple[str, Example]:
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, Mapping):
        raise Bad(
            "not_an_object",
            f"the row is {type(value).__name__}, not an object",
            'write {"prompt": ..., "completion": ...}',
        )
    if columns:
        row = _mapped(dict(value), columns)
    else:
        row = {str(key).strip().lower(): cell for key, cell in value.items()}
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
    """One row as an example of the wanted kind, or the error finding that says why not. Never raises for a row."""
    check_options(format, columns or {})
    return _row_to_example(value, origin, want, format, columns or {}, system)[1]


def _row_to_example(
    value: Any, origin: Origin, want: Want, format: str, columns: Mapping[str, str], system: str
) -> tuple[str, Example | Finding]:
    try:
        return _convert(value, origin, want, format, columns, system)
    except Bad as bad:
        return "", Finding(bad.kind, "error", str(bad), origin, bad.fix)


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


def _expanded(value: Any) -> Iterator[Any]:
    """A self-instruct row with several instances is as many rows; any other row is itself."""
    if isinstance(value, dict) and isinstance(value.get("instances"), list) and len(value["instances"]) > 1:
        for instance in value["instances"]:
            yield {**value, "instances": [instance]}
    else:
        yield value


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

    A row that cannot be used is dropped with an error finding that names file and row; the caller may then stop.
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
    rows_in = 0
    for name in names:
        if limit and rows_in >= limit:
            break
        read = sources.read_rows(name, kind=kind, seed=seed, split=split, limit=limit - rows_in if limit else 0)
        findings += read.findings
        hashes.update(read.sha256)
        for reason, count in read.broken.items():
            dropped[reason] = dropped.get(reason, 0) + count
            rows_in += count
        for row in read.rows:
            for value in _expanded(row.value):
                rows_in += 1
                found, made = _row_to_example(value, row.origin, want, format, columns, system)
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

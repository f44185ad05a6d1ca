"""One row of a known format becomes an example, or `Bad` says why not.

Not for finding out which format a row has (detect.py) nor for reading many rows (formats.py). Data is never rendered:
{{name}} stays {{name}}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tunelet.data import pairs
from tunelet.data.detect import AFTER, BEFORE, LISTS, SINGLE, TEXTS
from tunelet.data.examples import Chat, Example, Labelled, Message, Origin, Preference, Text
from tunelet.data.pairs import first
from tunelet.data.shapes import (
    Bad,
    checked_chat,
    checked_prompt,
    loaded,
    messages_of,
    text_of,
    tools_of,
    with_system,
)


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
    "preference-scored": _from_pair,
    "labelled": _from_labelled,
}

"""Which format a row has, told from its columns alone; rows of one file may differ. Or the reason why none can be told.

Not for converting: formats.py does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tunelet.data import pairs
from tunelet.data.pairs import first
from tunelet.data.shapes import Bad, columns_fix, loaded

Want = Literal["chat", "text", "preference", "labelled"]

LISTS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
TEXTS = ("text", "content", "document")
# (format, column of the prompt, columns of the answer), in the order in which they are tried.
SINGLE: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("alpaca", "instruction", ("output",)),
    ("instruction-response", "instruction", ("response", "completion", "answer")),
    ("prompt-completion", "prompt", ("completion", "response", "answer", "output")),
    ("question-answer", "question", ("answer", "response", "output", "completion")),
    ("question-answer", "q", ("a",)),
    ("question-answer", "query", ("response", "answer", "output")),
    ("prompt-completion", "user", ("assistant",)),
    ("prompt-completion", "input", ("output", "response", "completion")),
)
PROMPT_LIKE = ("prompt", "instruction", "question", "q", "query", "user", "input")
# Context goes after an instruction (as Alpaca has it) and before a question (as reading tests have it).
AFTER, BEFORE = ("input", "context"), ("context", "passage")


def detect(row: Mapping[str, Any], want: Want = "chat") -> str:
    """The format of a row whose keys are in lower case. Raises Bad where it has none, or could have two."""
    name = pairs.detect_pair(dict(row), want)
    if name:
        return name
    key = first(row, LISTS)
    if key:
        value = loaded(row[key])
        if isinstance(value, list):
            kinds = value[0] if value else {}
            return "sharegpt" if isinstance(kinds, dict) and "from" in kinds and "role" not in kinds else "messages"
        if key in ("messages", "conversations"):
            return "messages"  # and messages_of says what is wrong with it
    if "instances" in row and "instruction" in row:
        return "self-instruct"
    half = None
    for name, prompt, answers in SINGLE:
        if prompt in row:
            answer = first(row, answers)
            if answer and (row[prompt] is not None and row[answer] is not None):
                return name
            half = half or (name if answer else None)
    if half:
        return half
    asked = first(row, PROMPT_LIKE)
    if want == "preference":
        raise Bad(
            "not_a_preference",
            f"the row has no better and worse answer (columns: {', '.join(map(repr, list(row)[:8])) or '(none)'})",
            f"name them: {columns_fix(prompt=asked or 'NAME', chosen='NAME', rejected='NAME')}",
        )
    text = first(row, TEXTS)
    if text and not asked:
        return "text"
    if text and asked:
        raise Bad(
            "ambiguous_columns",
            f"the row has '{asked}' and '{text}' but no answer's column: '{text}' may be the answer or not",
            f"where it is the answer: {columns_fix(prompt=asked, completion=text)}",
        )
    if asked:
        raise Bad(
            "no_answer",
            f"the row has a prompt ('{asked}') and no answer (columns: {', '.join(list(row)[:8])})",
            f"name the answer's column: {columns_fix(prompt=asked, completion='NAME')}",
        )
    raise Bad(
        "unknown_format",
        f"no known format has the columns {', '.join(map(repr, list(row)[:8])) or '(none)'}",
        "say which column is what: " + columns_fix(prompt="NAME", completion="NAME"),
    )

"""Preference rows: two answers to one prompt, or one with a verdict, in any of the common writings.

Not for judging the pairs (ties, length bias): that is the doctor's. Not for chats: formats.py.
"""

from __future__ import annotations

from typing import Any

from tunelet.data.examples import Message
from tunelet.data.shapes import Bad, columns_fix, messages_of, text_of, transcript

PROMPTS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("completion", "response", "answer", "output")
CHOSEN = ("chosen", "chosen_response", "response_chosen")
REJECTED = ("rejected", "rejected_response", "response_rejected")
VERDICTS = ("label", "acceptable", "acceptable?", "is_acceptable", "kto_tag")

Turns = tuple[Message, ...]


def first(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of `names` that the row has with a value; else the first that it has at all."""
    return next((n for n in names if row.get(n) is not None), next((n for n in names if n in row), None))


def truth(value: Any) -> bool | None:
    """A verdict that is surely meant as true or false (true, "False"); None for anything else, 0 and 1 too."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    return None


def verdict(value: Any) -> bool:
    """A verdict where one is expected: 0 and 1 (as text too) count. Raises Bad."""
    known = truth(value)
    if known is None and str(value).strip() in ("0", "1", "0.0", "1.0"):
        known = float(value) == 1
    if known is None:
        raise Bad("bad_label", f"the label is {value!r}", "use true or false (or 1 and 0)")
    return known


def detect_pair(row: dict[str, Any], want: str) -> str:
    """The name of the preference format a row has, '' where it has none."""
    if first(row, CHOSEN) and first(row, REJECTED):
        return "preference" if first(row, PROMPTS) else "preference-implicit"
    if "response_j" in row and "response_k" in row:
        return "preference-responses"
    if "output_1" in row and "output_2" in row:
        return "preference-label"
    if first(row, PROMPTS) and first(row, ANSWERS):
        named = first(row, VERDICTS)
        # A column "label" is often a class of the row (ChatbotData: 0, 1, 2). It is a verdict where it says true or
        # false, or where verdicts are asked for.
        if named and (named != "label" or truth(row[named]) is not None or want == "labelled"):
            return "labelled"
    return ""


def _prompt(row: dict[str, Any]) -> Turns:
    name = first(row, PROMPTS)
    if name is None:
        raise Bad("no_prompt", "the row has no prompt", "name its column: " + columns_fix(prompt="NAME"))
    value = row[name]
    if isinstance(value, list):
        return messages_of(value)
    text = text_of(value, f"'{name}'")
    more = row.get("input") if name == "instruction" else None
    if more:
        text += "\n\n" + text_of(more, "'input'")
    if not text.strip():
        raise Bad("empty_prompt", "the prompt is empty", "give it content, or remove the row")
    return transcript(text) or (Message("user", text),)


def _answer(value: Any, name: str) -> Turns:
    turns = messages_of(value) if isinstance(value, list) else (Message("assistant", text_of(value, f"'{name}'")),)
    if not turns or turns[-1].role != "assistant" or not (turns[-1].content.strip() or turns[-1].tool_calls):
        raise Bad(
            "empty_answer", f"'{name}' is empty or does not end with an answer", "add the answer, or remove the row"
        )
    return turns


def _split(prompt: Turns, chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """Takes the turns that both answers begin with out of them: they are the prompt."""
    same = 0
    longest = min(len(chosen), len(rejected)) - 1  # at least one turn stays an answer
    while same < longest and chosen[same] == rejected[same]:
        same += 1
    while same and chosen[same - 1].role == "assistant" and chosen[same].role == "assistant":
        same -= 1
    if same:
        return chosen[:same], chosen[same:], rejected[same:]
    return prompt, chosen, rejected


def preference(row: dict[str, Any], name: str) -> tuple[Turns, Turns, Turns]:
    """(prompt, chosen, rejected) of a row of the preference format `name`. Raises Bad."""
    if name == "preference-responses":  # Stack Exchange, paired: response_j is the one with more votes
        chosen, rejected = (row["response_j"], "response_j"), (row["response_k"], "response_k")
    elif name == "preference-label":
        better = str(row.get("label", row.get("preference", ""))).strip().lower().removeprefix("output_")
        if better not in ("1", "2"):
            raise Bad("bad_label", f"the label is {better!r}", "say which output is better: 1 or 2")
        keys = ("output_1", "output_2") if better == "1" else ("output_2", "output_1")
        chosen, rejected = (row[keys[0]], keys[0]), (row[keys[1]], keys[1])
    else:
        better, worse = first(row, CHOSEN), first(row, REJECTED)
        chosen, rejected = (row[better], better), (row[worse], worse)
    if name == "preference-implicit":
        turns = [_implicit(*chosen), _implicit(*rejected)]
        prompt, good, bad = _split((), *turns)
        if not prompt:
            raise Bad("no_prompt", "chosen and rejected do not begin with the same prompt", "add a column 'prompt'")
    else:
        prompt, good, bad = _split(_prompt(row), _answer(*chosen), _answer(*rejected))
    if good == bad:
        raise Bad("identical_answers", "chosen and rejected are the same: nothing to prefer", "remove the row")
    return prompt, good, bad


def _implicit(value: Any, name: str) -> Turns:
    turns = transcript(value) if isinstance(value, str) else None
    if turns is None and isinstance(value, str):
        raise Bad("no_prompt", f"the row has no prompt, and '{name}' is one text", "add a column 'prompt'")
    return turns if turns is not None else _answer(value, name)


def labelled(row: dict[str, Any]) -> tuple[Turns, Turns, bool]:
    """(prompt, answer, verdict) of a row with one answer and a verdict on it. Raises Bad."""
    named = first(row, VERDICTS)
    if named is None or row[named] is None:
        raise Bad("bad_label", "the row has no label", "add a column 'label' of true and false")
    answer = first(row, ANSWERS)
    if answer is None:
        raise Bad("no_answer", "the row has no answer", "name its column: " + columns_fix(completion="NAME"))
    return _prompt(row), _answer(row[answer], answer), verdict(row[named])

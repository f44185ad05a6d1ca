"""Preference rows: two answers to one prompt, or one with a verdict, in any of the common writings.

Not for judging the pairs (length bias, conflicts): that is the doctor's. Not for scores: scores.py. Not for chats:
from_rows.py.
"""

from __future__ import annotations

from typing import Any

from tunelet.data import scores
from tunelet.data.examples import Labelled, Message, Preference
from tunelet.data.shapes import Bad, columns_fix, loaded, messages_of, text_of, transcript

PROMPTS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("completion", "response", "answer", "output")
CHOSEN = ("chosen", "chosen_response", "response_chosen")
REJECTED = ("rejected", "rejected_response", "response_rejected")
VERDICTS = ("label", "acceptable", "acceptable?", "is_acceptable", "kto_tag")

# Words that are surely meant as a verdict on an answer. "positive" and "negative" are not: they are classes of texts.
GOOD = {"true", "yes", "y", "good", "correct", "acceptable", "desirable", "chosen", "accepted", "up", "thumbs up"}
GOOD |= {"like", "upvote", "👍", "예", "네", "좋아요", "좋음", "맞음"}
POOR = {"false", "no", "n", "bad", "incorrect", "unacceptable", "undesirable", "rejected", "down", "thumbs down"}
POOR |= {"dislike", "downvote", "👎", "아니요", "아니오", "싫어요", "나쁨", "틀림"}

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
    """A verdict where one is expected: words for good and bad, and 1 against 0 or -1 (as text too). Raises Bad."""
    if (known := truth(value)) is not None:
        return known
    word = " ".join(str(value).replace("\ufe0f", "").replace("_", " ").replace("-", " ").split()).casefold()
    if word in GOOD or word in POOR:
        return word in GOOD
    number = scores.number(value)
    if number not in (1, 0, -1):
        raise Bad("bad_label", f"the label is {scores.shown(value)}", "use true or false (or 1 and 0)")
    return number == 1


def detect_pair(row: dict[str, Any], want: str) -> str:
    """The name of the preference format a row has, '' where it has none."""
    if first(row, CHOSEN) and first(row, REJECTED):
        return "preference" if first(row, PROMPTS) else "preference-implicit"
    if "response_j" in row and "response_k" in row:
        return "preference-responses"
    if "output_1" in row and "output_2" in row:
        return "preference-label"
    if first(row, PROMPTS) and scores.answers_column(row, scored=want not in ("preference", "labelled")):
        return "preference-scored"
    if first(row, PROMPTS) and first(row, ANSWERS):
        named = first(row, VERDICTS)
        # A column "label" is often a class of the row (ChatbotData: 0, 1, 2). It is a verdict where it says true or
        # false, or where verdicts are asked for.
        if named and (named != "label" or truth(row[named]) is not None or want == "labelled"):
            return "labelled"
    return ""


def one_rejected_each(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row whose rejected answer is a list of several is as many rows; any other row is itself."""
    name = first(row, REJECTED)
    several = loaded(row[name]) if name else None
    if not isinstance(several, list) or not several or not all(map(_is_answer, several)):
        return [row]
    return [{**row, name: one} for one in several]


def _is_answer(item: Any) -> bool:
    """Whether an item of a list is an answer by itself, not one message of an answer."""
    return isinstance(item, list) or (isinstance(item, str) and not isinstance(loaded(item), dict))


def preference(row: dict[str, Any], name: str) -> tuple[Turns, Turns, Turns]:
    """(prompt, chosen, rejected) of a row of the preference format `name`. Raises Bad."""
    if name == "preference-scored":
        chosen, rejected = scores.best_and_worst(row)
    elif name == "preference-label":
        chosen, rejected = (_cell(row, (key,)) for key in _by_label(row))
    else:
        if name == "preference-responses":  # Stack Exchange, paired: response_j is the one with more votes
            names = (("response_j",), ("response_k",))
        else:
            names = (CHOSEN, REJECTED)
        chosen, rejected = (_cell(row, each) for each in names)
        scores.check(row)
    if name == "preference-implicit":
        prompt, good, bad = _split(None, _implicit(*chosen), _implicit(*rejected))
    else:
        prompt, good, bad = _split(_prompt(row), _answer(*chosen), _answer(*rejected))
    if good == bad:
        raise Bad("identical_answers", "chosen and rejected are the same: nothing to prefer", "remove the row")
    return prompt, good, bad


def _cell(row: dict[str, Any], names: tuple[str, ...]) -> tuple[Any, str]:
    name = first(row, names)
    if name is None:
        raise Bad("missing_column", f"the row has no '{names[0]}'", f"its columns: {', '.join(list(row)[:10])}")
    return row[name], name


def _by_label(row: dict[str, Any]) -> tuple[str, str]:
    """The columns of the better and of the worse of two numbered outputs."""
    outputs = [key for key in row if key.removeprefix("output_").isdecimal() and row[key] is not None]
    if len(outputs) > 2:
        raise Bad(
            "several_answers",
            f"the row has {len(outputs)} answers ({', '.join(outputs[:4])}) and one label: a pair has two",
            "write a row for each pair (prompt, chosen, rejected), or give each answer its score: "
            'completions = [{"response": ..., "score": ...}, ...]',
        )
    value = row.get("label", row.get("preference"))
    better = scores.number(value.strip().lower().removeprefix("output_") if isinstance(value, str) else value)
    if better not in (1, 2):
        raise Bad("bad_label", f"the label is {scores.shown(value)}", "say which output is better: 1 or 2")
    return ("output_1", "output_2") if better == 1 else ("output_2", "output_1")


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
    if isinstance(value, list):
        turns = messages_of(value) if value else ()
    else:
        turns = (Message("assistant", text_of(value, f"'{name}'")),)
    if not turns or turns[-1].role != "assistant" or not (turns[-1].content.strip() or turns[-1].tool_calls):
        raise Bad(
            "empty_answer", f"'{name}' is empty or does not end with an answer", "add the answer, or remove the row"
        )
    return turns


def _split(prompt: Turns | None, chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """(prompt, chosen, rejected): the turns that both answers begin with are the prompt's. Raises Bad where the two
    answer different prompts, or another one than the column says."""
    if prompt:  # an answer may repeat it, the other one stand bare
        chosen, rejected = (_after(prompt, turns) for turns in (chosen, rejected))
    same = 0
    longest = min(len(chosen), len(rejected)) - 1  # at least one turn stays an answer
    while same < longest and chosen[same] == rejected[same]:
        same += 1
    while same and chosen[same - 1].role == "assistant" and chosen[same].role == "assistant":
        same -= 1
    shared, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if chosen[0].role in ("user", "system") or rejected[0].role in ("user", "system"):
        good, bad = (f"the {turns[0].role}'s '{turns[0].content[:40]}'" for turns in (chosen, rejected))
        raise Bad(
            "different_prompts",
            f"chosen goes on with {good}, and rejected with {bad}: they answer different prompts",
            "give chosen and rejected of a row the same prompt",
        )
    if not prompt and not shared:
        raise Bad("no_prompt", "the row has no prompt: chosen and rejected are answers only", "add a column 'prompt'")
    if not (prompt and shared):
        return prompt or shared, chosen, rejected
    if shared[0].role not in ("user", "system"):  # the conversation goes on before the two part
        return prompt + shared, chosen, rejected
    if prompt[-same:] == shared:  # the column has a system message too
        return prompt, chosen, rejected
    if not _about(prompt, shared):
        raise Bad(
            "different_prompts",
            f"the prompt is '{prompt[-1].content[:40]}', and the answers begin with '{shared[-1].content[:40]}'",
            "give the prompt that was answered, or leave its column out",
        )
    return shared, chosen, rejected


def _after(prompt: Turns, turns: Turns) -> Turns:
    return turns[len(prompt) :] if len(turns) > len(prompt) and turns[: len(prompt)] == prompt else turns


def _about(prompt: Turns, shared: Turns) -> bool:
    """Whether one of the two holds what the user says last in the other: some rows give a conversation's first or last
    turn as its prompt."""
    texts = [" ".join(turn.content for turn in turns).split() for turns in (prompt, shared)]
    whole, other = (" ".join(words) for words in texts)
    return whole in other or other in whole


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


def verdicts(pair: Preference) -> tuple[Labelled, Labelled]:
    """A pair as two answers with a verdict each: the chosen one is good, the rejected one is not."""
    return (
        Labelled(pair.prompt, pair.chosen, True, pair.origin, pair.tools),
        Labelled(pair.prompt, pair.rejected, False, pair.origin, pair.tools),
    )

"""The rules of mending: for every kind of finding either how a row is mended, or that it is dropped, and why.

Not for finding: doctor.py does that, before and after each round. Sources are never written to.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import replace

from tunelet.data import doctor_rows, scripts
from tunelet.data.examples import Chat, Example, Labelled, Message, Preference, Text
from tunelet.data.shapes import Bad, checked_chat, checked_prompt

Mend = Callable[[Example], Example]


def _each(change: Callable[[Message], Message]) -> Mend:
    """A change of one message, made on every message of an example."""

    def mend(example: Example) -> Example:
        if isinstance(example, Text):
            return replace(example, text=change(Message("", example.text)).content)
        if isinstance(example, Chat):
            return replace(example, messages=tuple(map(change, example.messages)))
        if isinstance(example, Preference):
            parts = {name: tuple(map(change, getattr(example, name))) for name in ("prompt", "chosen", "rejected")}
            return replace(example, **parts)
        assert isinstance(example, Labelled)
        return replace(
            example, prompt=tuple(map(change, example.prompt)), completion=tuple(map(change, example.completion))
        )

    return mend


def _content(change: Callable[[str], str]) -> Mend:
    """A change of text, made on the content of every message but a tool's."""
    return _each(lambda m: m if m.role == "tool" else replace(m, content=change(m.content)))


def _answer(change: Callable[[str], str]) -> Mend:
    return _each(lambda m: replace(m, content=change(m.content)) if m.role in ("assistant", "") else m)


def _turns(change: Callable[[tuple[Message, ...]], tuple[Message, ...]]) -> Mend:
    return lambda example: replace(example, messages=change(example.messages)) if isinstance(example, Chat) else example


def _without_leading_answers(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    head = tuple(turn for turn in turns[:1] if turn.role == "system")
    rest = turns[len(head) :]
    while rest and rest[0].role == "assistant":
        rest = rest[1:]
    return head + rest


def _without_tail(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    while turns and turns[-1].role != "assistant":
        turns = turns[:-1]
    return turns


def _joined(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """Neighbouring turns of one speaker become one, a blank line between them. Turns with calls stay as they are."""
    out: list[Message] = []
    for turn in turns:
        before = out[-1] if out else None
        plain = before is not None and not before.tool_calls and not turn.tool_calls and before.weight == turn.weight
        if plain and turn.role == before.role and turn.role in ("user", "assistant"):
            out[-1] = replace(before, content=f"{before.content}\n\n{turn.content}")
        else:
            out.append(turn)
    return tuple(out)


def _unmarked(text: str) -> str:
    """HTML to text: breaks and paragraphs become lines, other tags go, entities become their letters."""
    text = re.sub(r"<br\s*/?>|</(?:p|div|li|tr|h[1-6])>", "\n", text)
    text = html.unescape(doctor_rows.TAG.sub("", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _without_thinking(message: Message) -> Message:
    if message.role != "assistant":
        return message
    thinking = message.thinking if message.thinking and message.thinking.strip() else None
    content = re.sub(r"<think(?:ing)?>\s*</think(?:ing)?>\s*", "", message.content)
    return replace(message, thinking=thinking, content=content)


def _without_empty_system(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(turn for turn in turns if turn.role != "system" or turn.content.strip())


def _fenced(text: str) -> str:
    marks = doctor_rows.FENCE.findall(text)
    return f"{text.rstrip()}\n{marks[-1]}" if len(marks) % 2 else text


def _no_controls(text: str) -> str:
    return doctor_rows._CONTROL.sub("", text)


def _no_tokens(text: str) -> str:
    previous = None
    while previous != text:  # taking one out may put another together
        previous, text = text, doctor_rows.TEMPLATE_TOKENS.sub("", text)
    return text.strip()


def _no_bos(text: str) -> str:
    while found := doctor_rows.BOS.match(text):
        text = text[found.end() :]
    return text


def _no_speaker(text: str) -> str:
    return re.sub(r"\A\s*(?:assistant|ai|bot|gpt|chatgpt)\s*:\s", "", text, flags=re.I)


MENDS: dict[str, tuple[Mend, str]] = {
    "whitespace": (_content(str.strip), "stripped white space at both ends of turns"),
    "invisible_character": (_content(lambda t: doctor_rows._INVISIBLE.sub("", t)), "removed invisible characters"),
    "control_character": (_content(_no_controls), "removed control characters"),
    "mojibake": (_content(scripts.unscramble), "decoded again what had been decoded wrongly"),
    "html": (_answer(_unmarked), "took out HTML tags and unescaped entities"),
    "template_tokens": (_content(_no_tokens), "took the chat template's tokens out of the text"),
    "double_bos": (_content(_no_bos), "took the literal BOS out of the text"),
    "code_fence": (_answer(_fenced), "closed the code fence"),
    "empty_system": (_turns(_without_empty_system), "left the empty system message out"),
    "empty_thinking": (_each(_without_thinking), "left the empty reasoning out"),
    "role_prefix": (_answer(_no_speaker), "took the speaker's name off the answer"),
    "starts_with_assistant": (_turns(_without_leading_answers), "took answers before the first user turn out"),
    "ends_with_user": (_turns(_without_tail), "cut the turns after the last answer"),
    "ends_with_tool": (_turns(_without_tail), "cut the turns after the last answer"),
    "consecutive_user": (_turns(_joined), "joined user turns in a row"),
    "consecutive_assistant": (_turns(_joined), "joined answers in a row"),
}

# Kinds that only a person (or the row's source) can mend: the row is dropped.
DROPS: dict[str, str] = {
    "duplicate": "the first of equal rows is kept",
    "near_duplicate": "the first of nearly equal rows is kept",
    "conflicting_answers": "the first answer to a prompt is kept",
    "replacement_character": "the lost letters are not to be had back",
    "copies_prompt": "it has no answer",
    "no_content": "it has no answer",
    "secret": "keys do not belong into a model",
    "url_only": "it has no answer",
    "refusal": "it would teach another assistant's phrases; write the answer where you want the row",
    "language": "the answer is in another language",
    "cut_answer": "it would teach to break off in mid-sentence",
    "repetition": "it would teach to repeat",
    "placeholder": "the value is not known; fill it in the source where you want the row",
    "unclosed_thinking": "where the reasoning ends is not known",
    "length_outlier": "several answers have probably run together",
    "unknown_tool": "the tool is not described",
    "missing_argument": "the call does not fit its tool",
    "result_without_call": "a turn is missing",
    "truncated_answer": "no token of the answer would be left",
    "cut_short": "the end of the answer would not be trained",
    "same_when_cut": "nothing would be left to prefer",
    "identical_answers": "there is nothing to prefer",
    "near_identical_answers": "there is next to nothing to prefer",
    "conflicting_pairs": "the same pair is labelled both ways, and which is right is not known: both go",
    "conflicting_labels": "the same answer has both verdicts, and which is right is not known: both go",
    "other_prompt": "it answers another prompt",
    "turns_in_answer": "it compares conversations, not answers",
    "possibly_swapped": "the model given orders it the other way round; where it is right, swap the row in the source",
}


def checked(example: Example) -> None:
    """Raises Bad where mending left nothing to train on."""
    if isinstance(example, Chat):
        checked_chat(example.messages)
    elif isinstance(example, (Preference, Labelled)):
        checked_prompt(example.prompt)
        pair = isinstance(example, Preference)
        for answer in (example.chosen, example.rejected) if pair else (example.completion,):
            if not answer[-1].content.strip() and not answer[-1].tool_calls:
                raise Bad("empty_answer", "nothing is left of an answer")


def mended(example: Example, kinds: set[str]) -> tuple[Example, set[str]] | str:
    """The example after the mends for `kinds`, and which of them were made; or the kind for which it is dropped."""
    for kind in sorted(kinds):
        if kind not in MENDS:
            return kind
    made = example
    used = set()
    for kind, (mend, _) in MENDS.items():  # in the order of the table
        if kind in kinds:
            after = mend(made)
            if after != made:
                used.add(kind)
            made = after
    return made, used

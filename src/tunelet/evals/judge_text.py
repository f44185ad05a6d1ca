"""What a judge is asked, and what is read out of its words: a verdict or a score, or the reason why there is none.

Not for asking (judge.py). Reading is strict, so that nothing but a verdict ever counts as one: exactly one value in
double square brackets, as the last line. A judge that breaks off, refuses, gives two verdicts or a score beside its
scale has given none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError, did_you_mean

Request = Sequence[Mapping[str, Any]]  # messages, dicts with role and content
PAIR = """Here are a request and two answers to it.

Request:
{request}

Answer A:
{a}

Answer B:
{b}

"""
# For a judge whose letters' probabilities can be seen.
LETTER = PAIR + "Which answer is better? Reply with A or B alone."
LETTER_PLAIN = "\n\nBetter answer:"  # put behind the question for a judge without a chat template
# For a judge that is read.
VERDICT = (
    PAIR
    + """Which answer does better what the request asks for? What counts is whether it is right, helpful and complete; \
neither its place nor its length counts. Give your reason in a few sentences. Then write the verdict as the last line, \
with nothing else on it: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if they are equally good."""
)
ANSWER = """Here are a request and an answer to it.

Request:
{request}

Answer:
{answer}

{reference}{criteria}

"""
REFERENCE = """An answer known to be good, to compare with:
{reference}

"""
NUMBER = ANSWER + "Rate the answer with a whole number from {low} to {high}. Reply with the number alone."
NUMBER_PLAIN = "\n\nRating:"
SCORE = (
    ANSWER
    + """Rate the answer with a whole number from {low} to {high}. Give your reason in a few sentences. Then write the \
rating as the last line, with nothing else on it but the number in double square brackets: [[N]]."""
)
CRITERIA = (
    "Does the answer do what the request asks for, in its last turn above all? Consider whether it is right, helpful, "
    "to the point, and as detailed as the request needs."
)
SCALE = (1, 10)
WIDEST = 101  # values of a scale: 0 to 100

VALUE = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
LAST = re.compile(r"[*_#\s]*(?:(?:final )?(?:verdict|rating|score)\s*[*_]*:)?[*_\s]*\[\[[^\[\]]*\]\][*_.\s]*", re.I)


@dataclass(frozen=True, slots=True)
class Rubric:
    """criteria: what is rated, in words for the judge. low, high: the ends of its scale of whole numbers."""

    criteria: str = CRITERIA
    low: int = SCALE[0]
    high: int = SCALE[1]

    @property
    def values(self) -> range:
        return range(self.low, self.high + 1)


class Unread(Exception):
    """There is no verdict in a judge's words; the message says why."""


def verdict(text: str) -> str:
    """ "A", "B" or "C" (a tie) of a judge's answer to VERDICT. Raises Unread."""
    found = _value(text)
    if found not in ("A", "B", "C"):
        raise Unread(f"the verdict is neither A nor B nor C: {found[:20]!r}")
    return found


def score(text: str, rubric: Rubric) -> int:
    """The number of a judge's answer to SCORE. Raises Unread."""
    found = _value(text)
    if not re.fullmatch(r"-?[0-9]{1,4}", found):  # not \d: digits of every script are numbers to int()
        raise Unread(f"the score is no whole number: {found[:20]!r}")
    if int(found) not in rubric.values:
        raise Unread(f"the score {found} is not on the scale from {rubric.low} to {rubric.high}")
    return int(found)


def _value(text: str) -> str:
    """What stands in double square brackets on the last line, where nothing else in the text does."""
    said = text.rpartition("</think>")[2].strip()
    if not said:
        raise Unread("the answer is empty")
    if "<think>" in said:
        raise Unread("the answer broke off while it was thought over")
    found = {value.strip() for value in VALUE.findall(said)}
    if len(found) > 1:
        raise Unread("several verdicts in one answer")
    if not found or not LAST.fullmatch(said.splitlines()[-1]):
        raise Unread("no verdict on the last line")
    return found.pop()


def told(request: Request) -> str:
    """A conversation as text: a single message as it is, several with their roles."""
    if len(request) == 1:
        return str(request[0]["content"])
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in request)


def pair_question(template: str, request: Request, a: str, b: str) -> str:
    return template.format(request=told(request), a=a, b=b)


def score_question(template: str, request: Request, answer: str, reference: str, rubric: Rubric) -> str:
    known = REFERENCE.format(reference=reference) if reference else ""
    return template.format(
        request=told(request), answer=answer, reference=known, criteria=rubric.criteria, low=rubric.low,
        high=rubric.high,
    )  # fmt: skip


def read_rubric(path: Path | None) -> Rubric:
    """A text file with the criteria, or a TOML file with `criteria` and `scale = [low, high]`; None: the usual one.
    Raises TuneletError."""
    if path is None:
        return Rubric()
    import tomllib

    if not path.is_file():
        raise TuneletError(f"--rubric {path}: there is no such file", fix="name a .txt or .toml file")
    fix = 'write criteria = "...", and scale = [1, 5] for another scale than 1 to 10'
    try:
        text = path.read_text(encoding="utf-8")
        given = tomllib.loads(text) if path.suffix == ".toml" else {"criteria": text}
    except UnicodeDecodeError as error:
        raise TuneletError(f"--rubric {path}: not UTF-8 text", why=str(error), fix="save it as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise TuneletError(f"--rubric {path}: is not TOML", why=str(error), fix=fix) from error
    known = ("criteria", "scale")
    for name in given:
        if name not in known:
            raise TuneletError(f"--rubric {path}: there is no field '{name}'.{did_you_mean(name, known)}", fix=fix)
    criteria, scale = given.get("criteria"), given.get("scale", list(SCALE))
    if not isinstance(criteria, str) or not criteria.strip():
        raise TuneletError(f"--rubric {path}: holds no criteria", fix=fix)
    whole = isinstance(scale, list) and len(scale) == 2 and all(type(end) is int for end in scale)
    if not whole or not 0 <= scale[0] < scale[1] < scale[0] + WIDEST:
        raise TuneletError(
            f"--rubric {path}: scale {scale} is none",
            why=f"a scale goes from a whole number of 0 or more to a larger one, over at most {WIDEST} numbers",
            fix=fix,
        )
    return Rubric(criteria.strip(), *scale)

"""The writer that needs no model: it blanks a number, a name or a term of a sentence, in English and Korean.

Not as good as a capable model: its questions ask for what stands in one sentence. Wrong choices are values of the same
kind from other chunks, so that all are plausible and none stands in the sentence; a person checks them all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from tunelet.domain.questions import BLANK, Prompt, Unwritten, distinct
from tunelet.domain.records import CHOICES, Chunk
from tunelet.domain.text import HANGUL, korean, near_equal, normal, sentences, stands_in

CLOCK = re.compile(r"\b\d{1,2}:\d{2}\b")
NUMBER = re.compile(r"(?<![\w.,:/-])\d+(?:[.,]\d+)?(?![\d:/]|[.,]\d|-\d)")
UNIT = re.compile(r"\s?([^\W\d_]+|%|°\s?[CF]?)")
PARTICLES = "은는이가을를에로의와과도만부터까지마다"
NAME = re.compile(
    r"(?<![.!?:\"“]\s)(?<!^)\b(?:[A-Z][a-z]+|[A-Z]{2,}[0-9]*|[A-Z][0-9]+)(?:[ -](?:[A-Z][a-z]+|[A-Z0-9]{2,}))*\b"
)
# Capitalised wherever they stand, and no names.
COMMON = (
    frozenset(("I", "OK", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))
    | frozenset(
        ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November")
    )
    | {"December"}
)
# A particle tells whether the noun before it ends in a consonant: behind a blank it is written for both, as exams do.
BOTH = {one: both for both in ("은(는)", "이(가)", "을(를)", "과(와)") for one in (both[0], both[2])}
BOTH |= {"으로": "(으)로", "로": "(으)로"}
PARTICLE = re.compile(rf"^(?:{'|'.join(BOTH)})(?![가-힣])")
SHORT, LONG = 20, 300  # characters of a sentence that makes a question


@dataclass(frozen=True)
class Gap:
    """A place to blank. kind: values of the same kind can stand in its place."""

    kind: str
    start: int
    end: int
    value: str


class Cloze:
    """`tunelet domain new --writer cloze`. chunks: of the whole project, where wrong choices come from."""

    name = "cloze (rules, no model)"

    def __init__(self, chunks: Sequence[Chunk]):
        self._values: dict[str, dict[str, set[str]]] = {}  # kind -> value -> ids of chunks
        self._terms = _terms(chunks)
        for chunk in chunks:
            for sentence in sentences(chunk.text):
                for gap in self._gaps(sentence):
                    for kind in {gap.kind, gap.kind.split(":")[0]}:
                        self._values.setdefault(kind, {}).setdefault(gap.value, set()).add(chunk.id)

    def write(self, prompt: Prompt, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Up to `prompt.number` questions about its chunk, one for each sentence first. Raises Unwritten where no
        sentence of it can be blanked."""
        rng = Random(prompt.seed)
        candidates: list[tuple[str, Gap]] = []
        for sentence in sentences(prompt.chunk.text):
            if SHORT <= len(sentence) <= LONG:
                gaps = self._gaps(sentence)
                rng.shuffle(gaps)
                candidates += [(sentence, gap) for gap in gaps]
        rng.shuffle(candidates)
        used: set[str] = set()
        first = [(sentence, gap) for sentence, gap in candidates if not (sentence in used or used.add(sentence))]
        made: list[dict[str, Any]] = []
        for sentence, gap in first + [one for one in candidates if one not in first]:
            if len(made) == prompt.number:
                break
            asked = _question(sentence, gap, prompt.chunk)
            there = (*prompt.avoid, *(one["question"] for one in made))
            wrong = self._wrong(gap, sentence, prompt.chunk.id, rng)
            if len(wrong) == CHOICES - 1 and not any(near_equal(asked, other) for other in there):
                made.append({"question": asked, "answer": gap.value, "distractors": wrong, "evidence": sentence})
        if not made:
            raise Unwritten("no sentence has a number, name or term that others could stand in for")
        return {"questions": made}

    def _gaps(self, sentence: str) -> list[Gap]:
        """Where the sentence can be blanked, without overlaps; a value that stands in it twice would tell itself."""
        found: list[Gap] = [Gap("clock", *match.span(), match[0]) for match in CLOCK.finditer(sentence)]
        for match in NUMBER.finditer(sentence):
            unit = UNIT.match(sentence, match.end())
            name = (unit[1] if unit else "").casefold()
            name = name.rstrip(PARTICLES) or name if HANGUL.search(name) else name.rstrip("s") or name
            found.append(Gap(f"number:{name}", *match.span(), match[0]))
        for term in self._terms:
            if stands_in(term, sentence) and (at := re.search(re.escape(term), sentence, re.IGNORECASE)):
                kind = "term_ko" if HANGUL.search(term) else f"term:{_form(term)}"
                found.append(Gap(kind, *at.span(), sentence[at.start() : at.end()]))
        for match in NAME.finditer(sentence):
            if match[0] not in COMMON:
                found.append(Gap("name", *match.span(), match[0]))
        out: list[Gap] = []
        for gap in found:
            apart = all(gap.end <= other.start or gap.start >= other.end for other in out)
            rest = sentence[: gap.start] + " " + sentence[gap.end :]
            if apart and not stands_in(gap.value, rest):
                out.append(gap)
        return out

    def _wrong(self, gap: Gap, sentence: str, chunk: str, rng: Random) -> list[str]:
        """Wrong values: first those of the same kind and unit, then of the same kind, from other chunks; of numbers at
        last neighbours of the right one. Fewer than needed where there are no more."""
        out: list[str] = []

        def add(values: list[str]) -> None:
            for value in values:
                fits = value[:1].isupper() == gap.value[:1].isupper() and not stands_in(value, sentence)
                if len(out) < CHOICES - 1 and fits and len(distinct(gap.value, [*out, value])) > len(out):
                    out.append(value)

        for kind in (gap.kind, gap.kind.split(":")[0]):
            others = sorted(v for v, at in self._values.get(kind, {}).items() if at - {chunk})
            rng.shuffle(others)
            if kind == "number":  # of other units: those of about the same size are plausible
                others.sort(key=lambda value: _apart(value, gap.value))
            add(others)
        if gap.kind.startswith("number"):
            add(_neighbours(gap.value, rng))
        rng.shuffle(out)
        return out


def _terms(chunks: Sequence[Chunk]) -> list[str]:
    """Terms the documents define: set in bold, code or quotation marks; the longest first."""
    found = {normal(term): term for chunk in chunks for term in chunk.terms if not NUMBER.search(term)}
    return sorted(found.values(), key=lambda term: (-len(term), term))


def _form(term: str) -> str:
    """In English the words around a term tell its number and how it begins (a, an): choices of one form come first.
    Korean needs none: the particle behind the blank is written for both forms."""
    return ("many" if term[-1] == "s" else "one") + ("-an" if term[0] in "aeiouAEIOU" else "")


def _number(text: str) -> float:
    return float(text.replace(",", "."))


def _apart(one: str, other: str) -> float:
    a, b = _number(one), _number(other)
    return max(a, b) / min(a, b) if min(a, b) > 0 else abs(a - b) + 1


def _neighbours(value: str, rng: Random) -> list[str]:
    """Numbers about as large, in the form of `value`."""
    number = _number(value)
    places = len(re.split("[.,]", value)[1]) if re.search("[.,]", value) else 0
    step = 10**-places
    near = [number * 2, number * 3, number / 2, number * 1.5, number + step, number + 2 * step, number - step]
    texts = [f"{one:.{places}f}" for one in near if one > 0]
    texts = [text.replace(".", ",") if "," in value else text for text in texts if float(text) > 0]
    rng.shuffle(texts)
    return list(dict.fromkeys(text for text in texts if text != value))


def _question(sentence: str, gap: Gap, chunk: Chunk) -> str:
    after = sentence[gap.end :]
    if korean(sentence):
        after = PARTICLE.sub(lambda match: BOTH[match[0]], after, count=1)
    blanked = sentence[: gap.start] + BLANK + after
    if korean(sentence):
        return f"[{chunk.where}] 빈칸에 알맞은 것은? “{blanked}”"
    return f"[{chunk.where}] What belongs in the blank? “{blanked}”"

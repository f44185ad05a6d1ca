"""Chunks -> multiple-choice questions by any writer; every one that was asked for is accounted for.

Not for how a writer writes (cloze.py, writers.py) nor for what people say of them (annotations.py). A writer's answer
is checked, and what does not hold is dropped with its reason: nothing is guessed, filled in or mended.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunelet.domain.records import CHOICES, Chunk, Question
from tunelet.domain.text import near_equal, normal, sentences, squeezed, stands_in

RETRIES = 2  # further tries after an answer that is not of the form asked for
ROUNDS = 4  # how often the chunks are gone through to make up for dropped questions
HOPELESS = 8  # passages in a row for which a writer gives nothing, after which no further one is asked
ALIKE = 0.85  # share of common words from which two questions ask the same
QUOTE = 12  # characters from which a quotation supports an answer that the chunk does not have word by word
BLANK = "____"


class Drafted(BaseModel):
    """One question as a writer gives it; fields beyond these are ignored, as models like to add some."""

    model_config = ConfigDict(extra="ignore")

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    distractors: list[str] = Field(min_length=1)
    evidence: str = ""


class Exam(BaseModel):
    """What a writer answers: an object with one list, also for one question."""

    model_config = ConfigDict(extra="ignore")

    questions: list[Any]


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "questions": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "question": {"type": "string", "description": "answered by the passage alone"},
                    "answer": {"type": "string", "description": "the one right answer, in the passage's words"},
                    "distractors": {
                        "type": "array",
                        "items": {"type": "string"},
                        "minItems": CHOICES - 1,
                        "maxItems": CHOICES + 1,
                        "description": "wrong answers of the same kind and length, all different",
                    },
                    "evidence": {"type": "string", "description": "the sentence of the passage, word by word"},
                },
                "required": ["question", "answer", "distractors", "evidence"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["questions"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Prompt:
    """What a writer is asked. text: for a model; the other fields say the same to a program. seed: another one at
    every call, so that a second answer can be another one; avoid: questions that are there already; complaint: what
    was wrong with the answer before."""

    text: str
    chunk: Chunk
    number: int
    seed: int
    avoid: tuple[str, ...] = ()
    complaint: str = ""


class Writer(Protocol):
    """name: stands in the provenance. write: an object as `schema` describes it.
    Raises Unwritten where there is none."""

    name: str

    def write(self, prompt: Prompt, schema: Mapping[str, Any]) -> Mapping[str, Any]: ...


class Unwritten(Exception):
    """The writer gave no object: why, in a few words that are counted as they stand."""


@dataclass
class Account:
    """asked = kept + all of dropped. calls: of the writer, retries among them; unasked: questions given beyond the
    number asked for, which nobody looked at; failures: chunk -> why the writer gave nothing for it."""

    asked: int = 0
    kept: int = 0
    calls: int = 0
    retries: int = 0
    unasked: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    distractors_dropped: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "asked": self.asked,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "distractors_dropped": self.distractors_dropped,
            "calls": self.calls,
            "retries": self.retries,
            "unasked": self.unasked,
            "failures": self.failures,
        }


def prompt_text(chunk: Chunk, number: int, avoid: Sequence[str] = (), complaint: str = "") -> str:
    """The request to a model."""
    plural = "s" if number != 1 else ""
    lines = [
        f"Write {number} multiple-choice exam question{plural} about the passage, in the language of the passage.",
        f"Each has one right answer and {CHOICES - 1} wrong ones of the same kind and about the same length.",
        "The passage alone must tell the answer. A reader sees no passage: name what the question is about.",
        "Give the sentence of the passage that proves the answer, copied word by word, as evidence.",
        "Answer with one JSON object and nothing else:",
        '{"questions": [{"question": "...", "answer": "...", '
        + '"distractors": ["...", "...", "..."], "evidence": "..."}]}',
    ]
    if avoid:
        lines += ["Do not ask these again:", *(f"- {question}" for question in avoid[-8:])]
    if complaint:
        lines.append(f"Your last answer could not be used: {complaint}")
    return "\n".join([*lines, "", f"Passage ({chunk.where}):", chunk.text])


def write(
    chunks: Sequence[Chunk],
    writer: Writer,
    number: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Question], Account]:
    """Up to `number` questions, spread over the documents; fewer where the writer has no more that hold.

    Each round goes through the chunks (documents take turns) and asks each for its share of what is missing; the
    next one makes up for what was dropped. A round that keeps nothing is the last; a writer that gives nothing for the
    first HOPELESS passages is asked no more.
    """
    kept: list[Question] = []
    account = Account()
    order = _spread(chunks, seed)
    for round_ in range(ROUNDS):
        before = len(kept)
        share = -(-(number - before) // len(order)) if order else 0
        for chunk in order:
            if (wanted := min(share, number - len(kept))) <= 0:
                break
            here = tuple(question.question for question in kept if question.chunk == chunk.id)
            call = Random(f"{seed}:{round_}:{chunk.id}").randrange(2**31)
            _ask(chunk, writer, wanted, call, here, kept, account)
            if progress is not None:
                progress(len(kept), number)
            if not kept and len(account.failures) >= HOPELESS:
                break
        if len(kept) in (before, number):
            break
    account.kept = len(kept)
    return kept, account


def _spread(chunks: Sequence[Chunk], seed: int) -> list[Chunk]:
    """Chunks in an order in which documents take turns; within a document drawn with the seed."""
    groups: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        groups.setdefault(chunk.document, []).append(chunk)
    for name, members in groups.items():
        Random(f"{seed}:{name}").shuffle(members)
    most = max(map(len, groups.values()), default=0)
    return [members[place] for place in range(most) for members in groups.values() if place < len(members)]


def _ask(
    chunk: Chunk, writer: Writer, number: int, seed: int, avoid: tuple[str, ...], kept: list[Question], account: Account
) -> None:
    """One chunk: what the writer gives is checked and added to `kept`."""
    account.asked += number
    complaint, reason, drafts = "", "", None
    for attempt in range(1 + RETRIES):
        text = prompt_text(chunk, number, avoid, complaint)
        account.calls += 1
        account.retries += attempt > 0
        try:
            found = writer.write(Prompt(text, chunk, number, seed + attempt, avoid, complaint), SCHEMA)
            drafts = Exam.model_validate(found).questions
            break
        except Unwritten as error:
            reason, complaint = "the writer gave nothing", str(error)
        except ValidationError as error:
            reason, complaint = "the answer is not of the form asked for", _first(error)
    if drafts is None:
        account.dropped[reason] += number
        account.failures.append({"chunk": chunk.id, "reason": reason, "detail": complaint[:300]})
        return
    account.unasked += max(0, len(drafts) - number)
    for draft in drafts[:number]:
        made = _checked(draft, chunk, writer.name, seed, kept, account)
        if isinstance(made, Question):
            kept.append(made)
        else:
            account.dropped[made] += 1
    if len(drafts) < number:
        account.dropped["the writer had no more"] += number - len(drafts)


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc'])) or 'the object'}: {problem['msg']}"


def _checked(
    given: Any, chunk: Chunk, writer: str, seed: int, kept: Sequence[Question], account: Account
) -> Question | str:
    """The question, or why it is none."""
    try:
        draft = Drafted.model_validate(given)
    except ValidationError:
        return "a field is missing or of another type"
    asked, answer = draft.question.strip(), draft.answer.strip()
    if not normal(asked) or not normal(answer):
        return "question or answer is empty"
    evidence = support(answer, draft.evidence, chunk.text)
    if not evidence:
        return "the passage does not support the answer"
    if stands_in(answer, asked):
        return "the question gives the answer away"
    wrong = distinct(answer, draft.distractors)
    account.distractors_dropped += len(draft.distractors) - len(wrong)
    if len(wrong) < CHOICES - 1:
        return "too few distractors that differ"
    if any(near_equal(asked, other.question, ALIKE) for other in kept):
        return "asked already"
    choices = [answer, *wrong[: CHOICES - 1]]
    key = hashlib.sha256(json.dumps([chunk.id, asked, *choices], ensure_ascii=False).encode()).hexdigest()[:12]
    Random(f"{seed}:{key}").shuffle(choices)
    try:
        return Question(
            id=key,
            chunk=chunk.id,
            question=asked,
            choices=tuple(choices),
            answer=choices.index(answer),
            evidence=evidence,
            writer=writer,
        )
    except ValidationError:
        return "a field is missing or of another type"


def support(answer: str, evidence: str, passage: str) -> str:
    """What of the passage supports the answer, as it stands there; "" where nothing does.

    The quotation where it is in the passage (and long enough to be one), else the sentence that has the answer.
    """
    if len(evidence.strip()) >= QUOTE and (found := _quoted(evidence, passage)):
        return found
    return next((sentence for sentence in sentences(passage) if stands_in(answer, sentence)), "")


def _quoted(evidence: str, passage: str) -> str:
    """The passage's own words that match a quotation but for case and spaces; "" where it has none."""
    wanted = squeezed(evidence)
    if wanted not in squeezed(passage):
        return ""
    words = passage.split()
    for start in range(len(words)):
        if not wanted.startswith(squeezed(words[start])) and not squeezed(words[start]).endswith(wanted[:1]):
            continue
        for end in range(start + 1, len(words) + 1):
            piece = squeezed(" ".join(words[start:end]))
            if wanted == piece:
                return " ".join(words[start:end])
            if len(piece) > len(wanted) + 40:
                break
    return evidence.strip()


def distinct(answer: str, distractors: Sequence[str]) -> list[str]:
    """Distractors that differ from the answer and from each other by more than their spelling."""
    out: list[str] = []
    for given in distractors:
        text = given.strip()
        if normal(text) and not any(near_equal(text, other) for other in (answer, *out)):
            out.append(text)
    return out

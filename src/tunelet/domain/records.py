"""What lies in a domain project's files: documents, chunks, questions, and the events of annotators.

Not for reading and writing them (project.py, annotations.py). Unknown fields are refused: a file of another program, or
of a newer tunelet, is not half understood.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tunelet.domain.text import normal

CHOICES = 4
REASONS = ("wrong key", "several right", "not in the passage", "unclear", "trivial", "duplicate", "other")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Document(Strict):
    """A file that was read. path: below the folder that was given; sha256: of its bytes; chunks: how many it gave."""

    path: str
    sha256: str
    title: str
    characters: int
    chunks: int


class Chunk(Strict):
    """A passage. id: a hash of its document's path, its headings and its text; headings: from the document's title
    inwards; terms: what the document set in bold, in code or in quotation marks."""

    id: str
    document: str
    headings: tuple[str, ...] = ()
    text: str
    terms: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        return " > ".join(self.headings) or self.document


class Content(Strict):
    """What can be asked: a question, its choices, the number of the right one from 0."""

    question: str = Field(min_length=1, max_length=4000)
    choices: tuple[str, ...] = Field(min_length=2, max_length=10)
    answer: int

    @model_validator(mode="after")
    def _whole(self) -> Content:
        if not self.question.strip():
            raise ValueError("the question is empty")
        forms = [normal(choice) or choice.strip() for choice in self.choices]
        for number, form in enumerate(forms):
            if not form:
                raise ValueError(f"choice {number + 1} is empty")
            if len(self.choices[number]) > 2000:
                raise ValueError(f"choice {number + 1} is longer than 2,000 characters")
            if form in forms[:number]:
                raise ValueError(f"choice {number + 1} is there twice: {self.choices[number]}")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"the answer is {self.answer}, and there are {len(self.choices)} choices, from 0")
        return self


class Question(Content):
    """A question as a writer made it. evidence: the part of the chunk that supports the answer, as it stands there;
    writer: who wrote it."""

    id: str
    chunk: str
    evidence: str
    writer: str


class Event(Strict):
    """One line of an annotator's file. at: UTC, ISO 8601; item: a question's or pair's id.

    choose: `choice` is the number chosen, blind, in the order of the file (of pairs: 0, 1, or -1 for a tie);
    accept: the key is right, though another choice was made first; edit: `content` replaces the question;
    reject: with `reason` and `note`; seconds: how long it was looked at.
    """

    at: str
    annotator: str
    item: str
    kind: Literal["choose", "accept", "edit", "reject"]
    choice: int | None = None
    content: Content | None = None
    reason: str = ""
    note: str = Field("", max_length=2000)
    seconds: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _whole(self) -> Event:
        if (self.kind == "choose") != (self.choice is not None):
            raise ValueError("choice goes with choose")
        if (self.kind == "edit") != (self.content is not None):
            raise ValueError("content goes with edit")
        if self.kind == "reject" and self.reason not in REASONS:
            raise ValueError(f"reason is none of {', '.join(REASONS)}")
        return self

"""Writers and annotators that follow a script, for the tests of the domain project."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import manuals

from tunelet.domain import chunks, questions
from tunelet.domain.project import Project, Settings, create
from tunelet.domain.text import sentences

TOKEN = "a-token-of-the-test"


class Scripted:
    """Answers with what `script(prompt)` gives; an exception is raised."""

    name = "scripted"

    def __init__(self, script: Callable[[questions.Prompt], Any]):
        self.script, self.prompts = script, []

    def write(self, prompt: questions.Prompt, schema: Mapping[str, Any]) -> Any:
        self.prompts.append(prompt)
        found = self.script(prompt)
        if isinstance(found, Exception):
            raise found
        return found


def good(prompt: questions.Prompt) -> dict[str, Any]:
    """As a capable model would: one question for each sentence, its last word the answer, until there are enough."""
    made = []
    for number, sentence in enumerate(sentences(prompt.chunk.text)):
        word = sentence.split()[-1].strip(".")
        asked = f"Of {prompt.chunk.where}, part {number + 1} of {prompt.chunk.id}: how does it end?"
        if asked not in prompt.avoid:
            wrong = [f"{word[::-1]}{letter}" for letter in "xyz"]
            made.append({"question": asked, "answer": word, "distractors": wrong, "evidence": sentence})
    return {"questions": made[: prompt.number]}


def project(folder: Path, number: int = 30, seed: int = 0) -> Project:
    """A project of the manuals by the cloze writer."""
    from tunelet.domain.cloze import Cloze

    read = chunks.read(manuals.write(folder / "docs"))
    kept, account = questions.write(read.chunks, Cloze(read.chunks), number, seed=seed)
    told = Settings(
        name="home", source="docs", writer=Cloze.name, seed=seed, size=1200, created="2026-01-01", tunelet="0"
    )
    return create(folder / "home", told, read, kept, account)

"""A project's questions in the import formats of Argilla and Label Studio, for teams that annotate there.

Not for the data set (build.py). No key is suggested to annotators: it is metadata, since a suggestion would lead them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from tunelet.domain.annotations import read_all
from tunelet.domain.project import Project
from tunelet.domain.records import CHOICES, REASONS
from tunelet.domain.session import Judged, items_of, judged
from tunelet.errors import TuneletError
from tunelet.runs.files import disk, write_atomically

LETTERS = "ABCDEFGHIJ"
KINDS = ("argilla", "label-studio")


def write(project: Project, kind: str, out: Path) -> list[Path]:
    """Write `out`, and beside it the settings that the other program needs; their paths. Raises TuneletError where
    one is there already."""
    beside = out.with_suffix(".settings.json" if kind == "argilla" else ".config.xml")
    for path in (out, beside):
        if path.exists():
            raise TuneletError(f"{path}: is there already", fix="choose another file, or delete it")
    if not out.parent.is_dir():
        raise TuneletError(f"{out}: there is no folder {out.parent}", fix="make it, or choose another file")
    items = items_of(project)
    found = {name: judged(items, events) for name, events in read_all(project.annotations).items()}
    if kind == "argilla":
        records: list[dict[str, Any]] = argilla(project)
        settings = json.dumps(argilla_settings(), ensure_ascii=False, indent=1) + "\n"
    else:
        records, settings = label_studio(project, found), label_studio_config()
    with disk(out):
        write_atomically(out, json.dumps(records, ensure_ascii=False, indent=1) + "\n")
        write_atomically(beside, settings)
    return [out, beside]


def argilla(project: Project) -> list[dict[str, Any]]:
    """Records as argilla 2's `dataset.records.from_json(path)` reads them. Responses belong to accounts of that
    server, which nobody here knows: what people said is left to `domain build`."""
    out = []
    for question in project.questions:
        chunk = project.chunks[question.chunk]
        choices = "\n".join(f"{LETTERS[place]}. {choice}" for place, choice in enumerate(question.choices))
        out.append(
            {
                "id": question.id,
                "fields": {"passage": chunk.text, "question": question.question, "choices": choices},
                "metadata": {
                    "document": chunk.document,
                    "section": " > ".join(chunk.headings),
                    "key": LETTERS[question.answer],
                    "writer": question.writer,
                },
                "suggestions": {},
                "responses": {},
                "vectors": {},
            }
        )
    return out


def argilla_settings() -> dict[str, Any]:
    """What `rg.Settings.from_json(path)` reads."""

    def asked(name: str, title: str, settings: dict[str, Any], required: bool) -> dict[str, Any]:
        return {"name": name, "title": title, "description": None, "required": required, "settings": settings}

    def labels(values: Any) -> dict[str, Any]:
        options = [{"value": value, "text": value, "description": None} for value in values]
        return {"type": "label_selection", "options": options, "visible_options": len(options)}

    text = {"type": "text", "use_markdown": False}
    return {
        "guidelines": "Choose the right answer by the passage alone. Reject a question that has none, or several.",
        "allow_extra_metadata": True,
        "fields": [asked(name, name.capitalize(), dict(text), True) for name in ("passage", "question", "choices")],
        "questions": [
            asked("answer", "Which answer is right?", labels(LETTERS[:CHOICES]), True),
            asked("reject", "Why should it be left out?", labels(REASONS), False),
            asked("better_question", "A better question", dict(text), False),
        ],
        "vectors": [],
        "metadata": [],
    }


def label_studio(project: Project, found: dict[str, dict[str, Judged]]) -> list[dict[str, Any]]:
    """Tasks in Label Studio's JSON format, with one annotation for each person's answer, theirs by the name in its
    meta: `completed_by` must be an account of that server."""
    out = []
    for question in project.questions:
        chunk = project.chunks[question.chunk]
        data: dict[str, Any] = {
            "id": question.id,
            "passage": chunk.text,
            "question": question.question,
            "document": chunk.document,
            "section": " > ".join(chunk.headings),
            "key": LETTERS[question.answer],
        }
        data |= {f"choice_{LETTERS[place]}": choice for place, choice in enumerate(question.choices)}
        made = []
        for name, of in sorted(found.items()):
            one = of.get(question.id)
            if one is None or one.status == "open":
                continue
            result = []
            if one.choice is not None:
                result.append(_picked("answer", LETTERS[one.choice], name))
            if one.status == "rejected":
                result.append(_picked("reject", one.reason, name))
            if one.content is not None:
                result.append(_picked("better", one.content.question, name))
            made.append({"result": result, "was_cancelled": False, "ground_truth": False})
        out.append({"data": data, "annotations": made})
    return out


def _picked(control: str, value: str, name: str) -> dict[str, Any]:
    kind = "textarea" if control == "better" else "choices"
    key = "text" if control == "better" else "choices"
    return {
        "id": f"{control}-{name}",
        "from_name": control,
        "to_name": "question",
        "type": kind,
        "value": {key: [value]},
        "meta": {"text": [name]},
    }


def label_studio_config() -> str:
    """The labeling configuration that goes with the tasks."""
    letters = LETTERS[:CHOICES]
    shown = "\n".join(f'  <Text name="choice_{a}" value="$choice_{a}"/>' for a in letters)
    answers = "\n".join(f'    <Choice value="{a}"/>' for a in letters)
    reasons = "\n".join(f"    <Choice value={quoteattr(reason)}/>" for reason in REASONS)
    return f"""<View>
  <Text name="passage" value="$passage"/>
  <Header value="$section"/>
  <Text name="question" value="$question"/>
{shown}
  <Choices name="answer" toName="question" choice="single" showInline="true" required="true">
{answers}
  </Choices>
  <Choices name="reject" toName="question" choice="single">
{reasons}
  </Choices>
  <TextArea name="better" toName="question" maxSubmissions="1"/>
</View>
"""

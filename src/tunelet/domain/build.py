"""What annotators accepted -> a versioned data set, a task that `tunelet eval` takes, and where all of it came from.

Not for scoring (evals/). Deterministic: the same project and annotations give the same rows, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

from tunelet import __version__
from tunelet.domain import agreement
from tunelet.domain.annotations import read_all
from tunelet.domain.project import Project, slug
from tunelet.domain.records import Content, Question
from tunelet.domain.session import Judged, items_of, judged, labels, verdicts
from tunelet.domain.text import near_equal, normal
from tunelet.errors import TuneletError
from tunelet.runs.files import disk, write_atomically

KEPT = "kept"


@dataclass(frozen=True)
class Decision:
    """What became of a question. why: KEPT, or why it is left out; content: as it goes into the data set."""

    question: Question
    why: str
    content: Content | None = None
    edited_by: tuple[str, ...] = ()
    accepted_by: tuple[str, ...] = ()


def decide(project: Project, least: int = 1) -> tuple[list[Decision], dict[str, dict[str, Judged]]]:
    """Every question's decision, and what each annotator said. least: people who must have judged it.

    Kept where more than half of those who judged it accept it with the same right answer. One edit of its words is
    taken over; of several that differ none is, because nobody said which: the last one to come does not win.
    """
    items = items_of(project)
    found = {name: judged(items, events) for name, events in read_all(project.annotations).items()}
    out: list[Decision] = []
    for question in project.questions:
        said = {name: of[question.id] for name, of in found.items() if question.id in of}
        said = {name: one for name, one in said.items() if one.status != "open"}
        decision = _decided(question, said, least)
        if decision.content is not None and _again(decision.content, out):
            decision = Decision(question, "edited into a question that is there already")
        out.append(decision)
    return out, found


def _decided(question: Question, said: dict[str, Judged], least: int) -> Decision:
    final = {name: one for name, one in said.items() if one.status != "disputed"}
    if not said:
        return Decision(question, "not judged yet")
    if len(final) < least:
        disputed = len(final) < len(said)
        return Decision(question, "disputed: another answer than the key" if disputed else "judged by too few people")
    accepted = {name: one for name, one in final.items() if one.status != "rejected"}
    votes = Counter(one.content.answer if one.content else question.answer for one in accepted.values())
    if not votes or 2 * max(votes.values()) <= len(said):
        return Decision(question, "rejected" if len(accepted) < len(said) / 2 or not votes else "no majority")
    answer = max(votes, key=lambda place: votes[place])
    agreed = {
        n: one for n, one in accepted.items() if (one.content.answer if one.content else question.answer) == answer
    }
    edits = {name: one.content for name, one in agreed.items() if one.content is not None}
    versions = {(content.question, content.choices) for content in edits.values()}
    if len(versions) > 1:
        return Decision(question, "edits that differ")
    content = next(iter(edits.values()), Content(**question.model_dump(include={"question", "choices", "answer"})))
    return Decision(question, KEPT, content, tuple(sorted(edits)), tuple(sorted(agreed)))


def _again(content: Content, before: list[Decision]) -> bool:
    """Whether a kept question asks the same already, with the same answer."""
    kept = [other.content for other in before if other.content is not None]
    answer = normal(content.choices[content.answer])
    return any(
        normal(other.choices[other.answer]) == answer and near_equal(other.question, content.question, 0.95)
        for other in kept
    )


def people(project: Project, found: dict[str, dict[str, Judged]]) -> dict[str, dict[str, Any]]:
    """annotator -> how many they judged, how, and how often their blind answer was the key."""
    keys = {question.id: question.answer for question in project.questions}
    out = {}
    for name, of in sorted(found.items()):
        answered = [item for item, one in of.items() if one.choice is not None]
        counts = Counter(one.status for one in of.values())
        reasons = Counter(one.reason for one in of.values() if one.status == "rejected")
        out[name] = {
            "answered": len(answered),
            "as_the_key": sum(of[item].choice == keys[item] for item in answered),
            **{status: counts[status] for status in ("accepted", "edited", "rejected", "disputed")},
            "reasons": dict(reasons),
        }
    return out


def agreed(found: dict[str, dict[str, Judged]]) -> dict[str, Any]:
    """Agreement on the answers given blind, and on keeping or rejecting."""
    return {"answers": agreement.measured(labels(found)), "verdicts": agreement.measured(verdicts(found))}


def write(project: Project, *, least: int = 1, train: float = 0.0, name: str = "") -> dict[str, Any]:
    """Build dataset/vN and task.toml; the figures of provenance.json, with `folder` and whether it is `new`.

    train: the share of rows kept apart for training; all questions of one chunk go to one side. Nothing new is
    written where the newest version has these rows already. Raises TuneletError where nothing is accepted.
    """
    if not 0 <= train < 1:
        raise TuneletError(f"--train {train}: is no share of the rows", fix="0 (all for testing) up to 0.9")
    decisions, found = decide(project, least)
    kept = [decision for decision in decisions if decision.why == KEPT]
    left_out = Counter(decision.why for decision in decisions if decision.why != KEPT)
    if not kept:
        reasons = ", ".join(f"{number} {why}" for why, number in left_out.most_common())
        raise TuneletError(
            f"{project.folder}: no question is accepted yet",
            why=f"of {len(decisions)}: {reasons}",
            fix=f"tunelet domain annotate {project.folder}",
        )
    parts = _split(project, kept, train)
    if not parts["test"]:
        raise TuneletError(f"--train {train}: leaves no question for the test", fix="a smaller share, or 0")
    files = {f"{part}.jsonl": "".join(_line(row) for row in rows) for part, rows in parts.items() if rows}
    hashes = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in files.items()}
    number, newest = _newest(project.folder / "dataset")
    told = name or slug(project.settings.name)
    figures: dict[str, Any] = {
        "name": told,
        "version": number + 1,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "tunelet": __version__,
        "rows": {part: len(rows) for part, rows in parts.items() if rows},
        "sha256": hashes,
        "questions": {"written": len(decisions), "kept": len(kept), "left_out": dict(left_out.most_common())},
        "edited": sum(bool(decision.edited_by) for decision in kept),
        "least_annotators": least,
        "annotators": people(project, found),
        "agreement": agreed(found),
        "writer": project.settings.writer,
        "seed": project.settings.seed,
        "account": project.account,
        "documents": [{"path": one.path, "sha256": one.sha256} for one in project.documents],
    }
    if newest is not None and newest.get("sha256") == hashes and newest.get("name") == told:
        return newest | {"folder": str(project.folder / "dataset" / f"v{number}"), "new": False}
    folder = project.folder / "dataset" / f"v{number + 1}"
    with disk(folder):
        folder.mkdir(parents=True)
        for file, text in files.items():
            write_atomically(folder / file, text)
        write_atomically(folder / "card.md", _card(figures))
        write_atomically(folder / "task.toml", task(told, number + 1, "test.jsonl"))
        # last: a version without its provenance was never finished
        write_atomically(folder / "provenance.json", json.dumps(figures, ensure_ascii=False, indent=1) + "\n")
        write_atomically(project.folder / "task.toml", task(told, number + 1, f"dataset/v{number + 1}/test.jsonl"))
    return figures | {"folder": str(folder), "new": True}


def _newest(folder: Path) -> tuple[int, dict[str, Any] | None]:
    """(number of the newest version, its provenance); 0 where there is none."""
    numbers = [int(path.name[1:]) for path in folder.glob("v*") if re.fullmatch(r"v\d+", path.name)]
    number = max(numbers, default=0)
    file = folder / f"v{number}" / "provenance.json"
    return number, json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _split(project: Project, kept: list[Decision], train: float) -> dict[str, list[dict[str, Any]]]:
    """Rows of train and test. Chunks are drawn, not rows: a passage trained on would tell the test's answers."""
    chunks = list(dict.fromkeys(decision.question.chunk for decision in kept))
    Random(f"{project.settings.seed}:split").shuffle(chunks)
    sizes = Counter(decision.question.chunk for decision in kept)
    apart: set[str] = set()
    for chunk in chunks:
        if sum(sizes[one] for one in apart) + sizes[chunk] <= train * len(kept):
            apart.add(chunk)
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for decision in kept:
        parts["train" if decision.question.chunk in apart else "test"].append(_row(project, decision))
    return parts


def _row(project: Project, decision: Decision) -> dict[str, Any]:
    question, content = decision.question, decision.content
    assert content is not None
    chunk = project.chunks[question.chunk]
    return {
        "id": question.id,
        "question": content.question,
        "choices": list(content.choices),
        "answer": content.answer,
        "passage": chunk.text,
        "evidence": question.evidence,
        "document": chunk.document,
        "section": " > ".join(chunk.headings),
        "annotators": list(decision.accepted_by),
        "edited_by": list(decision.edited_by),
    }


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def task(name: str, version: int, rows: str) -> str:
    """A task file of evals/tasks.py: the choices' own texts are scored, which small models can, rather than letters."""
    import tomli_w

    return tomli_w.dumps(
        {
            "name": name,
            "description": "made by tunelet domain build",
            "version": version,
            "kind": "multiple_choice",
            "metrics": ["acc", "acc_norm"],
            "prompt": "Question: {{question}}\nAnswer:",
            "choices": "choices",
            "answer": "answer",
            "rows": {"files": [rows]},
        }
    )


def _card(figures: dict[str, Any]) -> str:
    rows = ", ".join(f"{number} {part}" for part, number in figures["rows"].items())
    lines = [
        f"# {figures['name']}, version {figures['version']}",
        "",
        f"Multiple-choice questions about {len(figures['documents'])} documents: {rows}. "
        f"Made on {figures['created'][:10]} with tunelet {figures['tunelet']}.",
        "",
        f"- Written by: {figures['writer']}; {figures['questions']['written']} questions.",
        f"- Judged by people: {', '.join(figures['annotators'])}. Kept {figures['questions']['kept']}, of which "
        f"{figures['edited']} edited.",
    ]
    lines += [f"- Left out, {why}: {number}." for why, number in figures["questions"]["left_out"].items()]
    lines += [
        f"- Agreement on answers given blind: {agreement.told(figures['agreement']['answers'])}.",
        f"- Agreement on keeping or rejecting: {agreement.told(figures['agreement']['verdicts'])}.",
        "",
        "Fields: question, choices, answer (its number from 0), passage, evidence, document, section, and who judged.",
        "Documents, hashes and counts: provenance.json. Score a model: tunelet eval MODEL --task task.toml",
        "",
    ]
    return "\n".join(lines)

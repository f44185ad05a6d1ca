"""One annotator at work: what the page shows of an item, and what an answer does. Blind until an answer is given.

Not for HTTP (server.py). Items are a project's questions or pairs of answers; both are choices in an order that this
annotator alone sees.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

from pydantic import ValidationError

from tunelet.domain import agreement
from tunelet.domain.annotations import Log, read_all
from tunelet.domain.project import Project
from tunelet.domain.records import REASONS, Content, Event

TIE = -1
DONE = ("accepted", "edited", "rejected")


@dataclass(frozen=True)
class Item:
    """What is judged. key: number of the right choice; None for a pair, which has none. passage: what it is judged
    by; where: its headings; evidence: the part that tells the answer."""

    id: str
    question: str
    choices: tuple[str, ...]
    key: int | None
    passage: str
    where: str = ""
    evidence: str = ""


@dataclass(frozen=True)
class Judged:
    """What an annotator's events say of an item. choice: the one made blind, in the file's order; status: open,
    disputed (another choice than the key, and no word since), accepted, edited or rejected."""

    choice: int | None = None
    status: str = "open"
    content: Content | None = None
    reason: str = ""
    note: str = ""


class Refused(Exception):
    """An action that does not go: `code` names the text the page shows, `detail` adds to it."""

    def __init__(self, code: str, detail: str = "", status: int = 409):
        self.code, self.detail, self.status = code, detail, status
        super().__init__(code)


def items_of(project: Project) -> list[Item]:
    out = []
    for question in project.questions:
        chunk = project.chunks[question.chunk]
        out.append(
            Item(
                question.id,
                question.question,
                question.choices,
                question.answer,
                chunk.text,
                chunk.where,
                question.evidence,
            )
        )
    return out


def judged(items: Sequence[Item], events: Sequence[Event]) -> dict[str, Judged]:
    """item -> what these events of one annotator say. Events of items that are no longer there are passed by. Of a
    question the first choice counts, since later ones were made with the key in sight; of a pair the last."""
    keys = {item.id: item.key for item in items}
    out: dict[str, Judged] = {}
    for event in events:
        if event.item not in keys:
            continue
        now, key = out.get(event.item, Judged()), keys[event.item]
        if event.kind == "choose":
            if now.choice is not None and key is not None:
                continue
            status = "accepted" if key is None or event.choice == key else "disputed"
            out[event.item] = Judged(event.choice, status)
        elif event.kind == "accept":
            out[event.item] = Judged(now.choice, "accepted")
        elif event.kind == "edit":
            out[event.item] = Judged(now.choice, "edited", event.content)
        else:
            out[event.item] = Judged(now.choice, "rejected", None, event.reason, event.note)
    return out


def labels(found: Mapping[str, Mapping[str, Judged]]) -> dict[str, dict[str, int]]:
    """item -> annotator -> the choice made blind: what agreement on answers is measured on. Choices are numbered as
    in the file, where the right one may have any number: numbered from the right one on, all who know the answer would
    say 0, and kappa would take that for chance."""
    out: dict[str, dict[str, int]] = {}
    for name, of in found.items():
        for item, one in of.items():
            if one.choice is not None:
                out.setdefault(item, {})[name] = one.choice
    return out


def verdicts(found: Mapping[str, Mapping[str, Judged]]) -> dict[str, dict[str, str]]:
    """item -> annotator -> keep or reject."""
    out: dict[str, dict[str, str]] = {}
    for name, of in found.items():
        for item, one in of.items():
            if one.status in DONE:
                out.setdefault(item, {})[name] = "reject" if one.status == "rejected" else "keep"
    return out


class Session:
    """An annotator's work on `items`. log: their file, open; folder: where all annotators' files lie."""

    def __init__(self, title: str, items: Sequence[Item], log: Log, folder: Path):
        self.title, self.items, self.folder = title, list(items), folder
        self.annotator = log.path.stem
        self.pairs = bool(items) and items[0].key is None
        self._log = log
        self._lock = threading.Lock()
        self._judged = judged(self.items, log.events)

    # -- what is shown ------------------------------------------------------------------------------------------------

    def order(self, item: Item) -> list[int]:
        """Shown place -> number in the file: another order for every annotator, and the same one at every visit."""
        order = list(range(len(item.choices)))
        Random(f"{self.annotator}:{item.id}").shuffle(order)
        return order

    def view(self, number: int) -> dict[str, Any]:
        """Item `number` from 0 as the page shows it: without key and evidence until a choice was made. Raises Refused
        where there is none."""
        item = self._item(number)
        now, order = self._judged.get(item.id, Judged()), self.order(item)
        shown: dict[str, Any] = {
            "number": number,
            "question": item.question,
            "choices": [item.choices[place] for place in order],
            "passage": item.passage,
            "where": item.where,
            "status": now.status,
            "chosen": now.choice if now.choice in (None, TIE) else order.index(now.choice),
            "reason": now.reason,
            "note": now.note,
            "key": None,
            "evidence": "",
            "edited": None,
        }
        if now.choice is not None and item.key is not None:
            shown |= {"key": order.index(item.key), "evidence": item.evidence}
            if now.content is not None:
                of = now.content
                choices = [of.choices[place] for place in order]
                shown["edited"] = {"question": of.question, "choices": choices, "answer": order.index(of.answer)}
        return shown

    def state(self) -> dict[str, Any]:
        """The progress line: every item's status, and how far annotators agree so far."""
        statuses = [self._judged.get(item.id, Judged()).status for item in self.items]
        todo = [place for place, status in enumerate(statuses) if status not in DONE]
        others = {name: judged(self.items, events) for name, events in self._others().items()}
        found = agreement.measured(labels(others | {self.annotator: self._judged}), interval=False)
        return {
            "title": self.title,
            "annotator": self.annotator,
            "pairs": self.pairs,
            "statuses": statuses,
            "done": len(statuses) - len(todo),
            "total": len(statuses),
            "first": todo[0] if todo else None,
            "agreement": {key: found.get(key) for key in ("measure", "value", "items")},
        }

    def _others(self) -> dict[str, list[Event]]:
        return {name: events for name, events in read_all(self.folder).items() if name != self.annotator}

    # -- what is done -------------------------------------------------------------------------------------------------

    def act(self, number: int, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Save an action; the item as it is then. Raises Refused where the action does not go."""
        with self._lock:
            item = self._item(number)
            now = self._judged.get(item.id, Judged())
            given = {"choose": self._choose, "accept": self._accept, "edit": self._edit, "reject": self._reject}[kind](
                item, now, body
            )
            seconds = body.get("seconds")
            try:
                event = Event(
                    at=datetime.now(UTC).isoformat(timespec="seconds"),
                    annotator=self.annotator,
                    item=item.id,
                    kind=kind,  # type: ignore[arg-type]
                    seconds=seconds if isinstance(seconds, int | float) and 0 <= seconds < 86400 else None,
                    **given,
                )
            except ValidationError as error:
                raise _bad(error) from error
            self._log.append(event)
            self._judged = judged(self.items, self._log.events)
            return self.view(number)

    def _item(self, number: int) -> Item:
        if not 0 <= number < len(self.items):
            raise Refused("no_item", status=404)
        return self.items[number]

    def _choose(self, item: Item, now: Judged, body: Mapping[str, Any]) -> dict[str, Any]:
        choice = body.get("choice")
        if choice == TIE and item.key is None:
            return {"choice": TIE}
        if not isinstance(choice, int) or isinstance(choice, bool) or not 0 <= choice < len(item.choices):
            raise Refused("bad_choice", status=422)
        if now.choice is not None and item.key is not None:
            raise Refused("answered")
        return {"choice": self.order(item)[choice]}

    def _accept(self, item: Item, now: Judged, body: Mapping[str, Any]) -> dict[str, Any]:
        self._seen(item, now)
        return {}

    def _edit(self, item: Item, now: Judged, body: Mapping[str, Any]) -> dict[str, Any]:
        self._seen(item, now)
        choices, answer, order = body.get("choices"), body.get("answer"), self.order(item)
        if not isinstance(choices, list) or len(choices) != len(order) or not isinstance(answer, int):
            raise Refused("bad_edit", status=422)
        if not all(isinstance(choice, str) for choice in choices) or not 0 <= answer < len(order):
            raise Refused("bad_edit", status=422)
        places = {number: place for place, number in enumerate(order)}
        try:
            content = Content(
                question=str(body.get("question", "")).strip(),
                choices=tuple(choices[places[number]].strip() for number in range(len(order))),
                answer=order[answer],
            )
        except ValidationError as error:
            raise _bad(error) from error
        return {"content": content}

    def _reject(self, item: Item, now: Judged, body: Mapping[str, Any]) -> dict[str, Any]:
        reason, note = body.get("reason"), body.get("note", "")
        if reason not in REASONS or not isinstance(note, str):
            raise Refused("bad_reason", status=422)
        return {"reason": reason, "note": note.strip()}

    def _seen(self, item: Item, now: Judged) -> None:
        """What shows or confirms the key goes only after a blind answer."""
        if item.key is None:
            raise Refused("bad_action")
        if now.choice is None:
            raise Refused("blind")


def _bad(error: ValidationError) -> Refused:
    return Refused("bad_edit", error.errors()[0]["msg"].removeprefix("Value error, "), 422)

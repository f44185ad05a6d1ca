"""Pairs of answers to one prompt, to be judged on the same page: rows -> items, judgements -> preference rows.

Not for training on them (data/, methods/): what is written here is what they read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunelet.domain import agreement
from tunelet.domain.annotations import read_all
from tunelet.domain.session import TIE, Item, judged, labels
from tunelet.errors import TuneletError
from tunelet.runs.files import disk, write_atomically

NAMES = (("chosen", "rejected"), ("answer_a", "answer_b"), ("response_a", "response_b"), ("a", "b"))
PROMPTS = ("prompt", "question", "instruction")


def folder_of(path: Path) -> Path:
    """Where the annotators' files of PAIRS.jsonl lie."""
    return path.with_name(f"{path.stem}.annotations")


def read(path: Path) -> list[Item]:
    """The items of `rows`."""
    return [item for item, _ in rows(path)]


def rows(path: Path) -> list[tuple[Item, Any]]:
    """Items, each with its prompt as it was given, of a JSONL file of pairs: a prompt (text or messages) and two
    answers (chosen and rejected, answer_a and answer_b, or a list `answers`). Which the file calls chosen is not shown.

    Raises TuneletError that names the lines which are none, or where an answer equals the other.
    """
    out: list[tuple[Item, Any]] = []
    problems: list[str] = []
    seen: dict[str, int] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise TuneletError(f"{path}: is not UTF-8 text", why=str(error), fix="save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            given, answers = _pair(json.loads(line))
        except (json.JSONDecodeError, ValueError) as error:
            problems.append(f"{path}, line {number}: {error}")
            continue
        prompt = _text(given)
        key = hashlib.sha256(json.dumps([prompt, *answers], ensure_ascii=False).encode()).hexdigest()[:12]
        if key in seen:
            problems.append(f"{path}, line {number}: is line {seen[key]} again")
            continue
        seen[key] = number
        out.append((Item(key, "", answers, None, prompt), given))
    if problems:
        listed = "\n".join(problems[:10]) + (f"\n... and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise TuneletError(f"{path}: {len(problems)} lines are no pairs\n{listed}", fix="mend or remove these lines")
    if not out:
        raise TuneletError(f"{path}: holds no pairs", fix='one object a line: {"prompt": ..., "chosen": ..., ...}')
    return out


def _pair(row: Any) -> tuple[Any, tuple[str, str]]:
    if not isinstance(row, Mapping):
        raise ValueError("is no object")
    prompt: Any = next((row[name] for name in PROMPTS if name in row and _text(row[name])), "")
    given: Any = row.get("answers") or row.get("responses")
    if not given:
        given = next(([row[a], row[b]] for a, b in NAMES if a in row and b in row), None)
    if not isinstance(given, list) or len(given) != 2:
        raise ValueError("has no two answers (chosen and rejected, or answer_a and answer_b)")
    if not prompt and all(isinstance(one, list) and len(one) > 1 for one in given):
        prompt = (
            given[0][:-1] if _text(given[0][:-1]) else ""
        )  # whole conversations: what comes before the last turn is the prompt
    first, second = (_text(one[-1:] if isinstance(one, list) else one, bare=True) for one in given)
    if not prompt:
        raise ValueError("has no prompt")
    if not first or not second:
        raise ValueError("an answer is empty")
    if first == second:
        raise ValueError("both answers are the same")
    return prompt, (first, second)


def _text(value: Any, bare: bool = False) -> str:
    """Text, or messages as text: one message bare, several with who speaks."""
    if isinstance(value, str):
        return value.strip()
    if not isinstance(value, list) or not all(isinstance(one, Mapping) and "content" in one for one in value):
        return ""
    if bare or len(value) == 1:
        return "\n".join(str(one["content"]) for one in value).strip()
    return "\n".join(f"{one.get('role', '?')}: {one['content']}" for one in value)


def results(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(preference rows, summary). A row for every annotator's judgement of a pair: prompt, chosen, rejected,
    annotator; of a tie, tie is true and the answers stand in the file's order."""
    pairs = rows(path)
    items = [item for item, _ in pairs]
    found = {name: judged(items, events) for name, events in read_all(folder_of(path)).items()}
    out = []
    for item, prompt in pairs:
        for name, of in found.items():
            one = of.get(item.id)
            if one is None or one.status != "accepted" or one.choice is None:
                continue
            first, second = item.choices if one.choice in (0, TIE) else reversed(item.choices)
            row: dict[str, Any] = {"prompt": prompt, "chosen": first, "rejected": second}
            out.append(row | {"annotator": name, "tie": one.choice == TIE})
    figures = {
        "pairs": len(items),
        "judgements": len(out),
        "ties": sum(row["tie"] for row in out),
        "rejected": sum(one.status == "rejected" for of in found.values() for one in of.values()),
        "annotators": {name: sum(one.choice is not None for one in of.values()) for name, of in found.items()},
        "agreement": agreement.measured(labels(found)),
    }
    return out, figures


def write(judgements: list[dict[str, Any]], out: Path) -> int:
    """Write the rows that say which answer is better; ties say nothing to train on and are left out. How many."""
    kept = [
        {key: row[key] for key in ("prompt", "chosen", "rejected", "annotator")} for row in judgements if not row["tie"]
    ]
    with disk(out):
        write_atomically(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return len(kept)

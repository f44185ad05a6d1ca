"""The starter's evaluation: held-out requests answered greedily, run in the simulator, and counted.

Not the grading of one answer (starter/grading.py) and not the generation (infer/engine.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tunelet.evals.stats import wilson

LANGUAGES = ("en", "ko")


@dataclass(frozen=True)
class Scored:
    """`metrics`: name -> {"value", "low", "high", "n"}. `items`: one dict per item, with its answer and what was
    judged.
    """

    metrics: dict[str, dict[str, Any]]
    items: list[dict[str, Any]]


def evaluate(
    engine: Any,
    *,
    items: int = 500,
    most: int | None = None,
    seed: int = 0,
    max_new_tokens: int = 128,
    batch_size: int = 128,
    progress: Callable[[int, int], None] | None = None,
    rows: Sequence[dict[str, Any]] | None = None,
    grade: Callable[[str, dict[str, Any]], Any] | None = None,
) -> Scored:
    """Answer and grade held-out items: `items` commands for each language and the requests of other types beside them.

    most: of these only the first so many commands of each language, and of other types as large a part; their numbers
    stay. engine: anything with `renderer.prompt(messages)` and `generate(prompts, ...)`. `rows` and `grade` stand in
    for the starter's own (a world of one's own). Answers are greedy, so that the same model gives the same figures.
    """
    from tunelet import starter

    rows = list(starter.rows("eval", "test", n=items, seed=seed)) if rows is None else list(rows)
    grade = starter.grade if grade is None else grade
    places = _first(rows, most / items) if most is not None and most < items else range(len(rows))
    rows = [rows[place] for place in places]
    answers = engine.generate(
        [engine.renderer.prompt(as_messages(row["messages"])) for row in rows],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=(lambda done: progress(done, len(rows))) if progress else None,
    )
    graded = []
    for number, row, answer in zip(places, rows, answers, strict=True):
        verdict = grade(answer.text, row)
        graded.append(
            {
                "item": f"starter/{number}",
                "language": row["language"],
                "type": row["type"],
                "messages": row["messages"],
                "expected": row["expected"].get("answer"),
                "answer": answer.text,
                "stopped": answer.stopped,
                "tokens": len(answer.ids),
                "executed": verdict.executed,
                "exact": verdict.exact,
                "refused": verdict.refused,
                "problem": verdict.problem,
            }
        )
    return Scored(count(graded), graded)


def _first(rows: Sequence[dict[str, Any]], share: float) -> list[int]:
    """Places of the first rows of each language and type, so large a share of them, rounded up."""
    groups: dict[tuple[str, str], list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((row["language"], row["type"]), []).append(place)
    return sorted(place for group in groups.values() for place in group[: math.ceil(share * len(group))])


def count(graded: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Graded items -> metrics with Wilson intervals. A metric without items is left out.

    executed_match_*: commands whose effect is the one asked for. exact_match_*: commands letter by letter.
    refusal_right: unsupported requests turned down. refusal_false: commands turned down. stop_rate: all answers that
    end.
    other_match: state questions, small talk and format constraints answered as expected. invented_rate: of those asked
    what they sent, the ones that name anything but that.
    """
    graded = list(graded)
    commands = [item for item in graded if item["type"] == "command"]
    counted: dict[str, tuple[str, list[dict[str, Any]]]] = {}
    for language in LANGUAGES:
        own = [item for item in commands if item["language"] == language]
        counted[f"executed_match_{language}"] = ("executed", own)
        counted[f"exact_match_{language}"] = ("exact", own)
    counted["stop_rate"] = ("stopped", graded)
    counted["refusal_right"] = ("refused", [item for item in graded if item["type"] == "unsupported"])
    counted["refusal_false"] = ("refused", commands)
    apart = ("command", "unsupported", "confirm")
    counted["other_match"] = ("executed", [i for i in graded if i["type"] not in apart])
    confirmed = [{**item, "invented": not item["executed"]} for item in graded if item["type"] == "confirm"]
    counted["invented_rate"] = ("invented", confirmed)
    return {
        name: wilson(sum(bool(item[key]) for item in group), len(group)).as_dict()
        for name, (key, group) in counted.items()
        if group
    }


def as_messages(messages: Iterable[dict[str, Any]]) -> list[Any]:
    """Dicts with role and content -> Message."""
    from tunelet.data.examples import Message

    return [Message(message["role"], message["content"]) for message in messages]

"""Is an answer right? Executed (it changes the home as the request wanted), exact (letter by letter), refused.

`grade(answer, item)` takes an item of `rows("eval", ...)`. Not here: statistics over many items (`evals/starter.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunelet.starter.simulator import CommandError, Home, command_from, parse
from tunelet.starter.world import load


@dataclass(frozen=True, slots=True)
class Verdict:
    """`executed`: same effect on the home as expected (commands), or the expected kind of answer (all other types)."""

    executed: bool
    exact: bool
    refused: bool
    problem: str = ""


def refused(answer: str) -> bool:
    """A refusal holds no command and says, in one of the grammar's words, that it can't."""
    if "{" in answer:
        return False
    return any(mark in answer for language in ("en", "ko") for mark in load(language)["answers"]["refusal_marks"])


def grade(answer: str, item: dict[str, Any]) -> Verdict:
    """Grade one answer (without the end token) against one evaluation item."""
    answer, expected = answer.strip(), item["expected"]
    exact, says_no = answer == expected.get("answer"), refused(answer)
    if item["type"] == "command":
        wanted = [command_from(c) for c in expected["commands"]]
        try:
            done = Home().run_all(parse(answer))
        except CommandError as error:
            return Verdict(False, exact, says_no, str(error))
        ok = done == Home().run_all(wanted)
        return Verdict(ok, exact, False, "" if ok else "another effect than the one asked for")
    if item["type"] == "confirm":
        try:
            ok = parse(answer) == parse(expected["answer"])
        except CommandError as error:
            return Verdict(False, exact, says_no, str(error))
        return Verdict(ok, exact, says_no, "" if ok else "another command than the one that was sent")
    if item["type"] == "unsupported":
        return Verdict(says_no, exact, says_no, "" if says_no else "not turned down")
    if item["type"] == "format":
        names = [part.strip() for part in answer.split(",")]
        ok = len(set(names)) == len(names) == expected["count"] and set(names) <= set(expected["of"])
        return Verdict(ok, exact, says_no, "" if ok else f"wanted {expected['count']} of {', '.join(expected['of'])}")
    return Verdict(exact, exact, says_no, "" if exact else f"expected {expected['answer']!r}")

"""IFEval: does an answer follow the instructions of its prompt that a program can check? Rows, verdicts and score.

Zhou et al. 2023, arXiv:2311.07911. Not the verifiers (ifeval_checks.py, ifeval_ko.py) and not what they count
(ifeval_text.py). A row is a dict as in the published file: `prompt`, `instruction_id_list`, and as many `kwargs`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from tunelet.errors import TuneletError, did_you_mean
from tunelet.evals.ifeval_checks import VERIFIERS, Check
from tunelet.evals.stats import wilson

Row = Mapping[str, Any]


def verify(
    instruction_id: str,
    kwargs: Mapping[str, Any],
    prompt: str,
    answer: str,
    *,
    verifiers: Mapping[str, Check] = VERIFIERS,
) -> bool:
    """Is this instruction followed by the answer? An empty answer follows none.

    kwargs: as in the row; entries of None count as absent, as in the copy on the hub, where every row has every key.
    prompt: what `combination:repeat_prompt` asks to repeat where its kwargs don't say.

    Raises TuneletError for an instruction, an argument or a relation that doesn't exist, and one that is missing.
    """
    if instruction_id not in verifiers:
        raise TuneletError(
            f"no verifier for the instruction '{instruction_id}'.{did_you_mean(instruction_id, verifiers)}",
            why=f"known are: {', '.join(sorted(verifiers))}",
            fix="correct the row's instruction_id_list",
        )
    check = verifiers[instruction_id]
    given = {name: value for name, value in kwargs.items() if value is not None}
    required, optional = _arguments(check)
    if "prompt_to_repeat" in required:
        given.setdefault("prompt_to_repeat", prompt)
    if not required <= set(given) <= required | optional:
        raise TuneletError(
            f"'{instruction_id}' with the arguments {sorted(given)}",
            why=f"it takes {sorted(required) or 'none'}" + (f" and may take {sorted(optional)}" if optional else ""),
            fix="correct the row's kwargs",
        )
    try:
        return bool(answer.strip()) and check(answer, **given)
    except (ValueError, TypeError, AttributeError, re.error) as error:  # of a number or a pattern that is none
        raise TuneletError(f"'{instruction_id}': {error}", fix="correct the row's kwargs") from error


@cache
def _arguments(check: Check) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the arguments that a verifier needs, and of those that it may take."""
    own = [entry for entry in inspect.signature(check).parameters.values() if entry.kind is entry.KEYWORD_ONLY]
    needed = frozenset(entry.name for entry in own if entry.default is entry.empty)
    return needed, frozenset(entry.name for entry in own) - needed


def strict(row: Row, answer: str, *, verifiers: Mapping[str, Check] = VERIFIERS) -> tuple[bool, ...]:
    """A verdict for each instruction of the row, on the answer as it is. Raises as `verify`, with the row's key."""
    return tuple(
        verify(name, kwargs, row["prompt"], answer, verifiers=verifiers) for name, kwargs in _instructions(row)
    )


def loose(row: Row, answer: str, *, verifiers: Mapping[str, Check] = VERIFIERS) -> tuple[bool, ...]:
    """A verdict for each instruction: does any of eight forms of the answer follow it? See `variants`."""
    forms = variants(answer)
    return tuple(
        any(verify(name, kwargs, row["prompt"], form, verifiers=verifiers) for form in forms)
        for name, kwargs in _instructions(row)
    )


def _instructions(row: Row) -> Iterator[tuple[str, Mapping[str, Any]]]:
    names, kwargs = row["instruction_id_list"], row["kwargs"]
    if not names or len(names) != len(kwargs):
        raise TuneletError(
            f"row {row.get('key', '')!s} has {len(names)} instructions and {len(kwargs)} kwargs",
            why="there is one dict of arguments for each instruction, and at least one instruction",
            fix="correct the row",
        )
    return zip(names, kwargs, strict=True)


def variants(answer: str) -> tuple[str, ...]:
    """The answer, without its first line, its last, and both (an introduction, a farewell); and each without "*"."""
    lines = answer.split("\n")
    cut = (answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])))
    return (*cut, *(form.replace("*", "") for form in cut))


def score(
    rows: Sequence[Row], answers: Sequence[str], *, verifiers: Mapping[str, Check] = VERIFIERS
) -> dict[str, dict[str, Any]]:
    """Metrics by lm-eval's names, each {"value", "low", "high", "n"} with Wilson's interval.

    prompt_level_*: share of prompts all of whose instructions are followed. inst_level_*: share of instructions. Those
    of one prompt are counted as independent, which they're not quite: the interval is a little narrow.

    Raises TuneletError where there is nothing to count, or not one answer to each row.
    """
    if not rows or len(rows) != len(answers):
        raise TuneletError(
            f"{len(answers)} answers to {len(rows)} rows",
            why="a score needs one answer to each row, and at least one row",
        )
    metrics = {}
    for name, judge in (("strict", strict), ("loose", loose)):
        verdicts = [judge(row, answer, verifiers=verifiers) for row, answer in zip(rows, answers, strict=True)]
        single = [verdict for of_row in verdicts for verdict in of_row]
        metrics[f"prompt_level_{name}_acc"] = wilson(sum(map(all, verdicts)), len(verdicts)).as_dict()
        metrics[f"inst_level_{name}_acc"] = wilson(sum(single), len(single)).as_dict()
    return metrics


def by_instruction(rows: Sequence[Row], verdicts: Sequence[Sequence[bool]]) -> dict[str, dict[str, Any]]:
    """Share followed of each kind of instruction: its name -> {"value", "low", "high", "n"}, names sorted.

    verdicts: what `strict` or `loose` said of each row.
    """
    found: dict[str, list[bool]] = {}
    for row, of_row in zip(rows, verdicts, strict=True):
        for name, verdict in zip(row["instruction_id_list"], of_row, strict=True):
            found.setdefault(name, []).append(verdict)
    return {name: wilson(sum(found[name]), len(found[name])).as_dict() for name in sorted(found)}

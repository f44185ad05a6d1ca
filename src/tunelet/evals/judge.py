"""Which of two answers to one request is better: by the starter's own grading, or asked of a model.

Not the counting of judgements (winrate.py). A model is asked in both orders, because small ones in particular favour a
place (Zheng et al. 2023, arXiv:2306.05685, section 3): where its two verdicts differ the answers tie.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunelet.data.examples import Message, Origin, Tokens
from tunelet.evals import preference

QUESTION = """Here are a request and two answers to it.

Request:
{request}

Answer A:
{a}

Answer B:
{b}

Which answer is better? Reply with A or B alone."""
PLAIN = "\n\nBetter answer:"  # put behind the question for a judge without a chat template


@dataclass(frozen=True, slots=True)
class Judgement:
    """won: 1 for the first answer, 0 for the second, 0.5 for a tie. flipped: whether the judge named the same place in
    both orders; None where it was not asked, because the answers are the same."""

    won: float
    flipped: bool | None = None


def by_grade(first: Mapping[str, Any], second: Mapping[str, Any]) -> Judgement:
    """Of two graded items of evals/starter.py: right beats wrong, and of two right answers an exact one the other."""
    a, b = ((item["executed"], item["executed"] and item["exact"]) for item in (first, second))
    return Judgement(0.5 if a == b else float(a > b))


def ask(
    engine: Any,
    requests: Sequence[Sequence[Mapping[str, Any]]],
    first: Sequence[str],
    second: Sequence[str],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Judgement | None]:
    """What `engine`'s model says of each pair of answers; None where it cannot read that much at once.

    It is given QUESTION, as a user's message of its chat template (a judge without one: as text with PLAIN behind it),
    and prefers the answer whose letter, A or B, it finds more probable to come next.
    """
    rows: dict[tuple[int, bool], Tokens] = {}
    out: list[Judgement | None] = [Judgement(0.5) if a == b else None for a, b in zip(first, second, strict=True)]
    for place, (request, a, b) in enumerate(zip(requests, first, second, strict=True)):
        if out[place]:
            continue
        two = {swapped: _row(engine, request, *((b, a) if swapped else (a, b))) for swapped in (False, True)}
        if all(not engine.max_length or len(row.ids) <= engine.max_length for row in two.values()):
            rows |= {(place, swapped): row for swapped, row in two.items()}
    found = preference.scores(engine.model, list(rows.values()), progress=progress)
    said = {key: (a > b) - (a < b) for key, ((a, _), (b, _)) in zip(rows, found, strict=True)}  # 1: A, -1: B
    for place, swapped in rows:
        if not swapped:
            straight, turned = said[place, False], -said[place, True]
            agreed = straight if straight == turned else 0
            out[place] = Judgement((1 + agreed) / 2, straight * turned < 0)
    return out


def _row(engine: Any, request: Sequence[Mapping[str, Any]], a: str, b: str) -> Tokens:
    """The question, with "A" and "B" as two ways to go on."""
    single = len(request) == 1
    told = "\n".join(turn["content"] if single else f"{turn['role']}: {turn['content']}" for turn in request)
    question = QUESTION.format(request=told, a=a, b=b)
    if engine.tokenizer.chat_template:
        ids, letters = engine.renderer.prompt([Message("user", question)]), ("A", "B")
    else:
        ids, letters = engine.renderer.raw(question + PLAIN), (" A", " B")
    ways = [engine.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in letters]
    whole = (*ids, *ways[0], *ways[1])
    mask = (False,) * len(ids) + (True,) * (len(whole) - len(ids))
    starts = (len(ids), len(ids) + len(ways[0]))
    return Tokens(whole, mask, ((0, len(whole), "text"),), Origin("judge", 1), branches=starts)

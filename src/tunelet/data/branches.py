"""Several answers to one prompt -> one row whose prompt stands there once, as `Tokens.branches` says.

Not for templates (render.py renders every answer behind its prompt, as a conversation) and not for batches (pack.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tunelet.data.examples import Chat, Finding, Labelled, Message, Preference, Tokens
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from tunelet.data.render import Renderer

Turns = tuple[Message, ...]


def pairs(renderer: Renderer, examples: Sequence[Preference], problems: list[Finding]) -> list[Tokens]:
    """A row for each pair: the prompt, the chosen answer, the rejected one; only answers are trained. What cannot be
    rendered goes to `problems`."""
    answers = [((example.prompt, example.chosen), (example.prompt, example.rejected)) for example in examples]
    return _rows(renderer, examples, answers, problems)


def labelled(
    renderer: Renderer, examples: Sequence[Labelled], problems: list[Finding], others: Sequence[Labelled] = ()
) -> list[Tokens]:
    """A row for each answer with a verdict: the prompt, the answer, and then what the next row with another prompt was
    answered, which KTO estimates its reference point from; of `others` where these rows have one prompt. Raises
    TuneletError where all rows have."""
    pool = [*examples, *others]
    prompts = [example.prompt for example in pool]
    if examples and all(prompt == prompts[0] for prompt in prompts):
        raise TuneletError(
            "kto needs rows with at least two different prompts",
            why="it compares an answer with one that was given to something else",
            fix="add rows with other prompts",
        )
    answers = []
    for number, example in enumerate(examples):
        order = itertools.chain(range(number + 1, len(examples)), range(number), range(len(examples), len(pool)))
        other = next(place for place in order if prompts[place] != example.prompt)
        answers.append(((example.prompt, example.completion), (example.prompt, pool[other].completion)))
    return _rows(renderer, examples, answers, problems)


def _rows(
    renderer: Renderer,
    examples: Sequence[Preference] | Sequence[Labelled],
    answers: Sequence[tuple[tuple[Turns, Turns], tuple[Turns, Turns]]],
    problems: list[Finding],
) -> list[Tokens]:
    chats = [
        # a fresh origin each: rendering leaves out what it cannot do, and several rows may come from one place
        Chat((*(replace(turn, weight=0.0) for turn in prompt), *answer), replace(example.origin), example.tools)
        for example, two in zip(examples, answers, strict=True)
        for prompt, answer in two
    ]
    said: list[Finding] = []
    found = {id(row.origin): row for row in renderer.chats(chats, said)}
    refused = {id(finding.origin): finding for finding in said}
    out = []
    for example, first, second in zip(examples, chats[0::2], chats[1::2], strict=True):
        both = (id(first.origin), id(second.origin))
        problem = next((refused[key] for key in both if key in refused), None)  # one for the row, not for each answer
        parts = [found[key] for key in both] if problem is None else []
        problem = problem or _unusable(parts, compared=isinstance(example, Preference))
        if problem:
            problems.append(replace(problem, origin=example.origin))
            continue
        out.append(replace(join(parts), origin=example.origin, label=getattr(example, "label", True)))
    return out


def _unusable(parts: Sequence[Tokens], compared: bool) -> Finding | None:
    """compared: the answers are a better and a worse one; two rows of verdicts may well have been answered the same."""
    if not all(part.trained for part in parts):
        return Finding(
            "nothing_trained",
            "error",
            "the chat template leaves no token of an answer to train on",
            fix="look at the row with `tunelet data mask`, or give another template: --set model.chat_template=FILE",
        )
    if parts[0].ids[0] != parts[1].ids[0]:
        return Finding(
            "no_shared_prompt",
            "error",
            "the prompt is one token with the beginning of an answer: nothing stands before both answers",
            fix="give a template that begins with a token of its own: --set model.chat_template=FILE",
        )
    if compared and parts[0].ids == parts[1].ids:
        return Finding(
            "identical_answers", "error", "both answers are the same once they are rendered", fix="remove the row"
        )
    return None


def join(parts: Sequence[Tokens]) -> Tokens:
    """One row of several renderings: what they begin with, up to the first trained token of any, then the rest of
    each."""
    first = min(part.mask.index(True) for part in parts)
    shared = first
    for ids in zip(*(part.ids[:first] for part in parts), strict=False):
        if len(set(ids)) > 1:
            shared = next(i for i in range(first) if len({part.ids[i] for part in parts}) > 1)
            break
    if not shared:
        raise ValueError(f"{parts[0].origin}: the answers have no beginning in common")
    ids, mask, branches = list(parts[0].ids[:shared]), list(parts[0].mask[:shared]), []
    spans = [(a, min(b, shared), role) for a, b, role in parts[0].spans if a < shared]
    for part in parts:
        offset = len(ids) - shared
        branches.append(len(ids))
        ids += part.ids[shared:]
        mask += part.mask[shared:]
        spans += [(max(a, shared) + offset, b + offset, role) for a, b, role in part.spans if b > shared]
    return Tokens(tuple(ids), tuple(mask), tuple(spans), parts[0].origin, branches=tuple(branches))


def longest(row: Tokens) -> int:
    """Tokens of the row's longest sequence, with what the branches share."""
    return row.branches[0] + max(end - start for start, (_, end) in zip(row.branches, row.sequences, strict=True))


def cut(row: Tokens, length: int, compared: bool = True) -> tuple[Tokens, Finding | None]:
    """Every sequence cut to its first `length` tokens, and what that did to the answers: lost one (error), made both
    the same (error, where they are `compared`), or shortened one (warning)."""
    if longest(row) <= length:
        return row, None
    fix = f"raise data.max_length (this row: {longest(row)}), or shorten the prompt"
    whole = [row.only(number) for number in range(len(row.branches))]
    if row.branches[0] >= length:
        return row, Finding(
            "truncated_answer",
            "error",
            f"the answers begin after token {length}: nothing of them is left",
            row.origin,
            fix,
        )
    short = []
    for part in whole:
        spans = tuple((a, min(b, length), role) for a, b, role in part.spans if a < length)
        short.append(replace(part, ids=part.ids[:length], mask=part.mask[:length], spans=spans))
    if not all(part.trained for part in short):
        return row, Finding(
            "truncated_answer",
            "error",
            f"an answer begins after token {length}: nothing of it is left",
            row.origin,
            fix,
        )
    if compared and short[0].ids == short[1].ids:
        return row, Finding(
            "same_when_cut", "error", f"both answers are the same up to token {length}", row.origin, fix
        )
    lost = sum(part.trained for part in whole) - sum(part.trained for part in short)
    joined = replace(join(short), origin=row.origin, label=row.label)
    return joined, Finding(
        "cut_short",
        "warning",
        f"{lost} tokens of the answers lie beyond token {length}, an end token too",
        row.origin,
        fix,
    )

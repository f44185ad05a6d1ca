"""What a tokenizer and its template do to rows: answers lost to cutting, a second BOS, no end token, unknown letters.

Not for rendering: that is render.py's; the Renderer is handed in. `cut` and `truncation` serve train/prepare.py too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tunelet.data import branches
from tunelet.data.doctor_corpus import all_turns
from tunelet.data.doctor_rows import TEMPLATE_TOKENS
from tunelet.data.examples import Chat, Example, Finding, Labelled, Preference, Text, Tokens

if TYPE_CHECKING:
    from tunelet.data.render import Renderer


def cut(row: Tokens, length: int) -> Tokens:
    """The first `length` tokens of a row, with the spans of those."""
    if len(row.ids) <= length:
        return row
    spans = tuple((start, min(end, length), role) for start, end, role in row.spans if start < length)
    return replace(row, ids=row.ids[:length], mask=row.mask[:length], spans=spans)


def truncation(row: Tokens, short: Tokens, length: int) -> Finding | None:
    """What cutting a row to `length` tokens did to its answer: lost it (error), shortened it (warning), or nothing."""
    if not row.trained:
        return Finding(
            "nothing_trained",
            "error",
            "the chat template leaves no token of the answer to train on",
            row.origin,
            "look at the row with `tunelet data mask`, or give another template: --set model.chat_template=FILE",
        )
    if not short.trained:
        return Finding(
            "truncated_answer",
            "error",
            f"the answer begins after token {length}: nothing of it is left ({len(row.ids)} tokens in all)",
            row.origin,
            f"raise data.max_length (this row: {len(row.ids)}), or shorten the prompt",
        )
    if lost := row.trained - short.trained:
        return Finding(
            "cut_short",
            "warning",
            f"{lost} of {row.trained} trained tokens lie beyond token {length}, the end token too",
            row.origin,
            f"raise data.max_length (this row: {len(row.ids)}), or split the row",
        )
    return None


def look(examples: Sequence[Example], renderer: Renderer, max_length: int = 0) -> list[tuple[int, Finding]]:
    """Findings of rows as (index into examples, finding), and of the tokenizer itself as (-1, finding)."""
    out = [(-1, finding) for finding in _tokenizer(renderer)]
    unknown = renderer.tokenizer.unk_token_id
    bos = renderer.tokenizer.bos_token_id
    ends = None
    special = [token for token in renderer.tokenizer.all_special_tokens if len(token) > 2]
    for index, example in enumerate(examples):
        problems: list[Finding] = []
        rows = _rendered(example, renderer, max_length, problems)
        out += [(index, problem) for problem in dict.fromkeys(problems)]  # both answers of a pair may have one
        if not rows:
            continue
        row = rows[0]
        if not isinstance(example, Text) and ends is None:
            ends = set(renderer.stop_ids)
        if bos is not None and len(row.ids) > 1 and row.ids[0] == row.ids[1] == bos:
            out.append(
                (
                    index,
                    Finding("double_bos", "warning", "the row begins with two BOS tokens", row.origin, "take one out"),
                )
            )
        if unknown is not None and unknown not in (bos, renderer.tokenizer.eos_token_id):
            count = sum(int(token) == unknown for row in rows for token in row.ids)
            if count:
                out.append(
                    (
                        index,
                        Finding(
                            "unknown_letters", "warning", f"{count} tokens are unknown to the tokenizer", row.origin
                        ),
                    )
                )
        literal = next((t for turn in all_turns(example) for t in special if t in turn.content), None)
        if literal and not TEMPLATE_TOKENS.search(literal):
            message = f"the text holds '{literal}', which the tokenizer makes a control token of"
            out.append((index, Finding("template_tokens", "warning", message, row.origin, "take it out of the text")))
        if not isinstance(example, Text) and ends and not all(_stops(row, ends) for row in rows):
            out.append(
                (
                    index,
                    Finding(
                        "no_stop_token",
                        "error",
                        "no end token is trained after the answer: the model would never stop",
                        row.origin,
                        "give a template that ends each assistant turn with a token: --set model.chat_template=FILE",
                    ),
                )
            )
    return out + [(-1, finding) for finding in renderer.findings()]


def _rendered(example: Example, renderer: Renderer, max_length: int, problems: list[Finding]) -> list[Tokens]:
    """What a row is trained on: one sequence, or two of a pair. What that or cutting it does goes to `problems`."""
    if isinstance(example, Preference):
        pair = branches.pairs(renderer, [example], problems)
        lost = branches.cut(pair[0], max_length)[1] if pair and max_length else None
        made = [pair[0].only(0), pair[0].only(1)] if pair else []
    else:
        if isinstance(example, Labelled):
            prompt = tuple(replace(turn, weight=0.0) for turn in example.prompt)
            example = Chat((*prompt, *example.completion), example.origin, example.tools)
        made = renderer.texts([example]) if isinstance(example, Text) else renderer.chats([example], problems)
        lost = truncation(made[0], cut(made[0], max_length), max_length) if made and max_length else None
    problems += [lost] if lost else []
    return made


def _stops(row: Tokens, ends: set[int]) -> bool:
    """Whether one of the last three trained tokens ends a turn (a line break may follow it)."""
    trained = [int(token) for token, flag in zip(row.ids, row.mask, strict=True) if flag]
    return not trained or any(token in ends for token in trained[-3:])


def _tokenizer(renderer: Renderer) -> list[Finding]:
    tokenizer = renderer.tokenizer
    found = []
    if tokenizer.eos_token_id is None:
        found.append(
            Finding(
                "no_end_token",
                "error",
                "the tokenizer names no end token",
                fix='set "eos_token" in tokenizer_config.json',
            )
        )
    elif tokenizer.pad_token_id == tokenizer.eos_token_id:
        found.append(
            Finding(
                "pad_is_eos",
                "warning",
                f"the padding token is the end token ('{tokenizer.eos_token}'). Nothing is padded here, but trainers "
                "that mask padding mask the end token with it, and their models do not stop",
                fix='give "pad_token" a token of its own in tokenizer_config.json before you train elsewhere',
            )
        )
    return found

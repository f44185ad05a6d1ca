"""Items -> contexts: instruction, solved examples, the question; as plain text or through a chat template. As lm-eval
(0.4.13, api/task.py fewshot_context) puts them together.

Not for tokens (tokenise.py), and the only chat template code is data/render.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tunelet.data.examples import Message
from tunelet.errors import TuneletError
from tunelet.evals.task_rows import Item
from tunelet.evals.tasks import Task

SEED = 1234  # lm-eval's own for drawing examples


@dataclass(frozen=True)
class Style:
    """chat: through the chat template; multiturn: there every example is a turn of the user and one of the assistant,
    else all are one message; system: told before everything; seed: of the draw of examples."""

    chat: bool = False
    multiturn: bool = False
    system: str = ""
    seed: int = SEED


@dataclass(frozen=True)
class Asked:
    """contexts and continuations: pairs to be scored, one for each choice; for "generate" one context, no
    continuation."""

    item: Item
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]


def ask(
    task: Task,
    items: Sequence[Item],
    pool: Sequence[Item],
    number: int,
    style: Style,
    instruction: Callable[[Item], str],
    *,
    same_rows: bool = False,
    template: Callable[[Sequence[Message]], str] | None = None,
) -> list[Asked]:
    """Every item with `number` examples of `pool` before it. same_rows: pool and items are the same rows, and no
    question is its own example. template: messages -> text with the beginning of an answer, for style.chat.

    Raises TuneletError where the pool is too small.
    """
    draw = _Draw(task, pool, number, style.seed, same_rows)
    return [_asked(task, item, draw(item), style, instruction(item), template) for item in items]


class _Draw:
    """The examples before each item, drawn one after the other from one stream of random numbers, as lm-eval draws."""

    def __init__(self, task: Task, pool: Sequence[Item], number: int, seed: int, same_rows: bool):
        self.task, self.pool, self.number, self.same = task, list(pool), number, same_rows
        self.random = random.Random(seed)
        needed = number + (same_rows or (number and task.fewshot.spare))
        if number and len(self.pool) < needed:
            raise TuneletError(
                f"task {task.name}: {number} examples are asked for, and there are {len(self.pool)} rows for them",
                why="a question is never its own example" if same_rows else "",
                fix=f"--num-fewshot {max(0, len(self.pool) - (needed - number))} or less, or more rows",
            )

    def __call__(self, item: Item) -> list[Item]:
        if not self.number:
            return []
        if self.task.fewshot.order == "first":
            return [other for other in self.pool if not self._is(other, item)][: self.number]
        if not (self.same or self.task.fewshot.spare):
            return self.random.sample(self.pool, self.number)
        drawn = [o for o in self.random.sample(self.pool, self.number + 1) if not self._is(o, item)]
        if len(drawn) < self.number:  # the same row stands there twice
            drawn = self.random.sample([o for o in self.pool if not self._is(o, item)], self.number)
        return drawn[: self.number]

    def _is(self, other: Item, item: Item) -> bool:
        return other.doc == item.doc


def _asked(
    task: Task,
    item: Item,
    examples: Sequence[Item],
    style: Style,
    instruction: str,
    template: Callable[[Sequence[Message]], str] | None,
) -> Asked:
    # (role, content, what follows it in plain text)
    turns: list[tuple[str, str, str]] = []
    system = delimited(style.system or task.system, instruction, task.fewshot.delimiter)
    for example in examples:
        question = example.prompt if example.continuation is None else example.choices[example.gold]
        turns.append(("user", question, task.delimiter if example.target else ""))
        if example.target:
            turns.append(("assistant", example.target, task.fewshot.delimiter))
    questions = [item.prompt] if item.continuation is None else list(item.choices)
    contexts = []
    for question in questions:
        all_turns = [*turns, ("user", question, "")]
        if not style.chat or template is None:
            contexts.append(system + "".join(content + after for _, content, after in all_turns))
            continue
        messages = [Message("system", system)] if system else []
        if style.multiturn:
            messages += [Message(role, content) for role, content, _ in all_turns]
        else:
            messages.append(Message("user", "".join(content + after for _, content, after in all_turns)))
        contexts.append(template(messages))
    if task.kind == "generate":
        return Asked(item, tuple(contexts), ())
    delimiter = "" if style.chat else task.delimiter
    if item.continuation is not None:
        return Asked(item, tuple(contexts), (delimiter + item.continuation,) * len(contexts))
    return Asked(item, tuple(contexts) * len(item.choices), tuple(delimiter + choice for choice in item.choices))


def delimited(before: str, after: str, delimiter: str) -> str:
    """Both, with the delimiter between them unless white space is there already (lm-eval: maybe_delimit)."""
    if not before or not after:
        return before or after
    return before + ("" if before[-1].isspace() or after[0].isspace() else delimiter) + after


def renderer_template(renderer: Any) -> Callable[[Sequence[Message]], str]:
    return lambda messages: renderer.string(messages, add_generation_prompt=True)

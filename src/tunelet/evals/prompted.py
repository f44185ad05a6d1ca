"""A model asked by a prompt alone, without tuning: an instruction, examples from the training rows, the question.

Through the chat template or as plain text, whichever makes the answers of other training rows most probable: a base
model's template is often untrained, and text is then its fair chance. Not for what is measured of the answers
(held_out.py, starter.py) and not for benchmarks (prompts.py). No held-out row is ever looked at to choose anything.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tunelet.data.examples import Chat, Example, Labelled, Message, Origin, Preference
from tunelet.errors import TuneletError
from tunelet.evals import likelihood
from tunelet.evals.likelihood import Likelihood, Request

PROBES = 32  # training rows whose answers' probability chooses the layout
USUAL = 128  # tokens of a prompt without examples, for which eval.batch_size is meant
PLAIN = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turns:
    """What is asked, and the answer to it. where: the row it is from."""

    messages: tuple[Message, ...]
    answer: str
    where: Origin
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Layout:
    """How turns become text. "{}" is a turn's content; opening: what stands before the answer to come, lead: how that
    goes on from it; ends: what shows that the answer is over, the first that no answer holds."""

    name: str
    user: str = ""
    assistant: str = ""
    opening: str = ""
    lead: str = ""
    ends: tuple[str, ...] = ()


CHAT = Layout("chat template")
TEXTS = (
    Layout("Q and A", "Q: {}\n", "A: {}\n\n", "A:", " ", ("\n\n", "\n\nQ:")),
    Layout("dialogue", "User: {}\n", "Assistant: {}\n\n", "Assistant:", " ", ("\n\n", "\n\nUser:")),
    Layout("lines", "{}\n", "{}\n\n", "", "", ("\n\n",)),
    Layout("lines without gaps", "{}\n", "{}\n", "", "", ("\n",)),
)


def turns(example: Example) -> Turns | None:
    """The last answer of an example and what stands before it; None where there is no answer to learn."""
    if isinstance(example, Chat):
        last = max((i for i, m in enumerate(example.messages) if m.role == "assistant"), default=0)
        return (
            Turns(example.messages[:last], example.messages[last].content, example.origin, example.tools)
            if last
            else None
        )
    if isinstance(example, Preference):
        return Turns(example.prompt, example.chosen[-1].content, example.origin, example.tools)
    if isinstance(example, Labelled) and example.label:
        return Turns(example.prompt, example.completion[-1].content, example.origin, example.tools)
    return None


def shared_system(examples: Sequence[Example]) -> str:
    """The system message that more than half of the examples begin with, or ''."""
    firsts = Counter(
        one.messages[0].content for one in map(turns, examples) if one and one.messages[0].role == "system"
    )
    text, count = firsts.most_common(1)[0] if firsts else ("", 0)
    return text if 2 * count > len(examples) else ""


def draw(examples: Sequence[Example], number: int, seed: int) -> tuple[list[Turns], list[Turns]]:
    """(number rows to show as examples, up to PROBES others to choose the layout by), of those without tools."""
    rows = [one for one in map(turns, examples) if one and one.answer.strip() and plain(one)]
    drawn = random.Random(f"shots/{seed}").sample(rows, min(len(rows), number + PROBES))
    return drawn[:number], drawn[number:]


def plain(one: Turns) -> bool:
    return not one.tools and all(m.role in PLAIN and not m.tool_calls for m in one.messages)


@dataclass(frozen=True)
class Prompt:
    """layout with what stands before the question. shared: a system message that is in the instruction already."""

    layout: Layout
    instruction: str = ""
    shots: tuple[Turns, ...] = ()
    shared: str = ""

    def text(self, renderer: Any, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """The whole prompt. Raises TuneletError where the chat template refuses it."""
        before = [
            message for one in self.shots for message in (*self._own(one.messages), Message("assistant", one.answer))
        ]
        told = [*before, *self._own(messages)]
        if self.layout is CHAT:
            system = [Message("system", self.instruction)] if self.instruction else []
            try:
                return renderer.string([*system, *told], tools, add_generation_prompt=True)
            except TuneletError:  # a template without system messages: the first question says it
                if not system or told[0].role != "user":
                    raise
                first = replace(told[0], content=f"{self.instruction}\n\n{told[0].content}")
                return renderer.string([first, *told[1:]], tools, add_generation_prompt=True)
        layouts = {"assistant": self.layout.assistant, "user": self.layout.user}
        head = f"{self.instruction}\n\n" if self.instruction else ""
        return head + "".join(layouts.get(m.role, "{}\n").format(m.content) for m in told) + self.layout.opening

    def _own(self, messages: Sequence[Message]) -> list[Message]:
        """Turns with their system message as the beginning of the question: in the middle of a conversation templates
        refuse it, and before all examples it would be said of these."""
        if messages[0].role != "system":
            return list(messages)
        system, *rest = messages
        said = "" if system.content == self.shared else system.content
        if not rest or not said:
            return rest
        if not self.shots and not self.instruction and self.layout is CHAT:
            return list(messages)
        return [replace(rest[0], content=f"{said}\n{rest[0].content}"), *rest[1:]]

    def ids(self, renderer: Any, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        text = self.text(renderer, messages, tools)
        if self.layout is CHAT:
            return renderer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return renderer.raw(text)


def fitting(prompt: Prompt, renderer: Any, room: int, one: Turns) -> tuple[list[int], int]:
    """(ids of the prompt with as many of its examples as leave it at most `room` tokens, how many these are).
    room 0: no limit. Without any example it may be longer than that."""
    number = len(prompt.shots)
    while True:
        ids = replace(prompt, shots=prompt.shots[:number]).ids(renderer, one.messages, one.tools)
        if not room or len(ids) <= room or not number:
            return ids, number
        number -= 1


def requests(prompt: Prompt, renderer: Any, rows: Sequence[Turns], max_length: int) -> list[Request]:
    """One for each row: its answer, without what ends it (layouts end answers differently), behind its prompt."""
    out = []
    for one in rows:
        text = prompt.layout.lead + one.answer
        answer = renderer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids, _ = fitting(prompt, renderer, max(1, max_length - len(answer)) if max_length else 0, one)
        whole = np.array([*ids, *answer], dtype=np.int32)
        if max_length and len(whole) > max_length + 1:  # from the left, as lm-eval does
            whole = whole[-(max_length + 1) :]
        out.append(Request(whole, min(len(answer), len(whole) - 1)))
    return out


def score(
    engine: Any, prompt: Prompt, rows: Sequence[Turns], progress: Callable[[int, int], None] | None = None
) -> list[Likelihood]:
    """The likelihood of each row's answer."""
    found = requests(prompt, engine.renderer, rows, engine.max_length)
    return likelihood.score(engine.model, found, progress=progress)


def nats(found: Sequence[Likelihood]) -> float:
    return -sum(one.logprob for one in found) / max(1, sum(one.tokens for one in found))


def choose(
    engine: Any, instruction: str, shared: str, shots: Sequence[Turns], probes: Sequence[Turns], *, chat: bool = False
) -> tuple[Prompt, dict[str, float]]:
    """(the prompt under which the probes' answers are most probable, nats per token of each that was tried).

    With examples, also without the instruction, which a base model may not understand. chat: the chat template only.
    Without probes the template is taken, where there is one.
    """
    tried: dict[str, tuple[Prompt, float]] = {}
    answers = [one.answer for one in (*shots, *probes)]
    for layout in (CHAT,) if chat else (CHAT, *TEXTS):
        ends = [end for end in layout.ends if not any(end in answer.strip() for answer in answers)]
        if layout is not CHAT and not ends:
            continue
        for told in dict.fromkeys((instruction, "") if shots else (instruction,)):
            prompt = Prompt(
                replace(layout, ends=(ends[0],)) if ends else CHAT, told, tuple(shots), shared if told else ""
            )
            name = layout.name + (", without the instruction" if instruction and not told else "")
            try:
                tried[name] = (prompt, nats(score(engine, prompt, probes)) if probes else 0.0)
            except TuneletError:  # no template, or one that refuses such a conversation
                continue
    if not tried:
        raise TuneletError("no way to ask the model was found", why="its chat template refuses the rows")
    best = min(tried, key=lambda name: tried[name][1])
    return tried[best][0], {name: round(value, 4) for name, (_, value) in tried.items()}


class Asker:
    """An engine that puts a prompt around what is asked and cuts answers where its layout ends them: evals/starter.py
    and evals/held_out.py take it as any other engine. fewer: how many questions had room for fewer examples."""

    def __init__(self, engine: Any, prompt: Prompt, max_new_tokens: int):
        self._engine, self._prompt, self._new = engine, prompt, max_new_tokens
        self.renderer, self.tokenizer, self.model = self, engine.tokenizer, engine.model
        self.max_length, self.fewer = engine.max_length, 0

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        asked = Turns(tuple(messages), "", Origin("", 0), tuple(tools))
        room = max(1, self.max_length - self._new) if self.max_length else 0
        ids, number = fitting(self._prompt, self._engine.renderer, room, asked)
        self.fewer += number < len(self._prompt.shots)
        return ids

    def generate(self, prompts: Sequence[Sequence[int]], *, batch_size: int = 64, **options: Any) -> list[Any]:
        """As the engine's; of long prompts fewer at a time: examples must not take memory that tuning needs not."""
        ends, longest = self._prompt.layout.ends, max(map(len, prompts), default=0)
        rows = max(1, min(batch_size, batch_size * USUAL // max(1, longest)))
        found = self._engine.generate(prompts, stop=ends, batch_size=rows, **options)
        return [replace(one, text=one.text.strip()) for one in found] if ends else found

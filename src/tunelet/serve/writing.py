"""What both routes that write text share: fields become engine requests, pieces become chunks, chunks become a whole.

Not for the fields' types (asked.py) nor for one route's own (chat.py, completions.py). A whole answer is put together
from the very chunks that a stream sends: there is no second way to come to one.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tunelet.infer.request import Request, mixed
from tunelet.infer.sampling import Sampling
from tunelet.serve import rules
from tunelet.serve.asked import Sampled
from tunelet.serve.models import Served
from tunelet.serve.refusal import Refusal, bad

SEEDS = 2**31 - 1
MOST = 2048  # answers that one request may ask for, whatever the queue takes: prompts that are only scored pass it by
FINISH = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


@dataclass
class Usage:
    prompt: int = 0
    completion: int = 0

    def as_dict(self) -> dict[str, int]:
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


class Route(Protocol):
    """An answer under way. begin: take places in the queue, or Refusal; choices: parts of choices as they come, as in a
    stream; join: add a part to the whole choice with its index; close: give up what is not done."""

    asked: Any
    served: Served
    usage: Usage
    kind: str
    chunk_kind: str
    prefix: str

    def begin(self) -> None: ...
    def choices(self) -> AsyncIterator[list[dict[str, Any]]]: ...
    def join(self, whole: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]: ...
    def close(self) -> None: ...


@dataclass
class Head:
    """What every chunk of an answer begins with."""

    route: Route
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        served = self.route.served
        return {
            "id": f"{self.route.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": served.name,
            "system_fingerprint": served.fingerprint,
            "choices": choices,
        }


async def whole(route: Route) -> dict[str, Any]:
    found: dict[int, dict[str, Any]] = {}
    async for parts in route.choices():
        for part in parts:
            found[part["index"]] = route.join(found.get(part["index"]), part)
    choices = [found[index] for index in sorted(found)]
    return Head(route).around(route.kind, choices) | {"usage": route.usage.as_dict()}


async def chunks(route: Route) -> AsyncIterator[dict[str, Any]]:
    options = route.asked.stream_options
    counted = bool(options and options.include_usage)
    head = Head(route)
    async for parts in route.choices():
        for part in parts:
            yield head.around(route.chunk_kind, [part]) | ({"usage": None} if counted else {})
    if counted:
        yield head.around(route.chunk_kind, []) | {"usage": route.usage.as_dict()}


def requests(
    asked: Sampled,
    served: Served,
    prompts: Sequence[Sequence[int]],
    most: int | None,
    *,
    logprobs: int | None,
    schema: dict[str, Any] | None = None,
    grammar: str = "",
) -> list[Request]:
    """`asked.n` requests of each prompt. most: tokens of an answer; None: as many as the model reads."""
    if asked.stream_options is not None and not asked.stream:
        raise bad("'stream_options' is for 'stream': true alone.", "stream_options")
    rules.check_grammar(asked.grammar)
    if len(prompts) * asked.n > max(served.desk.most, MOST):
        raise bad(f"{len(prompts)} prompts with {asked.n} answers each are too many.", "n")
    vocabulary, biases = len(served.tokenizer), asked.biases
    if any(id_ >= vocabulary for id_ in biases):
        raise bad(f"'logit_bias' names a token that is none: there are {vocabulary}.", "logit_bias")
    seed = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed % SEEDS
    out = []
    for prompt in prompts:
        room = check_length(served, prompt, most)
        for _ in range(asked.n):
            sampling = Sampling(
                asked.temperature,
                asked.top_p,
                asked.top_k,
                asked.repetition_penalty,
                mixed(seed, len(out)),
                asked.presence_penalty,
                asked.frequency_penalty,
            )
            out.append(
                Request(
                    prompt,
                    room,
                    sampling,
                    asked.stops,
                    logprobs=logprobs,
                    schema=schema,
                    grammar=grammar or asked.grammar,
                    adapter=served.adapter,
                    logit_bias=biases,
                )
            )
    return out


def check_length(served: Served, prompt: Sequence[int], most: int | None) -> int:
    """How many tokens the answer may have. Raises Refusal where prompt and answer are more than the model reads."""
    if not len(prompt):
        raise bad("The prompt is empty: a model needs at least one token to go on from.", "prompt")
    if max(prompt) >= len(served.tokenizer):
        raise bad(f"The prompt names a token that is none: there are {len(served.tokenizer)}.", "prompt")
    length = served.desk.engine.max_length
    asked = len(prompt) + (1 if most is None else most)
    if length and asked > length:
        raise Refusal(
            400,
            f"This model's maximum context length is {length} tokens. However, you requested {asked} tokens "
            f"({len(prompt)} in the prompt, {asked - len(prompt)} in the answer). Please reduce one of them.",
            param="messages" if most is None else "max_tokens",
            code="context_length_exceeded",
        )
    return most if most is not None else length - len(prompt)

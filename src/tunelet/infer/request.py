"""What every engine takes and gives: a request, the pieces of its answer, and the Protocol they share.

Not for templates: prompts are token ids, made by data/render.py for every engine alike. Not for the engines themselves
(engine.py, llama_cpp.py, continuous.py, remote.py).
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from tunelet.errors import TuneletError
from tunelet.infer.sampling import Sampling


@dataclass(frozen=True, slots=True)
class Completion:
    """What a prompt was answered. `finish`: "stop" (a stop token or a stop text came), "length" (max_new_tokens),
    "context" (the model reads no further). `text` ends before a stop text; `ids` are all that was written but a stop
    token; of a model behind an address they are not known, and `counted` is what it says of their number."""

    text: str
    ids: tuple[int, ...]
    finish: str
    counted: int | None = None

    @property
    def tokens(self) -> int:
        return len(self.ids) if self.counted is None else self.counted

    @property
    def stopped(self) -> bool:
        return self.finish == "stop"


@dataclass(frozen=True, slots=True)
class Request:
    """prompt: token ids. stop: strings that end the answer, which does not hold them. logprobs: how many of the
    likeliest tokens are told at each place beside the one taken; None: nothing is told. schema: a JSON schema that the
    answer has to be an instance of; grammar: one in GBNF. adapter: by its name in the engine; "": as it was loaded.
    logit_bias: token id -> what is added to its logit."""

    prompt: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    logprobs: int | None = None
    schema: Mapping[str, Any] | None = None
    grammar: str = ""
    adapter: str = ""
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: one token, and the text that is certain with it, whole characters ("" while some is held
    back). token None: text that was held back. logprob, top: natural logarithms of the model's own probabilities,
    before temperature and bias, where the request asked for them. finish: of the last piece, as in Completion, or
    "cancelled", or with `error` "error" (the engine's trouble) or "refused" (what was asked can't be done)."""

    token: int | None
    text: str
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    finish: str = ""
    error: str = ""


Emit = Callable[[Piece], None]


class Ticket(Protocol):
    """A request under way."""

    def cancel(self) -> None:
        """End it as soon as the next token is there; its slot is free then. Nothing happens where it has ended."""


class Engine(Protocol):
    """What answers requests: many at once, each piece told as it comes.

    name: torch, llama.cpp or an address. slots: how many requests it answers at the same time; more than that wait.
    max_length: tokens of prompt and answer together; 0: no limit known.
    """

    name: str
    tokenizer: Any
    renderer: Any
    slots: int

    @property
    def max_length(self) -> int: ...

    def submit(self, request: Request, emit: Emit) -> Ticket:
        """Begin a request. `emit` is called from a thread of the engine's, in order, the last time with a `finish`.

        Raises TuneletError at once for what this engine cannot do or read.
        """

    def close(self) -> None: ...


class Submitting:
    """`generate` and `stream`, as TorchEngine has them, for engines that have `submit`."""

    name = ""
    slots = 1

    def submit(self, request: Request, emit: Emit) -> Ticket:
        raise NotImplementedError

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        batch_size: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> list[Completion]:
        """One completion per prompt, in their order; see TorchEngine.generate. `batch_size`: most under way at once."""
        sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
        told: queue.SimpleQueue[tuple[int, Piece]] = queue.SimpleQueue()
        parts: list[list[Piece]] = [[] for _ in prompts]
        waiting = list(enumerate(prompts))[::-1]
        under_way: dict[int, Ticket] = {}

        def begin() -> None:
            index, prompt = waiting.pop()
            each = replace(sampling, seed=mixed(seed, index))
            request = Request(prompt, max_new_tokens, each, tuple(stop))
            under_way[index] = self.submit(request, lambda piece: told.put((index, piece)))

        finished = 0
        try:
            while waiting or under_way:
                while waiting and len(under_way) < max(1, min(batch_size, self.slots)):
                    begin()
                index, piece = told.get()
                parts[index].append(piece)
                if piece.finish:
                    del under_way[index]
                    finished += 1
                    _failed(piece, self.name)
                    if progress:
                        progress(finished)
        finally:
            for ticket in under_way.values():
                ticket.cancel()
        return [whole(pieces) for pieces in parts]

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str]:
        """The answer in pieces; the generator's return value is the Completion. See TorchEngine.stream."""
        sampling = Sampling(temperature, top_p, top_k, repetition_penalty, mixed(seed, 0))
        told: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        ticket = self.submit(Request(prompt, max_new_tokens, sampling, tuple(stop)), told.put)
        pieces: list[Piece] = []
        try:
            while not pieces or not pieces[-1].finish:
                pieces.append(told.get())
                _failed(pieces[-1], self.name)
                if pieces[-1].text:
                    yield pieces[-1].text
        finally:
            ticket.cancel()
        return whole(pieces)


def mixed(seed: int, index: int) -> int:
    """A seed of 31 bits for each prompt of a file, so that equal prompts get answers of their own."""
    return (seed * 1_000_003 + index * 7_919) % 2_147_483_647


def whole(pieces: Sequence[Piece]) -> Completion:
    ids = tuple(piece.token for piece in pieces if piece.token is not None)
    return Completion("".join(piece.text for piece in pieces), ids, pieces[-1].finish)


def _failed(piece: Piece, name: str) -> None:
    if piece.finish in ("error", "refused"):
        raise TuneletError(f"The {name} engine failed.", why=piece.error, fix="try it with --engine torch")


def check_prompt(prompt: Sequence[int], max_length: int, name: str) -> None:
    """Raises TuneletError for a prompt that is empty or longer than the model reads. name: how to call it."""
    if not len(prompt):
        raise TuneletError(
            f"{name} is empty.", why="a model needs at least one token to go on from", fix="Give it some text."
        )
    if max_length and len(prompt) >= max_length:
        raise TuneletError(
            f"{name} has {len(prompt)} tokens; this model reads at most {max_length}, its answer included.",
            why="past that length a model's positions were never trained, and it answers nonsense",
            fix=f"Shorten it to fewer than {max_length} tokens, or take a model with a longer context.",
        )

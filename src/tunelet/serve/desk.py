"""The queue before an engine: as many requests at work as it has slots, a limited number waiting, each of which can be
given up at any time. Not for HTTP (app.py) and not for what is asked.

Everything here happens in the event loop's thread; an engine's own threads only leave word (`call_soon_threadsafe`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

from tunelet.errors import TuneletError
from tunelet.infer.request import Engine, Piece, Request, Ticket
from tunelet.serve import refusal
from tunelet.serve.metrics import Metrics
from tunelet.serve.refusal import Refusal, bad

LONGEST_WAIT = 60  # seconds that a client is told to wait at most


class _Job:
    def __init__(self, request: Request, index: int, answers: Answers):
        self.request, self.index, self.answers = request, index, answers
        self.came = self.last = self.began = time.monotonic()
        self.ticket: Ticket | None = None
        self.given_up = False


class Answers:
    """The pieces of some requests, as (number of the request, piece), in the order they come; it ends when all have
    ended. `close` gives up what has not: with it a slot is free as soon as the engine has let go of it."""

    def __init__(self, desk: Desk, requests: Sequence[Request]):
        self._desk, self._told = desk, asyncio.Queue[tuple[int, Piece]]()
        self.jobs = [_Job(request, index, self) for index, request in enumerate(requests)]

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        left = len(self.jobs)
        while left:
            index, piece = await self._told.get()
            if piece.finish == "refused":
                raise bad(piece.error)
            if piece.finish == "cancelled" and not self.jobs[index].given_up:
                raise Refusal(503, "The server stops before this answer is done.", code="draining")
            if piece.finish == "error":
                raise Refusal(500, "The engine failed.", code="engine_failed")
            left -= bool(piece.finish)
            yield index, piece

    def close(self) -> None:
        for job in self.jobs:
            self._desk.give_up(job)


class Desk:
    """queue: how many may wait. Raises Refusal (429) for more."""

    def __init__(self, engine: Engine, queue: int, metrics: Metrics):
        self.engine, self.queue, self.metrics = engine, queue, metrics
        self.waiting: deque[_Job] = deque()
        self.working: set[_Job] = set()
        self._usual = 1.0  # seconds that an answer takes, the later ones counting more

    @property
    def most(self) -> int:
        """How many requests one may bring at once."""
        return self.engine.slots + self.queue

    def ask(self, requests: Sequence[Request]) -> Answers:
        if len(requests) > self.most:
            raise bad(f"These are {len(requests)} answers at once; this server takes {self.most}.", "n")
        if len(self.working) + len(self.waiting) + len(requests) > self.most:
            rounds = 1 + len(self.waiting) / self.engine.slots
            wait = min(LONGEST_WAIT, max(1, math.ceil(rounds * self._usual)))
            raise Refusal(
                429,
                f"All {self.engine.slots} slots are busy and {len(self.waiting)} requests wait. Try again in {wait} s.",
                code="queue_full",
                headers={"Retry-After": str(wait)},
            )
        answers = Answers(self, requests)
        self.waiting.extend(answers.jobs)
        self._next()
        return answers

    def give_up(self, job: _Job) -> None:
        job.given_up = True
        if job in self.working:
            if job.ticket is not None:
                job.ticket.cancel()
        elif job in self.waiting:
            self.waiting.remove(job)

    def stop(self) -> None:
        """End all that is under way or waits: their clients hear that the server stops."""
        waiting, self.waiting = self.waiting, deque()
        for job in waiting:
            self._take(job, Piece(None, "", finish="cancelled"))
        for job in self.working:
            if job.ticket is not None:
                job.ticket.cancel()

    def _next(self) -> None:
        loop = asyncio.get_running_loop()
        while self.waiting and len(self.working) < self.engine.slots:
            job = self.waiting.popleft()
            self.working.add(job)
            job.began = time.monotonic()
            try:
                job.ticket = self.engine.submit(job.request, lambda piece, job=job: self._leave(loop, job, piece))
            except TuneletError as error:  # what this engine cannot do (a grammar, say)
                piece = Piece(None, "", finish="refused", error=refusal.of(error).message)
                loop.call_soon(self._take, job, piece)

    def _leave(self, loop: asyncio.AbstractEventLoop, job: _Job, piece: Piece) -> None:
        """In a thread of the engine's."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended, and nobody waits
            loop.call_soon_threadsafe(self._take, job, piece)

    def _take(self, job: _Job, piece: Piece) -> None:
        now = time.monotonic()
        if piece.token is not None:
            first = job.last == job.came
            self.metrics.token(now - job.last, first)
            job.last = now
        job.answers._told.put_nowait((job.index, piece))
        if piece.finish:
            self.working.discard(job)
            if not job.given_up:
                self._usual += 0.2 * (now - job.began - self._usual)
            self._next()

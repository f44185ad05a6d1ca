"""The routes: an OpenAI-compatible API, health, metrics and a page to chat on. Pure ASGI: seven fixed addresses need no
framework.

Not for who may ask (guard.py), what fields mean (asked.py, chat.py, completions.py) or the process (server.py).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import struct
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any
from urllib.parse import unquote

from tunelet.serve import asked as fields
from tunelet.serve import body, metrics, page, writing
from tunelet.serve.chat import Chat
from tunelet.serve.completions import Completion
from tunelet.serve.guard import Call, Gone, Guard
from tunelet.serve.models import Models
from tunelet.serve.refusal import Refusal, bad


class App:
    """models: None until they are loaded. guard: the ASGI application."""

    def __init__(
        self,
        *,
        key: str = "",
        local: bool = True,
        max_body: int = 4 * 2**20,
        log_prompts: bool = False,
        grammars: bool = False,
    ):
        self.models: Models | None = None
        self.max_body, self.log_prompts, self.grammars = max_body, log_prompts, grammars
        self.metrics = metrics.Metrics()
        routes = {
            "/": {"GET": self.page},
            "/health": {"GET": self.health},
            "/metrics": {"GET": self.told_metrics},
            "/v1/models": {"GET": self.listed},
            "/v1/chat/completions": {"POST": self.chat},
            "/v1/completions": {"POST": self.completion},
            "/v1/embeddings": {"POST": self.embedding},
        }
        self.guard = Guard(routes, self.metrics, key=key.encode(), local=local)
        self.guard.not_now = "loading"

    def ready(self, models: Models) -> None:
        self.models, self.guard.not_now = models, ""

    def drain(self) -> None:
        """Take nothing new from now on."""
        self.guard.not_now = "draining"

    @property
    def served(self) -> Models:
        assert self.models is not None  # the guard lets nobody through before
        return self.models

    # -- what is small ------------------------------------------------------------------------------------------------

    async def page(self, call: Call) -> None:
        text, headers = page.render(call.scope["query_string"], call.headers.get(b"accept-language", b""))
        await call.answer(text, "text/html; charset=utf-8", headers=headers)

    async def health(self, call: Call) -> None:
        state = self.guard.not_now
        await call.json({"status": state or "ok"}, 503 if state else 200)

    async def told_metrics(self, call: Call) -> None:
        desks = self.models.desks if self.models else {}
        gauges = [
            ("queue_length", "Requests that wait.", {name: len(desk.waiting) for name, desk in desks.items()}),
            ("slots_busy", "Requests at work.", {name: len(desk.working) for name, desk in desks.items()}),
            ("slots", "Requests answered at once at most.", {name: desk.engine.slots for name, desk in desks.items()}),
        ]
        await call.answer(self.metrics.text(gauges).encode(), metrics.TYPE)

    async def listed(self, call: Call) -> None:
        name = unquote(call.scope["path"].removeprefix("/v1/models").removeprefix("/"))
        if name:
            await call.json(self.served.get(name).as_dict())
        else:
            data = [one.as_dict() for one in self.served.by_name.values()]
            await call.json({"object": "list", "data": data})

    # -- what computes ------------------------------------------------------------------------------------------------

    async def chat(self, call: Call) -> None:
        await self._write(call, fields.Chat, Chat)

    async def completion(self, call: Call) -> None:
        await self._write(call, fields.Completion, Completion)

    async def _write(self, call: Call, kind: Any, make: Callable[[Any, Any], writing.Route]) -> None:
        asked = fields.read(kind, await self._body(call))
        if asked.grammar and not self.grammars:
            raise bad("'grammar' is off here: the server was started without --allow-grammar.", "grammar")
        # rendering and tokenising a long conversation takes a while, and the others go on meanwhile
        route = await asyncio.to_thread(make, asked, self.served.get(asked.model))
        route.begin()
        try:
            await _unless_gone(call, _stream(call, route) if asked.stream else _whole(call, route))
        finally:
            route.close()
            self._count(call, route.usage)

    async def embedding(self, call: Call) -> None:
        asked = fields.read(fields.Embedding, await self._body(call))
        served = self.served.get(asked.model)
        texts = [served.renderer.raw(one) if isinstance(one, str) else one for one in asked.inputs]
        for text in texts:
            writing.check_length(served, text, 0)
        usage = writing.Usage(sum(map(len, texts)))

        async def embed() -> None:
            found = await served.scorer.embed(texts)
            data = [
                {"object": "embedding", "index": place, "embedding": _encoded(values, asked.encoding_format)}
                for place, values in enumerate(found)
            ]
            told = {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt}
            await call.json({"object": "list", "data": data, "model": served.name, "usage": told})

        try:
            await _unless_gone(call, embed())
        finally:
            self._count(call, usage)

    async def _body(self, call: Call) -> dict[str, Any]:
        found = await body.read(call.scope, call.receive, self.max_body)
        if self.log_prompts:
            print(json.dumps(found, ensure_ascii=False), file=sys.stderr, flush=True)
        return found

    def _count(self, call: Call, usage: writing.Usage) -> None:
        call.tokens = (usage.prompt, usage.completion)
        self.metrics.prompt_tokens += usage.prompt
        self.metrics.completion_tokens += usage.completion


async def _whole(call: Call, route: writing.Route) -> None:
    await call.json(await writing.whole(route))


async def _stream(call: Call, route: writing.Route) -> None:
    """Server-sent events. The first chunk is waited for, so that what is refused by then has a status of its own."""
    chunks = writing.chunks(route)
    first = await anext(chunks)
    await call.start(200, {"Content-Type": "text/event-stream; charset=utf-8", "X-Accel-Buffering": "no"})
    try:
        async for chunk in _after(first, chunks):
            await call.write(_event(chunk), more=True)
    except Refusal as error:
        await call.write(_event(error.body()), more=True)
    await call.write(b"data: [DONE]\n\n")


async def _after(first: dict[str, Any], rest: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    yield first
    async for one in rest:
        yield one


def _event(found: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _unless_gone(call: Call, work: Coroutine[Any, Any, None]) -> None:
    """Do the work; give it up as soon as the client closes the connection. Raises Gone then."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(call))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await working


async def _left(call: Call) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass


def _encoded(values: list[float], how: str) -> list[float] | str:
    if how == "float":
        return values
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()

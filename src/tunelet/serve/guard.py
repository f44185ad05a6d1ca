"""Before every request: is it for this server, may it ask, can it be taken now; after it: a line in the log, a count.

Not for what the routes do (app.py). On loopback the Host header must name this machine, and a request of a web page
must come from the page that this server gave (DNS rebinding, other sites in the user's browser). There is no CORS.
"""

from __future__ import annotations

import hmac
import json
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tunelet.serve.metrics import Metrics
from tunelet.serve.refusal import Refusal

LOOPBACK = frozenset(("127.0.0.1", "localhost", "::1"))
OPEN = ("/", "/health")  # no key: a page of no secrets, and what load balancers ask
GONE = 499  # the client went away: nginx' number for it, in log and metrics alone

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass
class Call:
    """A request and what becomes of it. route: the path where it is one of ours; tokens: of prompt and answer."""

    scope: Message
    receive: Receive
    send: Send
    route: str
    status: int = 0
    tokens: tuple[int, int] = (0, 0)
    headers: dict[bytes, bytes] = field(default_factory=dict)

    async def start(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        pairs = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **headers}
        raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in pairs.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": raw})

    async def write(self, data: bytes, more: bool = False) -> None:
        await self.send({"type": "http.response.body", "body": data, "more_body": more})

    async def answer(self, data: bytes, kind: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        await self.start(status, {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})})
        await self.write(data if self.scope["method"] != "HEAD" else b"")

    async def json(self, found: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(found, ensure_ascii=False, separators=(",", ":")).encode()
        await self.answer(data, "application/json", status, headers)


class Gone(Exception):
    """The client has closed the connection."""


Route = Callable[[Call], Awaitable[None]]


class Guard:
    """An ASGI application. routes: path -> method -> what answers. key: b"" where none is asked for. local: whether the
    server listens on loopback alone. busy: requests being answered, those for GET left out."""

    def __init__(self, routes: dict[str, dict[str, Route]], metrics: Metrics, *, key: bytes, local: bool):
        self.routes, self.metrics, self.key, self.local = routes, metrics, key, local
        self.busy = 0
        self.not_now = ""  # why nothing is answered: "loading", "draining"

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        began, path = time.monotonic(), scope["path"]
        route = path if path in self.routes else "/v1/models" if path.startswith("/v1/models/") else "other"
        call = Call(scope, receive, send, route)
        works = scope["method"] == "POST"
        self.busy += works
        try:
            await self._answer(call)
        except Gone:
            call.status = GONE
        except Refusal as error:
            await self._refuse(call, error)
        except Exception:
            _tell_bug()
            await self._refuse(call, Refusal(500, "The server failed. Its log says where.", code="internal_error"))
        finally:
            self.busy -= works
            self.metrics.requests[route, call.status or GONE] += 1
            ms = 1000 * (time.monotonic() - began)
            method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "OPTIONS") else "-"
            line = f"{method} {route} {call.status or GONE} {call.tokens[0]}+{call.tokens[1]} tokens {ms:.0f} ms"
            print(line, file=sys.stderr, flush=True)

    async def _answer(self, call: Call) -> None:
        call.headers = headers = dict(call.scope["headers"])
        host = headers.get(b"host", b"")
        if self.local and _name(host) not in LOOPBACK:
            raise Refusal(403, "This server is for its own machine alone: the Host header names another.")
        origin = headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != host:
            raise Refusal(403, "Asked for by a page of another site, which this server does not answer.")
        if self.key and call.route not in OPEN and not self._has_key(headers.get(b"authorization", b"")):
            raise Refusal(
                401,
                "No key, or a wrong one: send the header Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        methods = self.routes.get(call.route)
        if methods is None:
            raise Refusal(404, "There is nothing here. This server has: " + ", ".join(self.routes) + ".")
        method = call.scope["method"]
        method = "GET" if method == "HEAD" else method
        if method not in methods:
            allowed = ", ".join(methods)
            raise Refusal(405, f"This address takes {allowed}.", headers={"Allow": allowed})
        if self.not_now and call.route.startswith("/v1/"):
            raise Refusal(
                503,
                f"The server is {self.not_now}.",
                code=self.not_now,
                headers={"Connection": "close", "Retry-After": "2"},
            )
        await methods[method](call)

    def _has_key(self, given: bytes) -> bool:
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key)

    async def _refuse(self, call: Call, error: Refusal) -> None:
        if call.status:  # the answer has begun, so it can only end
            await call.write(b"")
        else:
            await call.json(error.body(), error.status, error.headers)


def _name(host: bytes) -> str:
    """The host without its port."""
    text = host.decode("latin-1")
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].lower()


def _tell_bug() -> None:
    """Where it happened, and of what kind. Not the message: it may hold what a user wrote."""
    kind, _, where = sys.exc_info()
    lines = "".join(traceback.format_tb(where))
    print(f"{lines}{kind.__name__ if kind else ''}", file=sys.stderr, flush=True)

"""The annotation page over HTTP: on this machine alone, and only for whoever has its address.

Not for what an action does (session.py). Every request must carry the random token in its path and name this machine as
its host: another site that the browser is led to can neither guess the one nor pass for the other (DNS rebinding).
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool

from tunelet.domain import words
from tunelet.domain.records import REASONS
from tunelet.domain.session import Refused, Session
from tunelet.errors import TuneletError

LOOPBACK = "127.0.0.1"
HOSTS = frozenset(("127.0.0.1", "localhost", "::1"))
ACTIONS = ("choose", "accept", "edit", "reject")
MOST = 64_000  # bytes of a request: the longest edit is far below
HERE = Path(__file__).parent


def make_app(session: Session, token: str) -> FastAPI:
    """The page below /TOKEN/. Answers 403 to another token or host, 404 to what is not there, 409 and 422 with
    {"error": code} to what does not go."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = jinja2.Environment(autoescape=True).from_string((HERE / "page.html.j2").read_text(encoding="utf-8"))
    css, js = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))

    @app.middleware("http")
    async def guard(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.url.path.split("/")[1]
        if _host(request.headers.get("host", "")) not in HOSTS or not secrets.compare_digest(
            given.encode(), token.encode()
        ):
            return PlainTextResponse("This address is not for you: open the one that tunelet printed.\n", 403)
        origin = request.headers.get("origin")
        if origin is not None and _host(origin.partition("://")[2]) not in HOSTS:
            return PlainTextResponse("Asked for by another site.\n", 403)
        reply = await go_on(request)
        reply.headers["Cache-Control"] = "no-store"
        reply.headers["Referrer-Policy"] = "no-referrer"
        reply.headers["X-Content-Type-Options"] = "nosniff"
        return reply

    @app.get("/{_}/")
    def index(request: Request) -> HTMLResponse:
        lang = words.language(request.query_params.get("lang", ""), request.headers.get("accept-language", ""))
        nonce = secrets.token_urlsafe(12)
        text = page.render(
            lang=lang,
            languages=words.LANGUAGES,
            words=words.WORDS[lang],
            title=session.title,
            annotator=session.annotator,
            pairs=session.pairs,
            reasons=REASONS,
            nonce=nonce,
            css=css,
            js=js,
        )
        allowed = f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
        allowed += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        return HTMLResponse(text, headers={"Content-Security-Policy": allowed})

    @app.get("/{_}/api/state")
    def state() -> dict[str, Any]:
        return session.state()

    @app.get("/{_}/api/item/{number}")
    def item(number: int) -> dict[str, Any]:
        return session.view(number)

    @app.post("/{_}/api/item/{number}/{kind}")
    async def act(request: Request, number: int, kind: str) -> Any:
        if kind not in ACTIONS:
            raise Refused("bad_action", status=404)
        body = await _body(request)
        return await run_in_threadpool(session.act, number, kind, body)

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"error": error.code, "detail": error.detail}, error.status)

    @app.exception_handler(TuneletError)
    def failed(request: Request, error: TuneletError) -> JSONResponse:
        return JSONResponse({"error": "failed", "detail": str(error)}, 500)

    return app


async def _body(request: Request) -> dict[str, Any]:
    """A JSON object. Other content types are refused: forms of other sites can send those, and not this one."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise Refused("bad_action", "not JSON", 415)
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST:
            raise Refused("bad_edit", f"more than {MOST} bytes", 413)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused("bad_action", "not JSON", 422) from error
    if not isinstance(found, dict):
        raise Refused("bad_action", "no object", 422)
    return found


def _host(given: str) -> str:
    """The host without its port."""
    if given.startswith("["):
        return given[1:].partition("]")[0]
    return given.partition("/")[0].rpartition(":")[0] or given.partition("/")[0]


@contextlib.contextmanager
def bound(port: int) -> Iterator[socket.socket]:
    """A socket on this machine's loopback; port 0: any free one. Raises TuneletError where the port is taken."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((LOOPBACK, port))
            sock.listen()  # a browser that is quicker than the server waits instead of being refused
        except (OSError, OverflowError) as error:
            raise TuneletError(
                f"--port {port}: can't be served on", why=str(error), fix="--port 0 takes a free one"
            ) from error
        yield sock


def serve(session: Session, sock: socket.socket, token: str) -> None:
    """Serve until Ctrl-C. No request is logged: their paths hold the token."""
    config = uvicorn.Config(
        make_app(session, token), log_level="warning", access_log=False, lifespan="off", server_header=False
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[sock])


def address(sock: socket.socket, token: str) -> str:
    return f"http://{LOOPBACK}:{sock.getsockname()[1]}/{token}/"

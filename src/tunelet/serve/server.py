"""The server's process: its socket, loading while it already says so, and its end. Not for requests (app.py).

The first SIGTERM or Ctrl-C: nothing new is taken, which new requests are told (503), what is under way is finished, and
the process ends with code 0. The second one ends it at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from tunelet.errors import TuneletError
from tunelet.serve.app import App
from tunelet.serve.models import Models

POLL = 0.02  # seconds between two looks whether all is answered
LAST = 2  # seconds for connections to close, once all is answered


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket; port 0: any free one. Raises TuneletError where it cannot be had."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, OverflowError, UnicodeError) as error:
        raise TuneletError(f"--host {host}: can't be served on", why=str(error), fix="--host 127.0.0.1") from error
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(1024)
        except (OSError, OverflowError) as error:
            raise TuneletError(
                f"--port {port}: can't be served on", why=str(error), fix="--port 0 takes a free one"
            ) from error
        yield sock


class Server(uvicorn.Server):
    """open_models: called in a thread of its own; what it raises ends the server, and is in `error`. timeout: seconds
    that a stop waits for what is under way. ready: called once everything is there."""

    def __init__(self, app: App, open_models: Callable[[], Models], ready: Callable[[], None], timeout: float):
        config = uvicorn.Config(
            app.guard,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=LAST,
        )
        super().__init__(config)
        self.app, self.open_models, self.told_ready, self.timeout = app, open_models, ready, timeout
        self.error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stops = 0
        self._stopping: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._load, name="loading", daemon=True).start()

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._stops += 1
        if self._stops > 1 or self._loop is None:
            sys.stderr.flush()
            os._exit(1)
        self._loop.call_soon_threadsafe(self._stop)

    def _load(self) -> None:
        try:
            models = self.open_models()
        except BaseException as error:  # whatever it was, it is raised where `run` was called
            self.error, models = error, None
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # stopped meanwhile
            self._loop.call_soon_threadsafe(self._loaded, models)

    def _loaded(self, models: Models | None) -> None:
        if models is None:
            self.should_exit = True
        elif not self._stops:
            self.app.ready(models)
            self.told_ready()

    def _stop(self) -> None:
        self.app.drain()
        self._stopping = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        latest = time.monotonic() + self.timeout
        while self.app.guard.busy and time.monotonic() < latest:
            await asyncio.sleep(POLL)
        if self.app.models is not None:
            for desk in self.app.models.desks.values():
                desk.stop()
        self.should_exit = True


def run(server: Server, sock: socket.socket) -> None:
    """Serve until a signal. Raises what loading raised."""
    server.run(sockets=[sock])
    if server.error is not None:
        raise server.error
    if server.app.models is None:  # stopped while it loaded: that thread cannot be stopped
        sys.stderr.flush()
        os._exit(0)
    server.app.models.close()

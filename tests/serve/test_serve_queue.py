"""The queue, clients that leave, and the end of the server: over real connections, with an engine moved by hand."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import threading
import time

import pytest
from serving import ScriptedEngine, app_of, ask, running, until

pytest.importorskip("uvicorn")
CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def engine(tiny_tokenizer):
    return ScriptedEngine(tiny_tokenizer, by_hand=True)


class Asking(threading.Thread):
    """A client that waits for its answer in a thread of its own."""

    def __init__(self, url, **fields):
        super().__init__(daemon=True)
        self.url, self.fields, self.told = url, fields, None
        self.start()

    def run(self):
        self.told = ask(f"{self.url}/v1/chat/completions", {**CHAT, **self.fields})

    def status(self):
        self.join(10)
        return self.told[0]


def open_stream(url, **fields):
    """A connection that has sent a request for a stream; close() is a client that is killed."""
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    body = json.dumps({**CHAT, "stream": True, **fields})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    return connection


def desk_of(app):
    return next(iter(app.models.desks.values()))


def test_more_than_slots_and_queue_is_refused(engine, loopback):
    app = app_of(engine, queue=3)
    with running(app) as (_, url, _):
        asking = [Asking(url) for _ in range(5)]
        desk = desk_of(app)
        until(lambda: len(desk.working) == 2 and len(desk.waiting) == 3)
        status, headers, text = ask(f"{url}/v1/chat/completions", CHAT)
        assert status == 429 and json.loads(text)["error"]["code"] == "queue_full"
        assert 1 <= int(headers["Retry-After"]) <= 60
        status, _, text = ask(f"{url}/v1/chat/completions", {**CHAT, "n": 5})
        assert status == 429
        metrics = ask(f"{url}/metrics")[2]
        assert 'tunelet_queue_length{model="m"} 3' in metrics and 'tunelet_slots_busy{model="m"} 2' in metrics
        assert ask(f"{url}/health")[0] == 200
        for number in range(5):
            until(lambda number=number: len(engine.asked) > number)
            assert len(engine.asked) <= 2 + number
            engine.asked[number].give(5)
            engine.asked[number].end()
        assert [one.status() for one in asking] == [200] * 5
        metrics = ask(f"{url}/metrics")[2]
        assert 'tunelet_queue_length{model="m"} 0' in metrics and 'tunelet_slots_busy{model="m"} 0' in metrics
        assert 'tunelet_requests_total{route="/v1/chat/completions",status="429"} 2' in metrics
        assert "tunelet_time_to_first_token_seconds_count 5" in metrics
        assert "tunelet_completion_tokens_total 5" in metrics


def test_pieces_are_sent_as_they_come(engine, loopback):
    with running(app_of(engine)) as (_, url, _):
        connection = open_stream(url)
        until(lambda: engine.asked)
        engine.asked[0].give(5)
        reply = connection.getresponse()
        assert b'"role":"assistant"' in reply.readline()
        engine.asked[0].end()
        assert reply.read().endswith(b"data: [DONE]\n\n")
        connection.close()


def test_a_client_that_leaves_frees_its_slot(engine, loopback):
    app = app_of(engine, queue=3)
    with running(app) as (_, url, _):
        connection = open_stream(url)
        until(lambda: engine.asked)
        engine.asked[0].give(5)
        connection.getresponse().readline()
        before = time.monotonic()
        connection.sock.shutdown(socket.SHUT_RDWR) if connection.sock else None
        connection.close()
        assert engine.asked[0].cancelled.wait(5) and time.monotonic() - before < 1
        until(lambda: not desk_of(app).working)
        until(lambda: app.metrics.requests["/v1/chat/completions", 499] == 1)


def test_who_leaves_while_waiting_or_reading_is_forgotten(engine, loopback):
    app = app_of(engine, queue=3)
    with running(app) as (_, url, _):
        desk = desk_of(app)
        first, second = Asking(url), Asking(url)
        until(lambda: len(desk.working) == 2)
        waiting = open_stream(url)
        until(lambda: len(desk.waiting) == 1)
        last = Asking(url)
        until(lambda: len(desk.waiting) == 2)
        waiting.close()
        until(lambda: len(desk.waiting) == 1, 1)
        for under in engine.asked[:2]:
            under.end()
        until(lambda: len(engine.asked) == 3)
        engine.asked[2].end()
        assert [one.status() for one in (first, second, last)] == [200] * 3
        whole = open_stream(url, stream=False)  # nothing is sent to it before the end
        until(lambda: len(engine.asked) == 4)
        whole.close()
        assert engine.asked[3].cancelled.wait(1)


def test_a_slot_is_busy_until_the_engine_has_let_go(engine, loopback):
    engine.stubborn = True
    app = app_of(engine, queue=0)
    with running(app) as (_, url, _):
        streams = [open_stream(url) for _ in range(2)]
        until(lambda: len(engine.asked) == 2)
        for stream in streams:
            stream.close()
        until(lambda: all(under.cancelled.is_set() for under in engine.asked), 1)
        assert ask(f"{url}/v1/chat/completions", CHAT)[0] == 429
        for under in engine.asked:
            under.end("cancelled")
        until(lambda: not desk_of(app).working)
        asking = Asking(url)
        until(lambda: len(engine.asked) == 3)
        engine.asked[2].end()
        assert asking.status() == 200


def test_a_stop_finishes_what_is_under_way(engine, loopback):
    app = app_of(engine, queue=3)
    with running(app) as (server, url, thread):
        asking = [Asking(url) for _ in range(3)]
        desk = desk_of(app)
        until(lambda: len(desk.waiting) == 1)
        server.handle_exit(signal.SIGTERM, None)
        until(lambda: app.guard.not_now == "draining")
        status, headers, _ = ask(f"{url}/v1/chat/completions", CHAT)
        assert status == 503 and headers["Connection"].lower() == "close"
        assert ask(f"{url}/health")[0] == 503
        for number in range(3):
            until(lambda number=number: len(engine.asked) > number)
            assert thread.is_alive()
            engine.asked[number].give(5)
            engine.asked[number].end()
        assert [one.status() for one in asking] == [200] * 3
        thread.join(5)
        assert not thread.is_alive() and engine.closed


def test_a_stop_does_not_wait_for_ever(engine, loopback):
    with running(app_of(engine, queue=3), timeout=0.3) as (server, url, thread):
        asking = [Asking(url) for _ in range(3)]
        until(lambda: len(engine.asked) == 2)
        server.handle_exit(signal.SIGTERM, None)
        assert [one.status() for one in asking] == [503] * 3
        thread.join(5)
        assert not thread.is_alive()


def test_nothing_is_answered_while_it_loads(engine, loopback):
    app = app_of(engine)
    app.guard.not_now = "loading"
    from serving import Client, refused

    client = Client(app)
    assert client.http.get("/health").status_code == 503 and client.http.get("/").status_code == 200
    refused(client.chat(), 503, code="loading")

"""What the server's tests share: an engine that answers what it is told to, when it is told to, and a server."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request

from tunelet.data.render import Renderer
from tunelet.infer.request import Piece
from tunelet.infer.text import TextStream
from tunelet.serve import server
from tunelet.serve.app import App
from tunelet.serve.desk import Desk
from tunelet.serve.models import Models, Served
from tunelet.serve.scoring import Scorer

# Shows tools and their calls as Hermes, Qwen and SmolLM do.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Under:
    """A request under way in the scripted engine."""

    def __init__(self, engine, request, emit):
        self.engine, self.request, self.emit = engine, request, emit
        self.text = TextStream(engine.tokenizer, request.stop)
        self.count, self.cancelled, self.ended = 0, threading.Event(), False

    def cancel(self):
        self.cancelled.set()
        if not self.ended and not self.engine.stubborn:
            self.end("cancelled")

    def give(self, token):
        """One token; True where the answer has ended."""
        self.count += 1
        asked = self.request.logprobs
        top = [(token, -0.5), (1, -1.5), (2, -2.5)][:asked] if asked is not None else ()
        self.emit(Piece(token, self.text.push(token), -0.5 if asked is not None else None, top))
        if self.text.stopped:
            self.end("stop")
        elif self.count >= self.request.max_new_tokens:
            self.end("length")
        return self.ended

    def end(self, finish="stop", error=""):
        if not self.ended:
            self.ended = True
            self.emit(Piece(None, self.text.finish(), finish=finish, error=error))


class ScriptedEngine:
    """answer: text for a request, or a function of it; by_hand: nothing comes until the test gives it."""

    name = "scripted"

    def __init__(self, tokenizer, answer="Hello there.", *, slots=2, length=512, by_hand=False, template=TOOLS):
        self.tokenizer, self.slots, self.max_length = tokenizer, slots, length
        self.renderer = Renderer(tokenizer, template)
        self.answer, self.by_hand, self.stubborn = answer, by_hand, False
        self.asked = []
        self.closed = False

    def submit(self, request, emit):
        under = Under(self, request, emit)
        self.asked.append(under)
        if not self.by_hand:
            threading.Thread(target=self._answer, args=(under,), daemon=True).start()
        return under

    def _answer(self, under):
        text = self.answer(under.request) if callable(self.answer) else self.answer
        for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            if under.give(token):
                return
        under.end()

    def close(self):
        self.closed = True


def app_of(engine, *, queue=8, names=("m",), model=None, **options):
    """An App that serves the engine under these names. model: what torch scores with."""
    app = App(**options)
    desk = Desk(engine, queue, app.metrics)

    def load():
        if model is None:
            raise AssertionError("nothing is scored here")
        return model

    app.ready(Models([Served(name, desk, engine.renderer, Scorer(load, queue)) for name in names]))
    return app


class Client:
    """A test client for an App without a server."""

    def __init__(self, app, **headers):
        from starlette.testclient import TestClient

        self.app = app
        self.http = TestClient(app.guard, base_url="http://127.0.0.1:8000", headers=headers)

    def chat(self, **fields):
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def complete(self, **fields):
        return self.http.post("/v1/completions", json={"model": "m", "prompt": "Turn on", **fields})

    def events(self, reply):
        """The chunks of a stream, which ends as it should."""
        parts = [part.removeprefix("data: ") for part in reply.text.split("\n\n") if part]
        assert parts[-1] == "[DONE]"
        return [json.loads(part) for part in parts[:-1]]


def refused(reply, status, *, param=None, code=None):
    """The message of an error that is OpenAI's."""
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert param is None or error["param"] == param, error
    assert code is None or error["code"] == code, error
    return error["message"]


@contextlib.contextmanager
def running(app, *, timeout=5.0):
    """The server in a thread of its own; gives (server, address, its thread)."""
    models = app.models
    with server.bound("127.0.0.1", 0) as sock:
        made = server.Server(app, lambda: models, lambda: None, timeout)
        thread = threading.Thread(target=server.run, args=(made, sock), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        until(lambda: made.started and not app.guard.not_now)
        try:
            yield made, url, thread
        finally:
            made.should_exit = made.force_exit = True
            thread.join(10)


def until(done, seconds=10.0):
    latest = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < latest, "it did not come to that"
        time.sleep(0.005)


def ask(url, body=None, headers=None, timeout=20):
    """(status, headers, text) of a request with urllib."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(asked, timeout=timeout) as reply:
            return reply.status, reply.headers, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()

"""The client of OpenAI-compatible servers: what it sends and to whom, whom it waits for, and every way to fail."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

import chat_server
import pytest

from tunelet.errors import TuneletError
from tunelet.infer import endpoint
from tunelet.infer.endpoint import Endpoint, Reply, Unanswered

USER = [{"role": "user", "content": "Which one?"}]


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    for name in endpoint.KEYS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(loopback):
    found = chat_server.ChatServer(loopback, lambda question, body: "Fine.")
    yield found
    found.close()


@pytest.fixture
def slept(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    return waits


def test_what_is_asked_is_what_is_sent(server):
    asked = Endpoint(server.url)
    assert asked.chat(USER) == Reply("Fine.", "stop", 3, None)
    path, body, key = server.asked[0]
    assert path == "/v1/chat/completions" and key is None
    assert body == {"model": "a-model", "messages": USER}, "what is not asked for is left to the server"
    asked.chat(USER, temperature=0.0, top_p=0.5, max_tokens=7, seed=0, stop=["\n"], top_logprobs=2)
    _, body, _ = server.asked[1]
    expected = {"temperature": 0.0, "top_p": 0.5, "max_tokens": 7, "seed": 0, "stop": ["\n"]}
    assert body == {"model": "a-model", "messages": USER, **expected, "logprobs": True, "top_logprobs": 2}
    assert Endpoint(server.url.partition("#")[0] + "/chat/completions").url == asked.url
    assert asked.name.endswith(" a-model") and endpoint.is_url(server.url) and not endpoint.is_url("runs/http://x")


def test_logprobs_are_passed_on(server):
    whole = {"choices": [{"message": {"content": "A"}, "logprobs": {"content": [1]}, "finish_reason": None}]}
    server.script = lambda question, body: (200, json.dumps(whole).encode())
    assert Endpoint(server.url).chat(USER, top_logprobs=1) == Reply("A", "", None, {"content": [1]})


def events(*chunks, end="data: [DONE]\n\n"):
    """A server's stream of these chunks, with the lines that a client has to pass over."""
    text = ": ping\n\n" + "".join(f"event: x\ndata: {json.dumps(chunk)}\n\n" for chunk in chunks) + end
    return 200, text.encode(), {"Content-Type": "text/event-stream; charset=utf-8"}


def delta(text, **more):
    return {"choices": [{"delta": {"content": text}, "finish_reason": None, **more}]}


def test_a_stream_is_heard_piece_by_piece(server):
    chunks = [
        {"choices": [{"delta": {"role": "assistant"}}]},
        delta("거실 "),
        delta("불"),
        delta(None, finish_reason="length"),
        {"choices": [], "usage": {"completion_tokens": 2}},
    ]
    server.script = lambda question, body: events(*chunks)
    heard: list[str] = []
    assert Endpoint(server.url).chat(USER, heard=heard.append) == Reply("거실 불", "length", 2)
    assert heard == ["거실 ", "불"] and server.asked[-1][1]["stream"] is True
    server.script = lambda question, body: "At once."  # a server that does not stream
    assert Endpoint(server.url).chat(USER, heard=heard.append).text == heard[-1] == "At once."


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (events(delta("A"), {"error": {"message": "out of memory"}}), "out of memory"),
        (events(end="data: {broken\n\n"), "not OpenAI-compatible"),
        (events([1]), "not OpenAI-compatible"),
        ((200, b"data: " + b"x" * 5_000_000, {"Content-Type": "text/event-stream"}), "longer than"),
    ],
)
def test_a_stream_that_breaks_is_no_answer(server, answer, told):
    server.script = lambda question, body: answer
    with pytest.raises(Unanswered, match=told):
        Endpoint(server.url).chat(USER, heard=lambda piece: None)


def test_a_busy_server_is_asked_again(server, slept):
    answers = iter([(429, "", {"Retry-After": "3"}), (503, ""), (429, "", {"Retry-After": "soon"}), "Here."])
    server.script = lambda question, body: next(answers)
    assert Endpoint(server.url).chat(USER).text == "Here."
    assert slept == [3.0, 2.0, 4.0], "what it says, else 1, 2, 4, ... seconds"
    answers = iter([(429, "", {"Retry-After": formatdate(time.time() + 20, usegmt=True)}), "Here."])
    assert Endpoint(server.url).chat(USER).text == "Here."
    assert 15 < slept[3] <= 20


def test_waiting_has_an_end(server, slept):
    server.script = lambda question, body: (503, "")
    with pytest.raises(Unanswered, match="answered 503"):
        Endpoint(server.url).chat(USER)
    assert len(server.asked) == 1 + endpoint.RETRIES and slept == [1.0, 2.0, 4.0, 8.0]
    server.script = lambda question, body: (429, "", {"Retry-After": "3600"})
    with pytest.raises(Unanswered, match="answered 429"):
        Endpoint(server.url).chat(USER)
    assert len(slept) == 4, "nobody waits for an hour"


def test_other_failures_are_not_repeated(server, slept):
    server.script = lambda question, body: (500, b'{"error": {"message": "out of memory"}}')
    with pytest.raises(Unanswered, match="answered 500: out of memory"):
        Endpoint(server.url).chat(USER)
    assert len(server.asked) == 1 and not slept


def test_what_the_server_says_of_its_refusal_is_passed_on(server):
    told = json.dumps({"error": {"message": "There is no model 'b'. Served are: a."}})
    server.script = lambda question, body: (404, told.encode())
    with pytest.raises(TuneletError) as refused:
        Endpoint(server.url).chat(USER)
    assert refused.value.why == "There is no model 'b'. Served are: a."


@pytest.mark.parametrize("status", [302, 307, 401, 403, 404])
def test_what_every_request_would_meet_ends_it(server, status):
    server.script = lambda question, body: (status, "", {"Location": server.url})
    with pytest.raises(TuneletError, match=f"answered {status}") as error:
        Endpoint(server.url).chat(USER)
    assert len(server.asked) == 1, "a redirect is not followed"
    assert "TUNELET_API_KEY" in error.value.fix
    with pytest.raises(TuneletError):
        Endpoint(server.url).check()


def test_a_check_minds_only_what_is_final(server, slept):
    for said in ((500, ""), (200, b"no JSON"), "Hello"):
        server.script = lambda question, body, said=said: said
        Endpoint(server.url).check()
    assert [body["max_tokens"] for _, body, _ in server.asked] == [1, 1, 1]


@pytest.mark.parametrize(
    "sent",
    [b"", b"[]", b"no JSON", b'{"choices": []}', b'{"choices": [{"text": "old"}]}', b'{"choices": [7]}', b"[" * 99999],
)
def test_what_is_no_answer(server, sent):
    server.script = lambda question, body: (200, sent)
    with pytest.raises(Unanswered, match="not OpenAI-compatible"):
        Endpoint(server.url).chat(USER)


def test_an_answer_without_text_and_one_without_end(server, monkeypatch):
    server.script = lambda question, body: None
    with pytest.raises(Unanswered, match="empty"):
        Endpoint(server.url).chat(USER)
    monkeypatch.setattr(endpoint, "MOST", 1000)
    server.script = lambda question, body: (200, b"x" * 2000, {"Content-Length": "99999"})
    with pytest.raises(Unanswered, match="longer than 1000 bytes"):  # what comes after is not read, nor waited for
        Endpoint(server.url).chat(USER)


def test_structured_output_where_the_server_knows_it(server):
    server.script = lambda question, body: "{}"
    asked = Endpoint(server.url)
    asked.chat(USER, schema={"type": "object"})
    assert server.asked[0][1]["response_format"]["json_schema"]["schema"] == {"type": "object"}
    server.script = lambda question, body: (400, "") if "response_format" in body else "{}"
    for _ in range(2):
        assert asked.chat(USER, schema={"type": "object"}).text == "{}"
    assert ["response_format" in body for _, body, _ in server.asked] == [True, True, False, False], "tried once"


def test_the_key_goes_where_it_is_safe_and_nowhere_else(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " k2\n")
    Endpoint(server.url).chat(USER)
    monkeypatch.setenv("TUNELET_API_KEY", "k1")
    Endpoint(server.url).chat(USER)
    assert [key for _, _, key in server.asked] == ["Bearer k2", "Bearer k1"]
    for url in ("http://example.org/v1", "http://127.0.0.1.example.org/v1", "http://192.168.0.7:8000/v1"):
        with pytest.raises(TuneletError, match="in the open") as error:
            Endpoint(url, flag="--judge")
        assert "k1" not in str(error.value) and "--judge" in str(error.value)
    assert Endpoint("https://example.org/v1#m").name == "example.org m"
    monkeypatch.setenv("TUNELET_API_KEY", "secret\nsecret")
    with pytest.raises(TuneletError) as error:
        Endpoint(server.url)
    assert "secret" not in str(error.value)


def test_no_proxy_between_this_machine_and_itself(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert Endpoint(server.url).chat(USER).text == "Fine."


@pytest.mark.parametrize("url", ["http:///v1", "http://", "http://[::1", "http://host:port/v1", "ftp://host/v1"])
def test_addresses_that_are_none(url):
    with pytest.raises(TuneletError, match="is no address"):
        Endpoint(url)


def test_a_password_in_an_address_is_not_shown():
    with pytest.raises(TuneletError, match="password in it") as error:
        Endpoint("https://me:secret@example.org/v1")
    assert "secret" not in str(error.value)


def test_a_server_that_is_not_there_and_one_that_goes(loopback):
    with pytest.raises(TuneletError, match="can't be reached") as error:
        Endpoint("http://127.0.0.1:9/v1", instead="write by rules").chat(USER)
    assert "write by rules" in error.value.fix
    gone = chat_server.ChatServer(loopback, lambda question, body: "Fine.")
    asked = Endpoint(gone.url)
    asked.chat(USER)
    gone.close()
    with pytest.raises(Unanswered, match="any more"):
        asked.chat(USER)


def test_several_at_once(server):
    server.script = lambda question, body: question
    asked = Endpoint(server.url)
    with ThreadPoolExecutor(8) as pool:
        got = pool.map(lambda n: asked.chat([{"role": "user", "content": str(n)}]).text, range(40))
    assert list(got) == [str(n) for n in range(40)]

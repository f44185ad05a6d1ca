"""Who may ask: host, origin, key; what the log says and does not say; pages and errors of addresses that are none."""

from __future__ import annotations

import re

import pytest
from serving import Client, ScriptedEngine, app_of, refused

from tunelet.serve import words

pytest.importorskip("uvicorn")


@pytest.fixture
def engine(tiny_tokenizer):
    return ScriptedEngine(tiny_tokenizer)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "[::2]:8000"])
def test_another_host_is_refused(engine, host):
    client = Client(app_of(engine), Host=host)
    for path in ("/", "/v1/models", "/health"):
        refused(client.http.get(path), 403)
    assert client.chat().status_code == 403 and not engine.asked


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "[::1]:8000", "127.0.0.1"])
def test_this_machine_may_ask(engine, host):
    assert Client(app_of(engine), Host=host).http.get("/v1/models").status_code == 200


def test_pages_of_other_sites_may_not_ask(engine):
    client = Client(app_of(engine))
    for origin in ("https://evil.example", "null", "http://127.0.0.1:3000", "http://127.0.0.1:8000.evil.example"):
        client.http.headers["Origin"] = origin
        refused(client.chat(), 403)
    client.http.headers["Origin"] = "http://127.0.0.1:8000"
    reply = client.chat()
    assert reply.status_code == 200 and not [name for name in reply.headers if name.startswith("access-control")]
    assert client.http.options("/v1/chat/completions").status_code == 405


def test_elsewhere_the_key_counts_and_not_the_host(engine):
    client = Client(app_of(engine, key="k3y", local=False), Host="box.example:8000")
    for given in ("", "Bearer", "Bearer x", "Bearer k3y2", "Basic k3y", "k3y", "Bearer k\xe9y"):
        client.http.headers = {**client.http.headers, "Authorization": given.encode("latin-1")}
        for path in ("/v1/models", "/metrics", "/nothing"):
            reply = client.http.get(path)
            refused(reply, 401, code="invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
        assert client.chat().status_code == 401
        assert client.http.get("/").status_code == client.http.get("/health").status_code == 200
    for given in ("Bearer k3y", "bearer  k3y"):
        client.http.headers["Authorization"] = given
        assert client.chat().status_code == 200
    assert len(engine.asked) == 2


def test_addresses_and_methods_that_are_none(engine):
    client = Client(app_of(engine))
    refused(client.http.get("/v1/nothing"), 404)
    refused(client.http.get("/../../etc/passwd"), 404)
    reply = client.http.get("/v1/chat/completions")
    refused(reply, 405)
    assert reply.headers["allow"] == "POST"
    refused(client.http.post("/health"), 405)
    assert client.http.head("/health").text == "" and client.http.head("/health").status_code == 200
    assert 'route="other",status="404"' in client.http.get("/metrics").text


def test_the_log_has_figures_and_no_words(engine, capsys):
    client = Client(app_of(engine))
    client.chat(messages=[{"role": "user", "content": "my secret"}])
    client.chat(temperature="my secret")
    client.http.get("/my secret?q=my secret")
    log = capsys.readouterr().err
    assert "secret" not in log and "Hello" not in log
    lines = log.splitlines()
    assert re.fullmatch(r"POST /v1/chat/completions 200 \d+\+\d+ tokens \d+ ms", lines[0])
    assert lines[1].startswith("POST /v1/chat/completions 400 0+0") and lines[2].startswith("GET other 404")
    client = Client(app_of(engine, log_prompts=True))
    client.chat(messages=[{"role": "user", "content": "비밀"}])
    assert "비밀" in capsys.readouterr().err


def test_a_bug_is_a_500_that_tells_nothing(engine, capsys):
    what = "my secret"

    def broken(request, emit):
        raise ZeroDivisionError(what)

    engine.submit = broken
    assert "secret" not in refused(Client(app_of(engine)).chat(), 500)
    log = capsys.readouterr().err
    assert "ZeroDivisionError" in log and "secret" not in log and "broken" in log


def test_the_page_brings_all_it_needs(engine):
    client = Client(app_of(engine))
    reply = client.http.get("/", headers={"Accept-Language": "ko-KR,en;q=0.5"})
    text = reply.text
    assert 'lang="ko"' in text and words.WORDS["ko"]["send"] in text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text) and "url(" not in text
    policy = reply.headers["content-security-policy"]
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
    assert text.count(f'nonce="{nonce}"') == 2 and "unsafe" not in policy and "default-src 'none'" in policy
    assert nonce not in client.http.get("/").text
    assert 'lang="en"' in client.http.get("/?lang=en", headers={"Accept-Language": "ko"}).text
    assert client.http.get("/?lang=%ff<script>").status_code == 200


def test_both_languages_say_the_same_things():
    english, korean = words.WORDS["en"], words.WORDS["ko"]
    assert english.keys() == korean.keys()
    for name in english:
        assert sorted(re.findall(r"\{\w+\}", english[name])) == sorted(re.findall(r"\{\w+\}", korean[name])), name

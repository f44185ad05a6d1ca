"""The annotation page's server: what an annotator may do, what stays hidden, and who is kept out."""

from __future__ import annotations

import socket

import pytest
from scripted import TOKEN, project

pytest.importorskip("fastapi")
testclient = pytest.importorskip("starlette.testclient")

from tunelet.domain import annotations, server, words  # noqa: E402
from tunelet.domain.session import Session, items_of  # noqa: E402
from tunelet.errors import TuneletError  # noqa: E402


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return project(tmp_path_factory.mktemp("server"))


class Person:
    """An annotator who works through the HTTP API."""

    def __init__(self, home, folder, name):
        self._stack = annotations.opened(folder, name)
        self.session = Session("home", items_of(home), self._stack.__enter__(), folder)
        app = server.make_app(self.session, TOKEN)
        self.client = testclient.TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=True)
        self.home = home

    def get(self, path):
        return self.client.get(f"/{TOKEN}/{path}")

    def post(self, number, kind, **body):
        return self.client.post(f"/{TOKEN}/api/item/{number}/{kind}", json=body)

    def key(self, number):
        """Where the key is shown to this annotator: a test may know."""
        item = self.session.items[number]
        return self.session.order(item).index(item.key)

    def close(self):
        self._stack.__exit__(None, None, None)


@pytest.fixture
def person(home, tmp_path):
    made = []

    def make(name):
        made.append(Person(home, tmp_path, name))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_blind_until_answered(person):
    mina = person("mina")
    shown = mina.get("api/item/0").json()
    item = mina.session.items[0]
    assert shown["key"] is None and shown["evidence"] == "" and shown["chosen"] is None and shown["status"] == "open"
    assert sorted(shown["choices"]) == sorted(item.choices)
    for kind in ("accept", "edit"):
        refused = mina.post(0, kind, question="x", choices=["a", "b", "c", "d"], answer=0)
        assert refused.status_code == 409 and refused.json()["error"] == "blind"
    found = mina.post(0, "choose", choice=mina.key(0), seconds=3.25)
    assert found.status_code == 200
    assert found.json()["key"] == mina.key(0) and found.json()["evidence"] == item.evidence
    assert found.json()["status"] == "accepted"
    again = mina.post(0, "choose", choice=(mina.key(0) + 1) % 4)
    assert again.status_code == 409 and again.json()["error"] == "answered"


def test_another_order_for_everyone_and_the_same_at_every_visit(person):
    mina, jun = person("mina"), person("jun")
    orders = [[p.get(f"api/item/{n}").json()["choices"] for n in range(30)] for p in (mina, mina, jun)]
    assert orders[0] == orders[1] != orders[2]
    assert sum(a != b for a, b in zip(orders[0], orders[2], strict=True)) > 20


def test_a_dispute_is_resolved(person):
    mina = person("mina")
    wrong = (mina.key(1) + 1) % 4
    assert mina.post(1, "choose", choice=wrong).json()["status"] == "disputed"
    assert mina.get("api/state").json()["done"] == 0
    found = mina.post(1, "accept").json()
    assert found["status"] == "accepted" and found["chosen"] == wrong
    assert mina.get("api/state").json()["done"] == 1


def test_an_edit_comes_back_in_the_order_shown(person):
    mina = person("mina")
    mina.post(2, "choose", choice=mina.key(2))
    shown = mina.get("api/item/2").json()
    better = {"question": " A better question? ", "choices": [f"{c}!" for c in shown["choices"]], "answer": 1}
    better["choices"] = ["one", "two", "three", "four"]
    found = mina.post(2, "edit", **better).json()
    assert found["status"] == "edited"
    assert found["edited"] == {"question": "A better question?", "choices": better["choices"], "answer": 1}
    content = mina.session._judged[mina.session.items[2].id].content
    order = mina.session.order(mina.session.items[2])
    assert [content.choices[place] for place in order] == better["choices"] and content.answer == order[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"question": "  "}, "question"),
        ({"choices": ["a", "a ", "b", "c"]}, "there twice"),
        ({"choices": ["a", "", "b", "c"]}, "is empty"),
        ({"choices": ["a", "b"]}, ""),
        ({"choices": ["a", "b", "c", 4]}, ""),
        ({"choices": "abcd"}, ""),
        ({"answer": 4}, ""),
        ({"answer": None}, ""),
        ({"answer": -1}, ""),
    ],
)
def test_edits_that_can_not_be(person, change, told):
    mina = person("mina")
    mina.post(0, "choose", choice=0)
    body = {"question": "Fine?", "choices": ["a", "b", "c", "d"], "answer": 0} | change
    refused = mina.post(0, "edit", **body)
    assert refused.status_code == 422 and refused.json()["error"] == "bad_edit"
    assert told.lower() in refused.json()["detail"].lower() or "string" in refused.json()["detail"].lower()
    assert mina.get("api/item/0").json()["status"] in ("accepted", "disputed")


def test_rejected_with_a_reason(person):
    mina = person("mina")
    assert mina.post(3, "reject", note="no reason").json()["error"] == "bad_reason"
    found = mina.post(3, "reject", reason="unclear", note=" 무슨 뜻? ").json()
    assert (found["status"], found["reason"], found["note"]) == ("rejected", "unclear", "무슨 뜻?")
    assert found["key"] is None  # rejected unanswered: the key stays hidden


def test_resumes_where_one_stopped(person, home, tmp_path):
    mina = person("mina")
    for number in range(4):
        mina.post(number, "choose", choice=mina.key(number))
    assert mina.get("api/state").json()["first"] == 4
    mina.close()
    again = Person(home, tmp_path, "mina")
    state = again.get("api/state").json()
    assert state["first"] == 4 and state["done"] == 4 and state["statuses"][:5] == ["accepted"] * 4 + ["open"]
    again.close()
    mina._stack = annotations.opened(tmp_path, "mina")
    mina._stack.__enter__()


def test_agreement_of_a_second_annotator(person):
    mina, jun = person("mina"), person("jun")
    for number in range(10):
        mina.post(number, "choose", choice=mina.key(number))
        jun.post(number, "choose", choice=(jun.key(number) + (number < 2)) % 4)
    found = mina.get("api/state").json()["agreement"]
    assert found["measure"] == "cohen_kappa" and found["items"] == 10
    assert found == jun.get("api/state").json()["agreement"]
    # By hand, from the numbers in the file's order.
    a = [mina.session._judged[item.id].choice for item in mina.session.items[:10]]
    b = [jun.session._judged[item.id].choice for item in jun.session.items[:10]]
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / 10
    expected = sum(a.count(label) * b.count(label) for label in range(4)) / 100
    assert observed == 0.8 and found["value"] == pytest.approx((observed - expected) / (1 - expected))
    assert "mina" not in str(jun.get("api/item/0").json())  # who chose what is not shown


# -- who is kept out


@pytest.mark.parametrize(
    "path", ["/", "/wrong/", "/wrong/api/state", f"/{TOKEN}x/", f"/{TOKEN[:-1]}/", "/api/state", "//", "/é/"]
)
def test_wrong_token(person, path):
    reply = person("mina").client.get(path)
    assert reply.status_code == 403 and "home" not in reply.text


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::2]:80"])
def test_another_host(person, host):
    reply = person("mina").client.get(f"/{TOKEN}/api/state", headers={"Host": host})
    assert reply.status_code == 403


def test_another_origin(person):
    mina = person("mina")
    path = f"/{TOKEN}/api/item/0/choose"
    assert mina.client.post(path, json={"choice": 0}, headers={"Origin": "http://evil.example"}).status_code == 403
    assert mina.client.post(path, json={"choice": 0}, headers={"Origin": "null"}).status_code == 403
    assert mina.client.post(path, json={"choice": 0}, headers={"Origin": "http://127.0.0.1:5"}).status_code == 200


@pytest.mark.parametrize(
    "path",
    ["api/item/../../../etc/passwd", "..%2f..%2fdomain.toml", "static/../project.py", "api/item/999", "api/item/-1"],
)
def test_nothing_else_is_served(person, path):
    reply = person("mina").get(path)
    assert reply.status_code in (403, 404, 422) and "root:" not in reply.text


def test_bodies_that_are_none(person):
    mina = person("mina")
    path = f"/{TOKEN}/api/item/0/choose"
    assert mina.client.post(path, data={"choice": "0"}).status_code == 415  # what another site's form can send
    json = {"Content-Type": "application/json"}
    for text in ("", "[]", "nonsense", "[" * 10_000):
        assert mina.client.post(path, content=text, headers=json).status_code == 422
    assert mina.client.post(path, content=" " * 70_000, headers=json).status_code == 413
    for choice in (None, "0", 4, -1, 1.5, True):
        assert mina.post(0, "choose", choice=choice).status_code == 422
    assert mina.post(0, "delete").status_code == 404
    assert mina.get("api/state").json()["done"] == 0
    assert not mina.session._log.path.exists()


def test_the_page_reaches_nothing_outside(person):
    reply = person("mina").get("")
    assert reply.status_code == 200
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert reply.headers["cache-control"] == "no-store" and reply.headers["referrer-policy"] == "no-referrer"
    assert "http://" not in reply.text and "https://" not in reply.text


def test_both_languages_say_the_same_things(person):
    english, korean = words.WORDS["en"], words.WORDS["ko"]
    assert list(english) == list(korean)
    import re

    for key, text in english.items():
        assert sorted(re.findall(r"{\w+}", text)) == sorted(re.findall(r"{\w+}", korean[key])), key
        assert korean[key].strip() and text.strip()
    mina = person("mina")
    assert '<html lang="ko">' in mina.get("?lang=ko").text
    assert '<html lang="en">' in mina.get("?lang=xx").text
    accepted = {"Accept-Language": "fr;q=1, ko-KR;q=0.9, en;q=0.8"}
    assert '<html lang="ko">' in mina.client.get(f"/{TOKEN}/", headers=accepted).text


def test_every_word_is_used():
    sources = "".join(
        (server.HERE / name).read_text() for name in ("page.html.j2", "page.js", "session.py", "server.py")
    )
    for key in words.WORDS["en"]:
        name = key.removeprefix("error_").removeprefix("status_").removeprefix("reason_")
        assert key in sources or f'"{name}"' in sources or key.startswith(("status_", "reason_")), key


def test_a_port_that_is_taken(loopback):
    with socket.socket() as taken:
        taken.bind((loopback, 0))
        taken.listen()
        with pytest.raises(TuneletError, match="can't be served on") as error, server.bound(taken.getsockname()[1]):
            pass
    assert "--port 0" in error.value.fix


def test_only_loopback(loopback):
    with server.bound(0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"
        assert server.address(sock, "t") == f"http://127.0.0.1:{sock.getsockname()[1]}/t/"

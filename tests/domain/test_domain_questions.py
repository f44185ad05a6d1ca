"""Chunks -> questions: by rules, by a script, by writers that fail in every way; and that all are accounted for."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer

import manuals
import pytest
from scripted import Scripted, good

from tunelet.domain import chunks, questions, writers
from tunelet.domain.cloze import Cloze
from tunelet.domain.questions import BLANK, HOPELESS, RETRIES, Unwritten
from tunelet.domain.text import korean, near_equal, stands_in
from tunelet.errors import TuneletError


@pytest.fixture
def read(tmp_path):
    return chunks.read(manuals.write(tmp_path))


def whole(account, kept):
    """asked = kept + dropped, always."""
    assert account.asked == account.kept + sum(account.dropped.values())
    assert account.kept == len(kept)


def test_cloze_makes_thirty(read):
    kept, account = questions.write(read.chunks, Cloze(read.chunks), 30)
    whole(account, kept)
    assert len(kept) == 30
    by_id = {chunk.id: chunk for chunk in read.chunks}
    for question in kept:
        passage = by_id[question.chunk].text
        answer = question.choices[question.answer]
        assert len(set(question.choices)) == 4 and BLANK in question.question
        assert question.evidence in passage and stands_in(answer, question.evidence)
        blanked = question.question.split("“")[1]
        assert not any(stands_in(choice, blanked) for choice in question.choices)
    assert len({by_id[question.chunk].document for question in kept}) == 5
    assert 8 <= sum(korean(question.question) for question in kept) <= 20
    assert max(Counter(question.answer for question in kept).values()) < 18  # the key has no favourite place
    assert not any(
        near_equal(a.question, b.question, questions.ALIKE) for n, a in enumerate(kept) for b in kept[n + 1 :]
    )


def test_the_seed_decides(read):
    first, again, other = (questions.write(read.chunks, Cloze(read.chunks), 20, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_no_korean_particle_tells_the_answer(read):
    kept, _ = questions.write(read.chunks, Cloze(read.chunks), 60)
    after = [question.question.split(BLANK)[1] for question in kept]
    assert sum(text.startswith(("은(는)", "이(가)", "을(를)")) for text in after) > 5
    assert not any(re.match("(은|는|이|가|을|를)[ ,]", text) for text in after)


def test_more_than_there_is(read):
    kept, account = questions.write(read.chunks, Cloze(read.chunks), 500)
    whole(account, kept)
    assert 30 < len(kept) < 500
    assert account.dropped["the writer had no more"] > 0


def test_scripted_makes_thirty(read):
    writer = Scripted(good)
    kept, account = questions.write(read.chunks, writer, 30)
    whole(account, kept)
    assert len(kept) == 30 and account.retries == 0
    assert all(question.writer == "scripted" for question in kept)
    assert "Passage (" in writer.prompts[0].text and writer.prompts[0].chunk.text in writer.prompts[0].text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": "a pink elephant", "evidence": "Elephants are pink."}, "the passage does not support the answer"),
        ({"distractors": ["Cotton", "cotton.", "COTTON", "wool"]}, "too few distractors that differ"),
        ({"distractors": []}, "a field is missing or of another type"),
        ({"answer": 4}, "a field is missing or of another type"),
        ({"question": " "}, "question or answer is empty"),
        ({"question": "Is it Cotton?"}, "the question gives the answer away"),
    ],
)
def test_what_does_not_hold_is_dropped(read, change, reason):
    chunk = next(chunk for chunk in read.chunks if "programme Cotton" in chunk.text)
    base = {
        "question": "Which programme is run first?",
        "answer": "Cotton",
        "distractors": ["Wool", "Silk", "Quick"],
        "evidence": "Run the programme Cotton at 60 degrees",
    }
    kept, account = questions.write([chunk], Scripted(lambda prompt: {"questions": [base]}), 1)
    assert len(kept) == 1 and kept[0].evidence == "Run the programme Cotton at 60 degrees"
    kept, account = questions.write([chunk], Scripted(lambda prompt: {"questions": [base | change]}), 1)
    whole(account, kept)
    assert not kept and account.dropped == {reason: 1}


def test_a_quotation_supports_an_answer_in_other_words(read):
    chunk = next(chunk for chunk in read.chunks if "programme Cotton" in chunk.text)
    draft = {
        "question": "How hot is the first wash?",
        "answer": "sixty degrees",
        "distractors": ["thirty degrees", "forty degrees", "ninety degrees"],
        "evidence": "run the PROGRAMME  Cotton at 60 degrees",
    }
    [question], _ = questions.write([chunk], Scripted(lambda prompt: {"questions": [draft]}), 1)
    assert question.evidence == "Run the programme Cotton at 60 degrees"  # as it stands in the passage


def test_the_same_question_again_is_dropped(read):
    found = good(questions.Prompt("", read.chunks[0], 1, 0))["questions"][0]
    same = {"questions": [found, found | {"question": found["question"].upper()}]}
    kept, account = questions.write(read.chunks[:1], Scripted(lambda prompt: same), 2)
    whole(account, kept)
    assert len(kept) == 1 and account.dropped["asked already"] >= 1


@pytest.mark.parametrize(
    "garbage",
    [
        {},
        {"exam": []},
        {"questions": "none"},
        {"questions": ["text", 5, None]},
        Unwritten("no JSON object in the answer"),
        None,
        [],
        "words",
    ],
    ids=str,
)
def test_garbage_never_becomes_a_question(read, garbage):
    writer = Scripted(lambda prompt: garbage)
    kept, account = questions.write(read.chunks, writer, 14)
    whole(account, kept)
    assert not kept
    if isinstance(garbage, dict) and isinstance(garbage.get("questions"), list):
        assert account.asked == account.calls == 14
    else:
        assert account.asked == len(account.failures) == HOPELESS  # a large folder is not gone through for nothing
        assert account.calls == HOPELESS * (1 + RETRIES)
        assert account.failures[0]["reason"] and account.failures[0]["chunk"] == writer.prompts[0].chunk.id
        assert "could not be used" in writer.prompts[1].text


def test_a_retry_counts_and_may_succeed(read):
    tries = iter([Unwritten("the answer is empty"), None])

    def script(prompt):
        return next(tries, None) or good(prompt)

    kept, account = questions.write(read.chunks[:1], Scripted(script), 1)
    whole(account, kept)
    assert len(kept) == 1 and account.calls == 2 and account.retries == 1
    kept, account = questions.write(read.chunks[:1], Scripted(lambda p: {"questions": good(p)["questions"] * 9}), 1)
    assert account.unasked == 8 and len(kept) == 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ('{"questions": [{"question": "a"}]}', 1),
        ('Sure!\n```json\n[{"question": "a"}, {"question": "b"}]\n```', 2),
        ('<think>{"questions": []}</think>{"question": "a"}', 1),
        ('{broken {"questions": []}', 0),
    ],
)
def test_parsed(text, number):
    assert len(writers.parsed(text)["questions"]) == number


@pytest.mark.parametrize("text", ["", "no JSON at all", "{'single': 1}", "[1, 2]", "{" * 5000])
def test_parsed_is_never_guessed(text):
    with pytest.raises(Unwritten):
        writers.parsed(text)


def test_a_local_model_writes_nothing_usable_and_that_is_said(read, tiny_model, tiny_tokenizer):
    from tunelet.data.render import Renderer
    from tunelet.infer.engine import TorchEngine

    engine = TorchEngine(tiny_model, tiny_tokenizer, Renderer(tiny_tokenizer))
    writer = writers.EngineWriter(engine, "tiny", max_new_tokens=8)
    kept, account = questions.write(read.chunks[:2], writer, 2)
    whole(account, kept)
    assert not kept and account.dropped == {"the writer gave nothing": 2}


@pytest.fixture
def endpoint(loopback):
    """An OpenAI-compatible server that does as its `script` says: (status, what the model answers)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append((self.path, body, self.headers.get("Authorization")))
            status, text = self.server.script(body)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": text}}]}).encode())

        def log_message(self, *given):
            pass

    server = HTTPServer((loopback, 0), Handler)
    server.asked, server.script = [], lambda body: (200, "{}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_an_endpoint_writes(read, endpoint, monkeypatch):
    monkeypatch.setenv("TUNELET_API_KEY", "k")
    chunk = read.chunks[0]
    answer = json.dumps(good(questions.Prompt("", chunk, 1, 0)))
    # A server that knows no response_format: asked once more without.
    endpoint.script = lambda body: (400, "") if "response_format" in body else (200, f"Here it is: {answer}")
    url = f"http://127.0.0.1:{endpoint.server_port}/v1#my-model"
    kept, account = questions.write([chunk], writers.UrlWriter(url), 1)
    whole(account, kept)
    assert len(kept) == 1 and kept[0].writer.endswith("my-model")
    path, body, key = endpoint.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "my-model" and key == "Bearer k"
    endpoint.script = lambda body: (500, "")
    kept, account = questions.write([chunk], writers.UrlWriter(url), 1)
    assert not kept and account.failures[0]["detail"] == "the endpoint answered 500"
    for status in (302, 401, 404):
        endpoint.script = lambda body, status=status: (status, "")
        with pytest.raises(TuneletError, match=f"answered {status}"):
            questions.write([chunk], writers.UrlWriter(url), 1)


def test_an_endpoint_that_is_not_there(read, loopback, monkeypatch):
    with pytest.raises(TuneletError, match="can't be reached"):
        questions.write(read.chunks[:1], writers.UrlWriter("http://127.0.0.1:9/v1"), 1)
    for url, told in (("http:///v1", "is no address"), ("https://me:secret@example.org/v1", "password in it")):
        with pytest.raises(TuneletError, match=told) as error:
            writers.UrlWriter(url)
        assert "secret" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with pytest.raises(TuneletError, match="in the open"):
        writers.UrlWriter("http://example.org/v1")

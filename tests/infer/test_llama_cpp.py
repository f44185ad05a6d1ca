"""The llama.cpp engine on the shipped model: torch's own answers, cancelled in time, refused clearly."""

from __future__ import annotations

import queue
import threading

import pytest

pytest.importorskip("xllamacpp")
pytest.importorskip("gguf")

from tests.infer.test_continuous import answer, collect
from tunelet.data import formats
from tunelet.data.examples import Message
from tunelet.data.render import Renderer
from tunelet.data.tokenizer import load_tokenizer
from tunelet.errors import TuneletError
from tunelet.infer import gguf_file
from tunelet.infer.engine import TorchEngine
from tunelet.infer.llama_cpp import LlamaCppEngine
from tunelet.infer.request import Request
from tunelet.infer.sampling import Sampling
from tunelet.models import load


@pytest.fixture(scope="module")
def folder():
    return load.resolve("starter")


@pytest.fixture(scope="module")
def file(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("gguf") / "starter.gguf"
    gguf_file.write(folder, out, "f32")
    return out


@pytest.fixture(scope="module")
def engine(folder, file):
    tokenizer = load_tokenizer(folder)
    made = LlamaCppEngine(file, tokenizer, Renderer(tokenizer), slots=4, context=256, threads=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def asked(engine):
    chats = formats.load(["starter"], want="chat", split="test", limit=12).examples
    return [engine.renderer.prompt(chat.messages[:-1]) for chat in chats]


def test_greedy_answers_are_torchs(engine, folder, asked):
    from tunelet.models.device import Choice

    choice = Choice("cpu", "float32", "a test", 1)
    alone = TorchEngine(load.load_model(folder, choice), engine.tokenizer, engine.renderer)
    wanted = alone.generate(asked, max_new_tokens=24)
    got = engine.generate(asked, max_new_tokens=24)
    assert [(one.text, one.ids, one.finish) for one in got] == [(one.text, one.ids, one.finish) for one in wanted]


def test_streamed_pieces_are_the_answer(engine, asked):
    pieces = engine.stream(asked[0], max_new_tokens=24)
    assert "".join(pieces) == engine.generate(asked[:1], max_new_tokens=24)[0].text


def test_a_seed_repeats_and_another_differs(engine, asked):
    warm = {"max_new_tokens": 24, "temperature": 1.5}
    first, again, other = (engine.generate(asked[:3], seed=seed, **warm) for seed in (7, 7, 8))
    assert first == again != other


def test_a_cancelled_request_frees_its_slot(engine, asked):
    """Five of 200 tokens for four slots, each ended at its first piece."""
    told = [queue.Queue() for _ in range(5)]
    begun = threading.Event()
    tickets = {}

    def heard(number, piece):
        begun.wait(20)
        tickets[number].cancel()
        told[number].put(piece)

    for number in range(5):
        tickets[number] = engine.submit(Request(asked[0], 200), lambda piece, number=number: heard(number, piece))
    begun.set()
    for one in told:
        pieces = collect(one, 20)
        assert pieces[-1].finish == "cancelled" and len(pieces) <= 3
    assert answer(engine, Request(asked[0], 2))[-1].finish == "length"


def test_logprobs_bias_and_schema(engine, asked):
    [first, *_, last] = answer(engine, Request(asked[0], 3, logprobs=2))
    assert last.finish == "length" and len(first.top) == 2 and first.logprob == first.top[0][1]
    forced = answer(engine, Request(asked[0], 3, logit_bias={66: 1000.0}, logprobs=1))
    assert [piece.token for piece in forced[:-1]] == [66] * 3
    assert forced[0].logprob < first.logprob  # the model's own probability, not the biased one
    schema = {"type": "string", "enum": ["on", "off"]}
    text = "".join(piece.text for piece in answer(engine, Request(asked[0], 30, schema=schema)))
    assert text in ('"on"', '"off"')
    grammar = 'root ::= "kitchen" | "study"'
    text = "".join(piece.text for piece in answer(engine, Request(asked[0], 30, grammar=grammar)))
    assert text in ("kitchen", "study")


def test_stop_texts_end_an_answer_before_them(engine, asked):
    plain = engine.generate(asked[:1], max_new_tokens=30)[0].text
    stop = plain[8:11]
    cut = engine.generate(asked[:1], max_new_tokens=30, stop=[stop])[0]
    assert cut.text == plain[: plain.find(stop)] and cut.finish == "stop"


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty"])
def test_penalties_reach_the_sampler(engine, asked, penalty):
    def taken(**settings):
        return [engine_answer(engine, prompt, Sampling(**settings)) for prompt in asked[:4]]

    assert taken(**{penalty: 2.0}) != taken() == taken(**{penalty: 0.0})


def engine_answer(engine, prompt, sampling):
    return [piece.token for piece in answer(engine, Request(prompt, 30, sampling))]


def test_what_it_cannot_do_is_refused(engine, asked, tmp_path):
    for request, told in (
        (Request([], 3), "empty"),
        (Request([5] * 256, 3), "at most 256"),
    ):
        with pytest.raises(TuneletError, match=told):
            engine.submit(request, print)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(TuneletError, match="does not load"):
        LlamaCppEngine(broken, engine.tokenizer, engine.renderer, context=64)


def test_its_own_port_needs_a_key(engine, loopback):
    import urllib.error
    import urllib.request

    assert engine.ask("/tokenize", {"content": "hello"})["tokens"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(engine._server.listening_address + "/v1/models-x", timeout=10)
    assert refused.value.code in (401, 404)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(
            urllib.request.Request(engine._server.listening_address + "/tokenize", b"{}"), timeout=10
        )
    assert refused.value.code == 401


def test_closing_waits_for_those_under_way(folder, file):
    tokenizer = load_tokenizer(folder)
    engine = LlamaCppEngine(file, tokenizer, Renderer(tokenizer), context=256, threads=1)
    told: queue.Queue = queue.Queue()
    engine.submit(Request(engine.renderer.prompt([Message("user", "hello")]), 200), told.put)
    told.get(timeout=20)
    engine.close()
    assert collect(told, 5)[-1].finish == "cancelled"
    assert not any(thread.name == "llama.cpp request" for thread in threading.enumerate())

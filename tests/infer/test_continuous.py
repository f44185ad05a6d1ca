"""The continuous engine answers each request as it would be answered alone, whoever comes and goes beside it."""

from __future__ import annotations

import queue
import random
import threading

import pytest
import torch

from tests.infer.test_engine import VOCABULARY, Letters, prompts, tiny
from tunelet.errors import TuneletError
from tunelet.infer.continuous import ContinuousEngine
from tunelet.infer.engine import TorchEngine
from tunelet.infer.request import Request
from tunelet.infer.sampling import Sampling


def collect(told: queue.Queue, seconds: float = 30):
    pieces = []
    while not pieces or not pieces[-1].finish:
        pieces.append(told.get(timeout=seconds))
    return pieces


def answer(engine, request: Request):
    told: queue.Queue = queue.Queue()
    engine.submit(request, told.put)
    return collect(told)


@pytest.fixture
def made():
    """Engines that are closed when the test ends."""
    engines = []

    def make(model, **settings):
        engines.append(ContinuousEngine(model, Letters(), **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_each_row_is_answered_as_it_would_be_alone(made, kind, slots):
    model = tiny(kind)
    asked = prompts(12, low=1, high=40)
    alone = TorchEngine(model, Letters())
    wanted = [alone.generate([prompt], max_new_tokens=20)[0] for prompt in asked]
    got = made(model, slots=slots).generate(asked, max_new_tokens=20)
    assert [(one.ids, one.finish, one.text) for one in got] == [(one.ids, one.finish, one.text) for one in wanted]


def test_rows_that_come_and_go_at_random_do_not_mix(made):
    model = tiny(max_position_embeddings=300)
    engine, alone = made(model, slots=4), TorchEngine(model, Letters())
    rng = random.Random(3)
    begun = []
    for number in range(40):
        prompt = [rng.randrange(3, VOCABULARY) for _ in range(rng.choice((1, 5, 60, 130)))]
        told: queue.Queue = queue.Queue()
        ticket = engine.submit(Request(prompt, rng.choice((1, 7, 90))), told.put)
        begun.append((prompt, told, ticket))
        if number % 5 == 4:
            threading.Event().wait(0.02)
            begun[rng.randrange(len(begun))][2].cancel()
    seen = set()
    for prompt, told, _ in begun:
        pieces = collect(told)
        seen.add(pieces[-1].finish)
        ids = tuple(piece.token for piece in pieces if piece.token is not None)
        [wanted] = alone.generate([prompt], max_new_tokens=90)
        assert ids == wanted.ids[: len(ids)]
        if pieces[-1].finish == "stop":
            assert ids == wanted.ids
    assert "length" in seen
    assert not engine._rows and engine._slots.rows == 0


def test_what_prompts_share_is_read_once(made):
    model = tiny(max_position_embeddings=400)
    engine = made(model, slots=4)
    read = []
    forward = engine._forward

    def counted(ids, seen, positions, cache):
        read.append(ids.shape[0] * ids.shape[1])
        return forward(ids, seen, positions, cache)

    engine._forward = counted
    rng = random.Random(0)
    common = [rng.randrange(3, VOCABULARY) for _ in range(300)]
    asked = [[*common, *(rng.randrange(3, VOCABULARY) for _ in range(4))] for _ in range(6)]
    alone = TorchEngine(model, Letters())
    wanted = [one.ids for one in alone.generate(asked, max_new_tokens=3)]
    assert [one.ids for one in engine.generate(asked, max_new_tokens=3)] == wanted
    assert sum(read) < 304 + 6 * (4 + 4) + 40
    read.clear()
    assert [one.ids for one in engine.generate(asked, max_new_tokens=3)] == wanted  # from what ended before
    assert sum(read) < 100


def test_prefixes_are_kept_within_their_memory(made):
    model = tiny(max_position_embeddings=400)
    engine = made(model, slots=2, prefix_mb=0.5)
    engine.generate(prompts(30, low=100, high=200), max_new_tokens=3)
    held = sum(x.numel() * x.element_size() for of in engine._prefixes.kept.values() for pair in of for x in pair)
    assert 0 < held <= 0.5e6


def test_long_answers_outlast_the_room_there_was_at_first(made):
    """More steps than columns: the rows are moved, and say what they would have said."""
    model = tiny(max_position_embeddings=700, eos_token_id=None)
    asked = prompts(6, low=3, high=30)
    alone = TorchEngine(model, Letters(), stop_ids=[VOCABULARY])
    wanted = [one.ids for one in alone.generate(asked, max_new_tokens=600)]
    engine = made(model, slots=2, stop_ids=[VOCABULARY])
    assert [one.ids for one in engine.generate(asked, max_new_tokens=600)] == wanted


def test_a_cancelled_request_ends_at_once_also_while_it_waits(made):
    engine = made(tiny(max_position_embeddings=4000, eos_token_id=None), slots=1, stop_ids=[VOCABULARY])
    first, second = queue.Queue(), queue.Queue()
    running = engine.submit(Request([5, 6], 3000), first.put)
    waiting = engine.submit(Request([7], 3000), second.put)
    waiting.cancel()
    assert [piece.finish for piece in collect(second, 10)] == ["cancelled"]
    running.cancel()
    assert collect(first, 10)[-1].finish == "cancelled"
    assert answer(engine, Request([5, 6], 3))[-1].finish == "length"


@pytest.mark.parametrize("where", ["_forward", "_begin", "_token", "join"])
def test_what_fails_is_told_to_all_and_the_engine_goes_on(made, where):
    """Wherever it happens: while prompts are laid out or read, when a row joins, in a step."""
    engine = made(tiny(), slots=3)
    wanted = answer(engine, Request([5, 6], 3))
    place = engine._slots if where == "join" else engine
    whole = getattr(place, where)

    def broken(*args):
        setattr(place, where, whole)
        raise RuntimeError("planted")

    setattr(place, where, broken)
    told = [queue.Queue() for _ in range(3)]
    for one in told:
        engine.submit(Request([5, 6], 3), one.put)
    ends = [collect(one, 10)[-1] for one in told]
    assert any(end.finish == "error" and "planted" in end.error for end in ends)
    assert all(end.finish in ("error", wanted[-1].finish) for end in ends)
    assert answer(engine, Request([5, 6], 3)) == wanted
    assert not engine._alive


def test_closing_ends_what_is_under_way(made):
    engine = made(tiny(max_position_embeddings=4000, eos_token_id=None), slots=1, stop_ids=[VOCABULARY])
    told = [queue.Queue() for _ in range(3)]
    for one in told:
        engine.submit(Request([5], 3000), one.put)
    engine.close()
    assert {collect(one, 10)[-1].finish for one in told} == {"cancelled"}
    with pytest.raises(TuneletError, match="closed"):
        engine.submit(Request([5], 3), told[0].put)


def test_logprobs_are_the_models_own(made):
    model = tiny()
    pieces = answer(made(model), Request([5, 6, 7], 4, Sampling(temperature=0.7, seed=3), logprobs=2))
    ids = [piece.token for piece in pieces[:-1]]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 6, 7, *ids]])).logits[0, 2:-1].float().log_softmax(-1)
    for piece, row in zip(pieces[:-1], logits, strict=True):
        assert piece.logprob == pytest.approx(float(row[piece.token]), abs=1e-4)
        assert [id_ for id_, _ in piece.top] == row.topk(2).indices.tolist()


def test_sampling_repeats_with_its_seed_whoever_is_beside(made):
    engine = made(tiny(), slots=8)
    alone = engine.generate([[5, 6]], max_new_tokens=10, temperature=1.0, seed=4)[0]
    beside = engine.generate([[5, 6], *prompts(9)], max_new_tokens=10, temperature=1.0, seed=4)[0]
    other = engine.generate([[5, 6]], max_new_tokens=10, temperature=1.0, seed=5)[0]
    assert alone.ids == beside.ids != other.ids


def test_bias_and_penalties_change_what_is_taken(made):
    engine = made(tiny(eos_token_id=None), stop_ids=[VOCABULARY])
    plain = [piece.token for piece in answer(engine, Request([5, 6], 6))[:-1]]
    banned = answer(engine, Request([5, 6], 6, logit_bias={plain[0]: -1000.0}))
    assert plain[0] not in [piece.token for piece in banned]
    forced = answer(engine, Request([5, 6], 6, logit_bias={9: 1000.0}))
    assert [piece.token for piece in forced[:-1]] == [9] * 6
    bias = {9: 50.0, 10: 49.0}
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        taken = answer(engine, Request([5, 6], 4, Sampling(**penalty), logit_bias={9: 1000.0, 10: 999.0}))
        assert {piece.token for piece in taken[:-1]} == {9, 10}, (penalty, bias)


def test_stop_texts_end_an_answer_before_them(made):
    engine = made(tiny(eos_token_id=None), stop_ids=[VOCABULARY])
    plain = engine.generate([[5, 6]], max_new_tokens=12)[0].text
    stop = plain[4:6]
    cut = engine.generate([[5, 6]], max_new_tokens=12, stop=[stop])[0]
    assert cut.text == plain[: plain.find(stop)] and cut.finish == "stop"


def test_what_it_cannot_do_is_refused_at_once(made):
    engine = made(tiny(), slots=1)
    for request, told in (
        (Request([], 3), "empty"),
        (Request([5] * 64, 3), "at most 64"),
        (Request([5], 3, schema={"type": "object"}), "grammars"),
        (Request([5], 3, adapter="x"), "adapter"),
    ):
        with pytest.raises(TuneletError, match=told):
            engine.submit(request, print)
    assert answer(engine, Request([5] * 60, 30))[-1].finish in ("context", "stop")

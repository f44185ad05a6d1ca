"""Likelihoods laid out as a tree equal transformers' own, one sequence at a time, whatever the batches and the order;
and texts are split into context and continuation as lm-eval splits them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunelet.evals import likelihood
from tunelet.evals.likelihood import Request
from tunelet.evals.task_template import BadRow
from tunelet.evals.tokenise import Encoder, split
from tunelet.models.attention import register

VOCABULARY = 61


def llama(**more):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def gemma2():
    """Windows on every second layer, capped scores and capped logits: the model's own head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=16,
    )
    return Gemma2ForCausalLM(config).eval()


def mamba():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
    ).eval()


def prompted():
    """Virtual tokens before every row."""
    from peft import PromptTuningConfig, get_peft_model

    from tunelet.models import virtual

    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    virtual.attach(model)
    return model.get_base_model().eval()


MODELS = {"llama": llama, "tied": lambda: llama(tie_word_embeddings=True), "gemma2": gemma2, "mamba": mamba}


def reference(model, request: Request) -> tuple[float, bool]:
    ids = torch.from_numpy(request.ids.astype(np.int64))
    with torch.no_grad():
        logp = torch.log_softmax(model(ids[None, :-1]).logits[0].double(), -1)[-request.scored :]
    targets = ids[-request.scored :]
    return float(logp.gather(1, targets[:, None]).sum()), bool((logp.argmax(-1) == targets).all())


def tree(seed: int, number: int) -> list[Request]:
    """Requests whose sequences begin alike in many ways: examples before questions, questions before choices, one that
    is the beginning of another, the same one twice, one of a single token."""
    rng = random.Random(seed)
    out: list[Request] = []
    for _ in range(number):
        start = list(rng.choice(out).ids[: rng.randrange(1, 40)]) if out and rng.random() < 0.8 else []
        ids = start + [rng.randrange(VOCABULARY) for _ in range(rng.randrange(0 if len(start) > 1 else 2, 40))]
        out.append(Request(np.array(ids, dtype=np.int32), rng.randrange(1, len(ids))))
    for _ in range(number // 4):
        twin = rng.choice(out)
        out.append(Request(np.append(twin.ids[:-1], rng.randrange(VOCABULARY)).astype(np.int32), 1))
    return out


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_equal_to_transformers_one_by_one(name, batch_size):
    model = MODELS[name]()
    requests = tree(batch_size, 30)
    expected = [reference(model, request) for request in requests]
    if name != "mamba":
        model.set_attn_implementation(register())
    found = likelihood.score(model, requests, batch_size=batch_size)
    for got, (logprob, greedy) in zip(found, expected, strict=True):
        assert got.logprob == pytest.approx(logprob, abs=3e-5, rel=2e-6)
        assert got.greedy == greedy


def test_virtual_tokens_stand_before_every_sequence():
    from tunelet.models import virtual

    model = prompted()
    requests = tree(3, 12)
    model.set_attn_implementation(register())
    found = likelihood.score(model, requests, batch_size=5)
    own = virtual.of(model)
    for got, request in zip(found, requests, strict=True):
        ids = torch.from_numpy(request.ids.astype(np.int64))
        with torch.no_grad():
            logits = model(inputs_embeds=own.before(model, ids[:-1])[None]).logits[0, own.number :]
        logp = torch.log_softmax(logits.double(), -1)[-request.scored :]
        assert got.logprob == pytest.approx(
            float(logp.gather(1, ids[-request.scored :, None]).sum()), abs=3e-5, rel=2e-6
        )


def test_bfloat16_is_near_float32():
    """The attention of matrix units, with beginnings that are not computed again."""
    model = llama()
    requests = tree(5, 40)
    expected = [reference(model, request) for request in requests]
    model = model.bfloat16()
    model.set_attn_implementation(register())
    found = likelihood.score(model, requests)
    worst = max(abs(got.logprob - sums) / got.tokens for got, (sums, _) in zip(found, expected, strict=True))
    assert worst < 0.02


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6), st.integers(1, 24), st.integers(1, 30))
def test_neither_order_nor_batches_matter(seed, number, batch_size):
    model = _shared()
    requests = tree(seed, number)
    first = likelihood.score(model, requests)
    order = list(range(len(requests)))
    random.Random(seed).shuffle(order)
    second = likelihood.score(model, [requests[place] for place in order], batch_size=batch_size)
    for place, got in zip(order, second, strict=True):
        assert got.logprob == pytest.approx(first[place].logprob, abs=2e-5, rel=2e-6)
        assert got.greedy == first[place].greedy


_KEPT: list = []


def _shared():
    if not _KEPT:
        model = llama()
        model.set_attn_implementation(register())
        _KEPT.append(model)
    return _KEPT[0]


def test_what_is_shared_is_computed_once():
    """5 questions behind 100 tokens of examples, 4 choices of one token each: 100 + 5 x 20 tokens, 5 places."""
    rng = np.random.default_rng(0)
    examples = rng.integers(0, VOCABULARY, 100)
    requests = []
    for _ in range(5):
        question = rng.integers(0, VOCABULARY, 20)
        requests += [Request(np.concatenate([examples, question, [letter]]).astype(np.int32), 1) for letter in range(4)]
    (batch,) = likelihood._batches(requests, 64)
    members, sequences, shared = batch
    laid = likelihood.lay(sequences, shared)
    assert len(laid.ids) <= 200 and len(sequences) == 5
    assert sorted(map(len, members)) == [4] * 5
    plan = likelihood.plan(laid, "cpu")
    assert sum(group.rows for group in plan.groups) == 5 and max(group.skip for group in plan.groups) >= 80


def test_the_mode_of_the_model_stays(tiny_model):
    tiny_model.set_attn_implementation(register())
    tiny_model.train()
    likelihood.score(tiny_model, [Request(np.array([1, 2, 3], dtype=np.int32), 1)])
    assert tiny_model.training


# Texts -------------------------------------------------------------------------------------------------------------


@given(st.text(max_size=40), st.text(max_size=20))
def test_split_moves_spaces_and_nothing_else(context, continuation):
    kept, rest = split(context, continuation)
    assert kept + rest == context + continuation
    assert kept == kept.rstrip() and kept == context[: len(kept)]
    assert rest.endswith(continuation)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text(max_size=60), st.text(min_size=1, max_size=20), st.integers(4, 64))
def test_a_pair_is_the_whole_text_cut_from_the_left(tiny_tokenizer, context, continuation, length):
    """As lm-eval: HFLM._encode_pair, then (context + continuation)[-(max_length + 1):][:-1]."""
    encoder = Encoder(tiny_tokenizer, length)
    kept = context.rstrip()
    if not context:
        before, after = (
            [tiny_tokenizer.bos_token_id],
            tiny_tokenizer(continuation, add_special_tokens=False)["input_ids"],
        )
        if after[:1] == before:
            before, after = after[:1], after[1:]
    else:
        moved = context[len(kept) :] + continuation
        whole = tiny_tokenizer(kept + moved)["input_ids"]
        before = tiny_tokenizer(kept)["input_ids"]
        after = whole[len(before) :]
    try:
        (request,) = encoder.pairs([(context, continuation)])
    except BadRow:
        assert not before or not after or len(after) > length
        return
    assert request.scored == len(after)
    assert request.ids.tolist() == (whole if context else before + after)[-(length + 1) :]
    assert len(request.read) <= length


def test_bos_is_not_put_before_a_text_that_has_it(shared):
    from tunelet.data.render import load_tokenizer

    encoder = Encoder(load_tokenizer(shared / "weights-stories260K" / "hf"), 512)
    plain, with_bos = encoder.encode(["Once", "<s>Once"])
    assert plain[0] == encoder.prefix and with_bos.count(encoder.prefix) == 1


def test_rolling_windows_predict_every_token_once(tiny_tokenizer):
    text = "The bedroom fan is off. " * 20
    ids = tiny_tokenizer(text)["input_ids"]
    encoder = Encoder(tiny_tokenizer, 32)
    windows = encoder.rolling(text)
    assert [i for window in windows for i in window.ids[-window.scored :].tolist()] == ids
    assert all(len(window.read) <= 32 for window in windows)
    assert windows[0].ids[0] == tiny_tokenizer.bos_token_id
    assert len(windows[-1].read) == 32  # filled up with what came before


def test_an_answer_without_a_token_of_its_own(tiny_tokenizer):
    with pytest.raises(BadRow, match="no token") as caught:
        Encoder(tiny_tokenizer, 32).pairs([("a", "b"), ("light", "")])
    assert caught.value.place == 1
    with pytest.raises(BadRow, match="the model reads 4"):
        Encoder(tiny_tokenizer, 4).pairs([("a", " kitchen and the door and the bedroom")])

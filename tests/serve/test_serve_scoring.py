"""Log-probabilities of prompts are those of the evaluator, in the layout that lm-eval's local-completions reads."""

from __future__ import annotations

import math

import numpy as np
import pytest
from serving import Client, ScriptedEngine, app_of

from tunelet.evals import likelihood
from tunelet.evals.tokenise import Encoder

pytest.importorskip("uvicorn")
TEXTS = ["Turn on the light in the kitchen.", "오후 7시 15분에 침실 불을 켜 주세요.", "The fan is off", "a b c d e f g"]


@pytest.fixture
def client(tiny_tokenizer, tiny_model):
    return Client(app_of(ScriptedEngine(tiny_tokenizer), model=tiny_model))


def as_lm_eval_reads(choice, context):
    """(sum of the continuation's log-probabilities, whether it is greedy): lm-eval 0.4.13, openai_completions.py."""
    logprobs = choice["logprobs"]
    tokens, tops = logprobs["tokens"][context:-1], logprobs["top_logprobs"][context:-1]
    greedy = all(
        token == max(top.items(), key=lambda item: item[1])[0] for token, top in zip(tokens, tops, strict=True)
    )
    return sum(logprobs["token_logprobs"][context:-1]), greedy


def test_likelihoods_are_the_evaluators(client, tiny_tokenizer, tiny_model):
    pairs = [(text[:9], text[9:]) for text in TEXTS]
    requests = Encoder(tiny_tokenizer, 512).pairs(pairs)
    expected = likelihood.score(tiny_model, requests)
    prompts = [request.ids.tolist() for request in requests]
    body = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    told = client.complete(**body).json()
    assert told["usage"]["completion_tokens"] == len(TEXTS)
    for choice, request, one in zip(told["choices"], requests, expected, strict=True):
        total, greedy = as_lm_eval_reads(choice, len(request.ids) - request.scored)
        assert total == pytest.approx(one.logprob, abs=1e-3) and greedy == one.greedy
        assert choice["logprobs"]["token_logprobs"][0] is None is choice["logprobs"]["top_logprobs"][0]
    assert not client.app.models.get("m").desk.engine.asked  # one computation did it all


def test_each_place_is_torchs(client, tiny_tokenizer, tiny_model):
    import torch

    ids = tiny_tokenizer(TEXTS[1])["input_ids"]
    with torch.inference_mode():
        logp = torch.log_softmax(tiny_model(torch.tensor([ids])).logits[0].float(), -1)
    [choice] = client.complete(prompt=TEXTS[1], max_tokens=0, logprobs=3, echo=True).json()["choices"]
    told = choice["logprobs"]
    assert choice["text"] == TEXTS[1] and choice["finish_reason"] == "length"
    expected = logp[range(len(ids) - 1), ids[1:]].tolist()
    assert told["token_logprobs"][0] is None and np.allclose(told["token_logprobs"][1:], expected, atol=1e-4)
    for place, tops in enumerate(told["top_logprobs"][1:]):
        best = sorted(logp[place].topk(3).values.tolist())
        assert 3 <= len(tops) <= 4 and np.allclose(sorted(tops.values())[-3:], best, atol=1e-4)
    [one] = client.complete(prompt=ids, max_tokens=1, temperature=0, logprobs=1, echo=True).json()["choices"]
    assert one["logprobs"]["token_logprobs"][-1] == pytest.approx(float(logp[-1].max()), abs=1e-4)
    assert "".join(one["logprobs"]["tokens"]).startswith(one["logprobs"]["tokens"][0])


def test_a_scored_prompt_and_a_written_answer(client):
    [choice] = client.complete(max_tokens=3, logprobs=1, echo=True).json()["choices"]
    told = choice["logprobs"]
    assert choice["text"].startswith("Turn on") and told["token_logprobs"][-3:] == [-0.5] * 3
    assert len({len(values) for values in told.values()}) == 1
    assert told["text_offset"] == sorted(told["text_offset"])
    parts = client.events(client.complete(max_tokens=3, logprobs=1, echo=True, stream=True))
    assert "".join(part["choices"][0]["text"] for part in parts) == choice["text"]


def test_embeddings_are_means_of_length_one(client, tiny_tokenizer, tiny_model):
    import torch

    told = client.http.post("/v1/embeddings", json={"model": "m", "input": TEXTS}).json()
    ids = tiny_tokenizer(TEXTS[0])["input_ids"]
    with torch.inference_mode():
        mean = tiny_model.base_model(torch.tensor([ids])).last_hidden_state[0].mean(0)
    first = told["data"][0]["embedding"]
    assert math.isclose(sum(value * value for value in first), 1, abs_tol=1e-4)
    assert np.allclose(first, (mean / mean.norm()).tolist(), atol=1e-4)
    packed = {"model": "m", "input": ids, "encoding_format": "base64"}
    import base64

    told = client.http.post("/v1/embeddings", json=packed).json()
    assert np.allclose(np.frombuffer(base64.b64decode(told["data"][0]["embedding"]), dtype="<f4"), first, atol=1e-6)
    assert client.http.post("/v1/embeddings", json={"model": "m", "input": "x", "dimensions": 5}).status_code == 400
    assert client.http.post("/v1/embeddings", json={"model": "m", "input": "a " * 2000}).status_code == 400

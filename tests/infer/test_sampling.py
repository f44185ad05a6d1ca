"""Sampling draws from the distribution it says, and filters as transformers does."""

from __future__ import annotations

import pytest
import torch

from tunelet.infer.sampling import Sampler, Sampling


def draw(sampling: Sampling, logits: list[float], rows: int, prompt=(0,)) -> torch.Tensor:
    sampler = Sampler(sampling, [list(prompt)] * rows, list(range(rows)), torch.device("cpu"))
    return sampler.pick(torch.tensor([logits] * rows))


def test_frequencies_follow_the_softmax():
    logits = [0.0, 1.0, 2.0, -1.0, 0.5]
    counts = draw(Sampling(temperature=0.7), logits, 20000).bincount(minlength=5) / 20000
    assert torch.allclose(counts, (torch.tensor(logits) / 0.7).softmax(-1), atol=0.012)


def test_filters_equal_transformers():
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    for top_k, top_p in ((3, 1.0), (0, 0.6), (5, 0.5), (1, 1.0), (0, 1e-6)):
        logits = torch.randn(1, 12) * 2
        kept = logits.clone()
        if top_k:
            kept = TopKLogitsWarper(top_k)(None, kept)
        if top_p < 1:
            kept = TopPLogitsWarper(top_p)(None, kept)
        allowed = set(kept.isfinite().nonzero()[:, 1].tolist())
        got = set(draw(Sampling(temperature=1.0, top_k=top_k, top_p=top_p), logits[0].tolist(), 4000).tolist())
        assert got <= allowed
        share = kept.softmax(-1)[0]
        assert {i for i in allowed if share[i] > 0.01} <= got


def test_repetition_penalty_equals_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    prompt = [1, 4, 4, 7]
    logits = torch.randn(1, 9)
    sampler = Sampler(Sampling(repetition_penalty=1.7), [prompt], [0], torch.device("cpu"))
    ids = torch.tensor([prompt])
    for _ in range(5):
        wanted = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits).argmax(-1)
        got = sampler.pick(logits)
        assert got.tolist() == wanted.tolist()
        ids = torch.cat([ids, got[:, None]], -1)


@pytest.mark.parametrize("seed", [0, 1])
def test_seeds(seed):
    one = draw(Sampling(temperature=1.0, seed=seed), [0.0] * 50, 8).tolist()
    assert one == draw(Sampling(temperature=1.0, seed=seed), [0.0] * 50, 8).tolist()
    assert one != draw(Sampling(temperature=1.0, seed=seed + 1), [0.0] * 50, 8).tolist()
    assert len(set(one)) > 1


@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0])
@pytest.mark.parametrize("cut", [{}, {"top_p": 0.9}, {"top_p": 0.3}, {"top_k": 40}, {"top_k": 700, "top_p": 0.95}])
def test_a_draw_among_the_likeliest_is_the_draw_among_all(monkeypatch, spread, cut):
    """Flat and peaked distributions over 3,000 tokens: looking at few of them first changes nothing."""
    logits = torch.randn(50, 3000, generator=torch.Generator().manual_seed(1)) * spread
    rows = range(50)

    def drawn():
        sampler = Sampler(Sampling(temperature=0.8, seed=5, **cut), [[0]] * 50, rows, logits.device)
        return [sampler.pick(logits).tolist() for _ in range(4)]

    narrow = drawn()
    monkeypatch.setattr("tunelet.infer.sampling.NARROW", 10_000)
    assert drawn() == narrow

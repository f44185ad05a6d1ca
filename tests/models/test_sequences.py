"""Log-probabilities of whole answers: a prompt that stands there once gives what two whole rows give, on every
architecture and on every path; and they are exact enough to be subtracted from one another."""

from __future__ import annotations

import random

import pytest
import torch

from tests.models.test_exactness import NAMES, architectures
from tunelet.data import pack
from tunelet.data.examples import Origin, Tokens
from tunelet.models import attention, head, sequences


def rows(count: int = 4, seed: int = 0, vocabulary: int = 257) -> tuple[list[Tokens], list[Tokens]]:
    """(rows with two branches and one without, the same sequences as whole rows)."""
    draw = random.Random(seed)

    def some(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocabulary) for _ in range(draw.randrange(1, most)))

    def row(ids, prompt, branches=()):
        mask = (False,) * prompt + (True,) * (len(ids) - prompt)
        return Tokens(ids, mask, ((0, len(ids), "text"),), Origin("t", 1), branches=branches)

    shared, whole = [], []
    for _ in range(count):
        prompt, one, other = some(30), some(20), some(20)
        n = len(prompt)
        shared.append(row(prompt + one + other, n, (n, n + len(one))))
        whole += [row(prompt + one, n), row(prompt + other, n)]
    shared.insert(2, whole[0])
    whole.insert(4, whole[0])
    return shared, whole


def model_of(name: str, dtype: torch.dtype = torch.float32):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architectures()[name](), attn_implementation=attention.register())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def gradients(model, some_rows):
    """(sums, counts, gradients of a weighted sum that treats every sequence differently)."""
    model.zero_grad()
    sums, counts = sequences.logprobs(model, pack.make_batch(some_rows))
    (sums * torch.linspace(-1, 1, len(sums))).sum().backward()
    return sums.detach(), counts, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def plain(model, some_rows):
    """The same by transformers, one row after the other."""
    model.zero_grad()
    sums = []
    for row in some_rows:
        logp = torch.log_softmax(model(torch.tensor([row.ids]), use_cache=False).logits[0].float(), -1)
        sums.append(sum(logp[i - 1, row.ids[i]] for i in range(1, len(row.ids)) if row.mask[i]))
    sums = torch.stack(sums)
    (sums * torch.linspace(-1, 1, len(sums))).sum().backward()
    return sums.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def furthest(ours, theirs):
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_shared_prompt_changes_nothing(name):
    model, (shared, whole) = model_of(name), rows()
    assert head.packs(model)
    sums, counts, found = gradients(model, shared)
    apart, of_each, expected = gradients(model, whole)
    of_transformers, theirs = plain(model, whole)
    torch.testing.assert_close(sums, apart, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(sums, of_transformers, rtol=1e-6, atol=1e-5)
    assert torch.equal(counts, of_each) and counts.tolist() == [row.trained for row in whole]
    assert furthest(found, expected) < 1e-5 and furthest(found, theirs) < 1e-5


@pytest.mark.parametrize("path", ["row by row", "logits of its own", "softmax made again"])
def test_every_path_gives_the_same(path, monkeypatch):
    model, (shared, _) = model_of("llama"), rows()
    sums, _, expected = gradients(model, shared)
    if path == "row by row":
        model._tunelet_packs = False
    elif path == "logits of its own":
        model._tunelet_plain_head = False
    else:
        monkeypatch.setattr(sequences, "KEEP_ELEMENTS", 0)
        monkeypatch.setattr(head, "CHUNK_ELEMENTS", 5 * 257)
    again, _, found = gradients(model, shared)
    torch.testing.assert_close(again, sums, rtol=1e-6, atol=1e-5)
    assert furthest(found, expected) < 1e-5


def test_bf16_attention_shares_prompts_too():
    """The batched products for bf16 rows: as near to whole rows as bf16 is to itself."""
    model, (shared, whole) = model_of("llama", torch.bfloat16), rows()
    sums, _, found = gradients(model, shared)
    apart, _, expected = gradients(model, whole)
    torch.testing.assert_close(sums, apart, rtol=0.01, atol=0.2)
    assert furthest([g.float() for g in found], [g.float() for g in expected]) < 0.1


def test_the_heads_log_probabilities_are_exact_in_bf16():
    """300 targets: the sum from bf16 weights and hidden states is that of float64 to 0.005. From bf16 logits it is off
    by 0.1 and more."""
    torch.manual_seed(0)
    h, weight = torch.randn(300, 64).bfloat16(), (0.1 * torch.randn(3000, 64)).bfloat16()
    targets, one = torch.randint(0, 3000, (300,)), torch.zeros(300, dtype=torch.int64)
    exact = torch.log_softmax(h.double() @ weight.double().t(), -1).gather(1, targets[:, None]).sum()
    ours = sequences._SequenceSums.apply(h, weight, targets, one, 1)
    assert abs(float(ours) - float(exact)) < 0.005
    rounded = torch.log_softmax((h @ weight.t()).float(), -1).gather(1, targets[:, None]).sum()
    assert abs(float(rounded) - float(exact)) > 4 * abs(float(ours) - float(exact))


def test_mean_and_entropy():
    model, (_, whole) = model_of("llama"), rows()
    batch = pack.make_batch(whole)
    mean, entropy = sequences.mean_and_entropy(model, batch)
    sums, counts = sequences.logprobs(model, batch)
    assert mean == pytest.approx(float(sums.sum() / counts.sum()), rel=1e-5)
    model._tunelet_plain_head = False
    assert sequences.mean_and_entropy(model, batch) == pytest.approx((mean, entropy), rel=1e-5)
    assert 0 < entropy < torch.log(torch.tensor(257.0))


def test_a_row_knows_its_sequences():
    (row, *_), (first, second, *_) = rows()
    assert row.only(0).ids == first.ids and row.only(1).ids == second.ids
    assert row.only(1).mask == second.mask and row.only(1).spans[-1][1] == len(second.ids)
    assert sum(b - a for a, b in row.sequences) == len(row.ids) and row.trained == first.trained + second.trained

"""Packed rows equal rows computed one by one, on several architectures; groups, windows and caps; generation falls
through to SDPA."""

from __future__ import annotations

import itertools

import pytest
import torch

from tunelet.data.examples import Batch
from tunelet.models import attention, gemm_attention, head

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
}
LENGTHS = {"mixed": (17, 30, 9, 28, 1), "equal": (24, 24, 24), "one": (40,), "long": (200, 150, 13, 190)}


def config(name: str):
    import transformers as t

    gpt2 = {"vocab_size": 300, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
    return {
        "llama": lambda: t.LlamaConfig(**SMALL),
        "qwen2": lambda: t.Qwen2Config(**SMALL),
        "qwen3": lambda: t.Qwen3Config(**SMALL, head_dim=16),
        "gemma2": lambda: t.Gemma2Config(
            **SMALL, head_dim=16, sliding_window=8, attn_logit_softcapping=3.0, final_logit_softcapping=5.0
        ),
        "gemma3": lambda: t.Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=8),
        "phi3": lambda: t.Phi3Config(**SMALL, pad_token_id=0),
        "gpt2": lambda: t.GPT2Config(**gpt2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    }[name]()


def model_of(name: str, implementation: str, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(name), attn_implementation=implementation)
    with torch.no_grad():  # random weights of 0.02 make attention nearly uniform: a mask that leaks would hardly show
        for p in model.parameters():
            p.mul_(3.0) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype).eval()


def stream(rows: list[torch.Tensor]) -> Batch:
    lengths = torch.tensor([0] + [len(row) for row in rows])
    starts = lengths.cumsum(0)
    at = torch.cat([torch.arange(a, b - 1) for a, b in itertools.pairwise(starts)])
    ids = torch.cat(rows)
    positions, none = torch.cat([torch.arange(len(row)) for row in rows]), torch.empty(0)
    return Batch(ids, positions, starts, at, ids[at + 1], none, none, none)


def rows_of(kind: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (n,), generator=generator) for n in LENGTHS[kind]]


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"])
def test_packed_equals_unpacked(name, kind):
    """fp32, 1e-5: each row of the flat stream as plain transformers (eager attention) computes it alone."""
    rows = rows_of(kind)
    plain = model_of(name, "eager")
    packed = model_of(name, attention.register())
    packed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        expected = torch.cat([plain(row[None]).logits[0] for row in rows])
        batch = stream(rows)
        found = packed(**head._inputs(batch)).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 8, 100])
@pytest.mark.parametrize("heads,kv", [(4, 4), (6, 2), (4, 1)])
def test_gemm_attention_and_its_gradients_equal_sdpa(heads, kv, window):
    torch.manual_seed(0)
    q = torch.randn(2, 300, heads, 16, requires_grad=True)
    k, v = (torch.randn(2, 300, kv, 16, requires_grad=True) for _ in range(2))
    weight = torch.randn(2, 300, heads, 16)
    ours = gemm_attention.GemmAttention.apply(q, k, v, 0.3, window, 0)
    theirs = attention._sdpa(q, k, v, 0.3, window)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
    for found, expected in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_gradients_through_a_packed_stream_equal_those_of_single_rows():
    torch.manual_seed(0)
    lengths = (5, 30, 31, 7, 29)
    parts = [[torch.randn(n, h, 8, requires_grad=True) for h in (4, 2, 2)] for n in lengths]
    weights = [torch.randn(n, 4, 8) for n in lengths]
    total = sum(
        (attention._plain(q[None], k[None], v[None], 0.35, None, None, 0.0)[0] * w).sum()
        for (q, k, v), w in zip(parts, weights, strict=True)
    )
    expected = torch.autograd.grad(total, [x for part in parts for x in part])
    flat = [torch.cat([part[i] for part in parts]) for i in range(3)]
    plan = attention.plan([0, 5, 35, 66, 73, 102])
    assert len(plan.groups) == 2 and sum(group.rows for group in plan.groups) == 5
    out = attention.flat_attention(*flat, plan, scale=0.35)
    found = torch.autograd.grad((out * torch.cat(weights)).sum(), [x for part in parts for x in part])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bf16_gemm_attention_is_near_fp32():
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 200, 4, 16) for _ in range(3))
    exact = attention._sdpa(q, k, v, 0.25, None)
    found = attention._rows(*(x.bfloat16() for x in (q, k, v)), 0.25, None, None, 0.0)
    assert (found.float() - exact).abs().max() < 0.05
    assert torch.nn.functional.cosine_similarity(found.float().flatten(), exact.flatten(), dim=0) > 0.9999


def test_equal_rows_need_no_copy_and_padding_stays_small():
    assert attention.plan([0, 7, 14, 21]).gather is None
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 400, (64,), generator=generator)
    plan = attention.plan(torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]))
    places = sum(group.rows * group.length for group in plan.groups)
    assert places <= 1.25 * int(lengths.sum())
    assert len(plan.groups) <= 24
    assert torch.equal(plan.gather[plan.scatter], torch.arange(int(lengths.sum())))


def test_a_border_that_does_not_rise_is_refused():
    with pytest.raises(ValueError, match="rise"):
        attention.plan([0, 5, 5])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_generation_with_a_cache_falls_through(name):
    """The same tokens as plain transformers, padded batch and single row, with and without a cache."""
    plain, ours = model_of(name, "eager"), model_of(name, attention.register())
    ours.load_state_dict(plain.state_dict())
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for arguments in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}):
        a = plain.generate(**arguments, max_new_tokens=8, do_sample=False, pad_token_id=0)
        b = ours.generate(**arguments, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(a, b)


def test_a_plan_refuses_a_padded_batch():
    model = model_of("llama", attention.register())
    with pytest.raises(ValueError, match="one flat stream"):
        model(torch.zeros(2, 4, dtype=torch.int64), segments=attention.plan([0, 4]), use_cache=False)

"""The loss head equals plain cross-entropy, loss and gradient, on plain heads and on those with a bias, scale or
cap."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from tunelet.data.examples import Batch, Origin, Tokens
from tunelet.data.pack import make_batch
from tunelet.models import attention, head

SMALL = {
    "vocab_size": 211,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


def build(name: str):
    import transformers as t
    from transformers import AutoModelForCausalLM

    config = {
        "llama-tied": lambda: t.LlamaConfig(**SMALL, tie_word_embeddings=True),
        "llama-untied": lambda: t.LlamaConfig(**SMALL, tie_word_embeddings=False),
        "gemma2-cap": lambda: t.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0),
        "granite-scale": lambda: t.GraniteConfig(**SMALL, logits_scaling=4.0),
        "cohere-scale": lambda: t.CohereConfig(**SMALL, logit_scale=0.25),
        "phi-bias": lambda: t.PhiConfig(**SMALL),
    }[name]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in (12, 31, 7, 30):
        ids = torch.randint(0, 211, (n,), generator=generator).tolist()
        rows.append(Tokens(tuple(ids), tuple(i > n // 3 for i in range(n)), ((0, n, "text"),), Origin("test", n)))
    return make_batch(rows)


def plain_nll(model, rows: Batch):
    """transformers' own logits of each row alone, torch's cross-entropy."""
    borders, total = rows.segments.tolist(), 0.0
    for a, b in itertools.pairwise(borders):
        logits = model(rows.input_ids[None, a:b], use_cache=False).logits[0]
        here = (rows.loss_at >= a) & (rows.loss_at < b)
        total = total + F.cross_entropy(logits[rows.loss_at[here] - a], rows.targets[here], reduction="sum")
    return total


@pytest.mark.parametrize(
    "name", ["llama-tied", "llama-untied", "gemma2-cap", "granite-scale", "cohere-scale", "phi-bias"]
)
@pytest.mark.parametrize("chunk", [None, 10])
def test_loss_and_gradients_equal_plain_cross_entropy(name, chunk, monkeypatch):
    if chunk:  # many chunks of the head
        monkeypatch.setattr(head, "CHUNK_ELEMENTS", chunk * 211)
    model, rows = build(name), batch()
    assert head.is_plain(model) == name.startswith("llama")
    model.zero_grad()
    expected = plain_nll(model, rows) / 50
    expected.backward()
    wanted = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    found = head.nll_sum(model, rows, 1 / 50)
    found.backward()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    for key, p in model.named_parameters():
        torch.testing.assert_close(
            p.grad, wanted[key], atol=1e-5, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_scoring_without_gradients_takes_one_product_of_the_head():
    from torch.utils.flop_counter import FlopCounterMode

    model, rows = build("llama-tied"), batch()
    assert head.is_plain(model)  # looks once
    work = {}
    for training in (True, False):
        with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
            loss = head.nll_sum(model, rows)
        work[training] = counter.get_total_flops()
    assert not loss.requires_grad
    product = 2 * len(rows.targets) * model.lm_head.weight.numel()
    assert work[True] - work[False] == 2 * product


def test_an_outer_factor_reaches_the_gradients():
    model, rows = build("llama-tied"), batch()
    (3.0 * head.nll_sum(model, rows, 0.01)).backward()
    tripled = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    head.nll_sum(model, rows, 0.03).backward()
    torch.testing.assert_close(tripled, model.model.embed_tokens.weight.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama-tied", "granite-scale"])
def test_target_logprobs_equal_log_softmax_and_their_gradient(name):
    model, rows = build(name), batch()
    found = head.target_logprobs(model, rows)
    assert found.dtype == torch.float32 and found.shape == rows.targets.shape
    torch.testing.assert_close(-found.sum(), plain_nll(model, rows), atol=1e-4, rtol=1e-6)
    found.sum().backward()
    ours = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    (-plain_nll(model, rows)).backward()
    torch.testing.assert_close(ours, model.get_input_embeddings().weight.grad, atol=1e-4, rtol=1e-4)


def test_a_frozen_head_under_lora_gets_no_gradient():
    from tunelet.models import adapters
    from tunelet.recipe import AdapterSection

    model = adapters.add(build("llama-tied"), AdapterSection(kind="lora", rank=2))
    rows = batch()
    loss = head.nll_sum(model, rows, 1.0)
    torch.testing.assert_close(loss, plain_nll(model, rows), atol=1e-3, rtol=1e-6)
    loss.backward()
    with_gradient = {key for key, p in model.named_parameters() if p.grad is not None}
    assert with_gradient and all("lora_" in key for key in with_gradient)


def test_bf16_loss_and_gradient_are_near_fp32():
    exact, low = build("llama-tied"), build("llama-tied").bfloat16()
    exact.load_state_dict({key: value.float() for key, value in low.state_dict().items()})
    rows = batch()
    a, b = head.nll_sum(exact, rows, 0.02), head.nll_sum(low, rows, 0.02)
    a.backward(), b.backward()
    assert abs(float(a.detach()) - float(b.detach())) < 0.02 * float(a.detach())
    ga, gb = (torch.cat([p.grad.float().flatten() for p in model.parameters()]) for model in (exact, low))
    assert F.cosine_similarity(ga, gb, dim=0) > 0.99


@pytest.mark.parametrize("name", ["mamba", "bloom", "lfm2"])
def test_architectures_that_cannot_be_packed_run_row_by_row(name):
    """Recurrent, ALiBi and convolutional models would leak from row to row, silently, in one stream."""
    import transformers as t
    from transformers import AutoModelForCausalLM

    config = {
        "mamba": lambda: t.MambaConfig(vocab_size=211, hidden_size=32, num_hidden_layers=2, state_size=4),
        "bloom": lambda: t.BloomConfig(vocab_size=211, hidden_size=32, n_layer=2, n_head=4),
        "lfm2": lambda: t.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    }[name]()
    torch.manual_seed(0)
    implementation = attention.register() if name == "lfm2" else "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    assert not head.packs(model)
    rows = batch()
    torch.testing.assert_close(head.nll_sum(model, rows), plain_nll(model, rows), atol=1e-3, rtol=1e-6)


def test_architectures_of_the_attention_interface_are_packed():
    assert head.packs(build("llama-tied")) and head.packs(build("gemma2-cap"))

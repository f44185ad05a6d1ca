"""What is trained is what plain transformers computes: loss and every gradient in float32, on a padded batch with its
own attention and torch's cross-entropy, for five architectures, full and LoRA, with and without checkpointing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tunelet.data.examples import Origin, Tokens
from tunelet.data.pack import make_batch
from tunelet.models import adapters, head, load
from tunelet.models.device import Choice
from tunelet.models.ready import make_ready
from tunelet.recipe import AdapterSection

CPU = Choice("cpu", "float32", 1)
LENGTHS = (23, 64, 9, 61, 40)
SMALL = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def architectures():
    import transformers as t

    gpt2 = {"vocab_size": 257, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
    return {
        "llama": lambda: t.LlamaConfig(**SMALL, tie_word_embeddings=True),
        "qwen3": lambda: t.Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
        "gemma3": lambda: t.Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=16),
        "phi3": lambda: t.Phi3Config(**SMALL, tie_word_embeddings=False),
        "gpt2": lambda: t.GPT2Config(**gpt2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0, pad_token_id=0),
    }


NAMES = ["llama", "qwen3", "gemma3", "phi3", "gpt2"]


@pytest.fixture(scope="module", params=NAMES)
def folder(request, tmp_path_factory):
    """Weights far from their initial values: attention that is not uniform, norms and biases that are not 1 and 0."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(architectures()[request.param]())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0) if p.ndim > 1 else p.add_(0.1 * torch.randn_like(p))
    where = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(where)
    return where


def rows() -> list[Tokens]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for n in LENGTHS:
        ids = torch.randint(1, 257, (n,), generator=generator).tolist()
        made.append(Tokens(tuple(ids), tuple(i > n // 3 for i in range(n)), ((0, n, "text"),), Origin("test", n)))
    return made


def plain_loss(model, examples: list[Tokens]) -> torch.Tensor:
    """The mean over all trained tokens of a right-padded batch, as a textbook writes it."""
    longest = max(len(row.ids) for row in examples)
    ids = torch.tensor([list(row.ids) + [0] * (longest - len(row.ids)) for row in examples])
    real = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in examples])
    labels = torch.tensor(
        [
            [token if trained else -100 for token, trained in zip(row.ids, row.mask, strict=True)]
            + [-100] * (longest - len(row.ids))
            for row in examples
        ]
    )
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, found_loss, expected, expected_loss):
    assert abs(float(found_loss.detach()) - float(expected_loss.detach())) <= 1e-6 * float(expected_loss.detach())
    assert set(found) == set(expected)
    total = torch.cat([g.flatten() for g in expected.values()]).norm()
    away = torch.cat([(found[name] - g).flatten() for name, g in expected.items()]).norm()
    assert away <= 1e-5 * total, float(away / total)
    for name, g in expected.items():  # no parameter hides behind the large ones
        assert (found[name] - g).norm() <= 1e-5 * g.norm() + 1e-7 * total, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stock", ["sdpa", "eager"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_loss_and_gradients_are_those_of_plain_transformers(folder, adapter, stock, checkpointing):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=stock)
    ours = load.load_model(folder, CPU)
    if adapter == "lora":
        section = AdapterSection(kind="lora", rank=4)
        ours = adapters.add(ours, section)
        plain = get_peft_model(plain, LoraConfig(r=4, lora_alpha=section.alpha, target_modules="all-linear"))
        same = dict(plain.named_parameters())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # an adapter that has learned something: its B starts at zero
            for name, p in ours.named_parameters():
                if p.requires_grad:
                    same[name].copy_(p.copy_(torch.randn(p.shape, generator=generator) * 0.05))
    ours = make_ready(ours, checkpointing=checkpointing)
    examples = rows()
    expected = plain_loss(plain.train(), examples)
    expected.backward()
    batch = make_batch(examples)
    found = head.nll_sum(ours.train(), batch, 1 / len(batch.targets))
    found.backward()
    trained = sum(p.requires_grad for p in ours.parameters())
    assert head.packs(ours) and len(gradients(ours)) == trained > 15
    assert_same(gradients(ours), found, gradients(plain), expected)


def test_cut_into_micro_batches(folder):
    """One row after the other with the step's coefficient adds up to the same."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ours = make_ready(load.load_model(folder, CPU)).train()
    examples = rows()
    expected = plain_loss(plain.train(), examples)
    expected.backward()
    targets = len(make_batch(examples).targets)
    found = torch.zeros(())
    for cut in (examples[:1], examples[1:3], examples[3:]):
        part = head.nll_sum(ours, make_batch(cut), 1 / targets)
        part.backward()
        found = found + part.detach()
    assert_same(gradients(ours), found, gradients(plain), expected)

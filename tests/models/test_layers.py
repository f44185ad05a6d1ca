"""The faster norms and gated MLPs: the model's own numbers, fewer saved activations, and hands off the unknown."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from tunelet.models import layers

SMALL = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {**SMALL, "head_dim": 16}
# name -> (config, modules that take a faster form)
SHAPES = {
    "llama": (transformers.LlamaConfig(**SMALL), 7),
    "qwen2": (transformers.Qwen2Config(**SMALL), 7),
    "qwen3": (transformers.Qwen3Config(**HEADS), 11),
    "gemma2": (transformers.Gemma2Config(**HEADS), 11),
    "gemma3": (transformers.Gemma3TextConfig(**HEADS), 15),
    "phi3": (transformers.Phi3Config(**SMALL), 7),
    "smollm3": (transformers.SmolLM3Config(**SMALL), 7),
    "gpt2": (transformers.GPT2Config(vocab_size=211, n_embd=32, n_layer=2, n_head=4), 0),
}


def made(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(SHAPES[name][0], dtype=dtype).eval()
    for p in model.parameters():  # norms that are all ones or zeros would hide mistakes
        p.data.add_(torch.randn_like(p) * 0.05)
    return model


def loss_and_gradients(model):
    model.zero_grad()
    ids = torch.randint(1, 200, (2, 17), generator=torch.Generator().manual_seed(1))
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SHAPES)
def test_loss_and_gradients_stay_the_models_own(name):
    model = made(name)
    loss, gradients = loss_and_gradients(model)
    assert layers.speed_up(model) == SHAPES[name][1]
    fast_loss, fast = loss_and_gradients(model)
    assert abs(float(fast_loss - loss)) <= 1e-6 * float(loss)
    for key, expected in gradients.items():
        assert torch.linalg.vector_norm(fast[key] - expected) <= 1e-5 * torch.linalg.vector_norm(expected), key
    assert layers.speed_up(model) == 0, "once is enough"


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_gradients_in_bf16_are_no_farther_from_fp32_than_before(name):
    exact = loss_and_gradients(made(name, torch.bfloat16).float())[1]
    model = made(name, torch.bfloat16)

    def distance():
        found = loss_and_gradients(model)[1]
        return sum(float(torch.linalg.vector_norm(found[key].float() - exact[key]) ** 2) for key in exact)

    before = distance()
    assert layers.speed_up(model) == SHAPES[name][1]
    assert distance() <= 1.1 * before


def test_fewer_activations_are_saved():
    def saved(model):
        sizes = {}
        own = {p.data_ptr() for p in model.parameters()}

        def pack(tensor):
            if tensor.data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.arange(1, 65)[None])
        return sum(size for size, _ in sizes.values())

    model = made("llama")
    before = saved(model)
    layers.speed_up(model)
    # of 14 hidden and 4 intermediate widths a layer at least two norms' copies and the two products go
    assert saved(model) < before - 2 * 64 * 4 * (2 * 64 + 2 * 96)


def test_other_norms_and_mlps_are_left_alone():
    class OddRMSNorm(torch.nn.Module):
        """Scales by the largest magnitude."""

        def __init__(self):
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(64)), 1e-6

        def forward(self, x):
            return self.weight * x / (x.abs().amax(-1, keepdim=True) + self.eps)

    class OddMLP(transformers.models.llama.modeling_llama.LlamaMLP):
        def forward(self, x):
            return self.down_proj(self.up_proj(x) + self.act_fn(self.gate_proj(x)))

    model = made("llama")
    model.model.norm = OddRMSNorm()
    model.model.layers[0].mlp.__class__ = OddMLP
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    assert layers.speed_up(model) == SHAPES["llama"][1] - 2
    assert type(model.model.norm) is OddRMSNorm and type(model.model.layers[0].mlp) is OddMLP
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items()), "probing leaves no trace"


def test_classes_names_copies_and_adapters_stay():
    from peft import LoraConfig, get_peft_model

    model = made("llama")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.eval()
    loss, gradients = loss_and_gradients(adapted)
    assert layers.speed_up(adapted) == SHAPES["llama"][1] + 2 * 7, "seven linear layers each"
    assert isinstance(model.model.norm, transformers.models.llama.modeling_llama.LlamaRMSNorm)
    fast_loss, fast = loss_and_gradients(adapted)
    assert abs(float(fast_loss - loss)) <= 1e-6 * float(loss)
    for key, expected in gradients.items():
        assert torch.linalg.vector_norm(fast[key] - expected) <= 1e-5 * torch.linalg.vector_norm(expected), key
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.mul_(2)
    assert not torch.equal(twin(torch.arange(1, 9)[None]).logits, model(torch.arange(1, 9)[None]).logits)

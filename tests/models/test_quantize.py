"""Quantised frozen layers: how near they are, that gradients pass as through the dequantised weight, which layers are
taken, and that an adapter trained over them is an ordinary one."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from tunelet.errors import TuneletError
from tunelet.models import adapters, load, quantize, save
from tunelet.models.device import Choice
from tunelet.recipe import AdapterSection

FP32, BF16 = Choice("cpu", "float32", 1), Choice("cpu", "bfloat16", 1)
SMALL = {
    "vocab_size": 211,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
}


def folder_of(name: str, tmp_path):
    import transformers as t
    from transformers import AutoModelForCausalLM

    gpt2 = {"vocab_size": 211, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    gpt2 |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    config = {
        "llama": lambda: t.LlamaConfig(**SMALL, tie_word_embeddings=True),
        "llama-untied": lambda: t.LlamaConfig(**SMALL, tie_word_embeddings=False),
        "qwen2-bias": lambda: t.Qwen2Config(**SMALL),
        "gemma3": lambda: t.Gemma3TextConfig(**SMALL, head_dim=16),
        "phi3": lambda: t.Phi3Config(**SMALL, pad_token_id=0),
        "gpt2": lambda: t.GPT2Config(**gpt2),
    }[name]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0).add_(0.02 * torch.randn_like(p))
    model.save_pretrained(tmp_path / name)
    return tmp_path / name


def error(weight, bits):
    codes, scales, lows = quantize.quantize(weight, bits)
    found = quantize.dequantize(codes, scales, lows, torch.float32)
    assert found.shape == weight.shape
    return float((found - weight).norm() / weight.norm())


@pytest.mark.parametrize("columns", [256, 96, 72, 33])
def test_error_of_normal_weights(columns):
    """About what a uniform grid of that many steps allows; a row that no group divides is a group of its own."""
    torch.manual_seed(0)
    weight = torch.randn(128, columns) * 0.02
    assert error(weight, 8) < 0.008
    assert error(weight, 4) < (0.008 if columns % 2 else 0.09)
    # a far-off weight costs its own group only
    weight[3, 5] = 10.0
    assert error(weight[4:], 4) < 0.09


def test_extreme_groups():
    weight = torch.zeros(4, 128)
    weight[1] = 0.5
    weight[2, 0] = -3.0
    for bits in (8, 4):
        found = quantize.dequantize(*quantize.quantize(weight, bits), torch.float32)
        torch.testing.assert_close(found, weight, atol=4e-3, rtol=1e-2)
    big = torch.randn(2, 3000, dtype=torch.bfloat16)  # more rows than a block, and not a multiple of it
    rows = big.repeat(400, 1)
    codes, scales, _ = quantize.quantize(rows, 8)
    assert torch.equal(codes[:2], codes[-2:]) and torch.equal(scales[:2], scales[-2:])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradient_are_those_of_the_dequantised_weight(bits, dtype, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 48, bias=bias, dtype=dtype)
    held = quantize.QuantizedLinear(layer.weight.detach(), layer.bias, bits)
    assert held.weight.shape == layer.weight.shape and held.weight.dtype == dtype
    x = torch.randn(2, 7, 64, dtype=dtype, requires_grad=True)
    g = torch.randn(2, 7, 48, dtype=dtype)
    exact = F.linear(x, held.weight + 0, layer.bias)
    (wanted,) = torch.autograd.grad(exact, x, g)
    found = held(x)
    (gradient,) = torch.autograd.grad(found, x, g)
    close = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(found, exact, **close)
    torch.testing.assert_close(gradient, wanted, **close)


@pytest.mark.parametrize("name", ["llama", "llama-untied", "qwen2-bias", "gemma3", "phi3", "gpt2"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_body_is_quantised_and_nothing_else(name, kind, tmp_path):
    folder = folder_of(name, tmp_path)
    plain = load.load_model(folder, FP32)
    model = load.load_model(folder, FP32, quantization=kind)
    held = {key for key, module in model.named_modules() if isinstance(module, quantize._Quantized)}
    wanted = {
        key
        for key, module in plain.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not plain.get_output_embeddings()
    }
    assert held == wanted and len(held) >= 8 and quantize.is_quantized(model) and not quantize.is_quantized(plain)
    for key, module in plain.named_modules():
        if key in held:
            near = 0.01 if kind == "int8" else 0.1
            other = model.get_submodule(key)
            assert isinstance(other, type(module))
            weight = module.weight.detach()
            assert float((other.weight - weight).norm() / weight.norm()) < near
            assert (other.bias is None) == (getattr(module, "bias", None) is None)
            if other.bias is not None:
                assert torch.equal(other.bias, module.bias)
        else:
            for own, p in module.named_parameters(recurse=False):
                assert torch.equal(p, getattr(model.get_submodule(key), own)), f"{key}.{own}"
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert all(p.device.type == "cpu" for p in model.parameters())
    ids = torch.randint(3, 200, (1, 20))
    with torch.no_grad():
        a, b = plain(ids).logits.log_softmax(-1), model(ids).logits.log_softmax(-1)
    away = float((a - b).abs().mean())
    assert 0 < away < (0.02 if kind == "int8" else 0.3), away


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_adapter_trained_over_it_is_an_ordinary_one(name, kind, tmp_path):
    """Its gradients are those over the dequantised weights; plain peft loads it on the unquantised base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = folder_of(name, tmp_path)
    section = AdapterSection(kind="lora", rank=4)
    model = adapters.add(load.load_model(folder, FP32, quantization=kind), section, 1)
    twin = load.load_model(folder, FP32)
    with torch.no_grad():  # the same numbers, unquantised layers
        for key, module in list(load.load_model(folder, FP32, quantization=kind).named_modules()):
            if isinstance(module, quantize._Quantized):
                twin.get_submodule(key).weight.copy_(module.weight + 0)
    twin = adapters.add(twin, section, 1)
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    other = dict(twin.named_parameters())
    assert trained and all("lora_" in key and p.dtype == torch.float32 for key, p in trained.items())
    with torch.no_grad():
        for key, p in trained.items():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(key))))
            other[key].copy_(p)
    for m in (model, twin):
        m.train()
        m(ids, labels=ids).loss.backward()
    for key, p in trained.items():
        torch.testing.assert_close(p.grad, other[key].grad, atol=1e-6, rtol=1e-4)
    save.save(model.eval(), None, tmp_path / "adapter")
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values())
    base = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(folder)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    ours = load.load_model(tmp_path / "adapter", FP32)
    assert not quantize.is_quantized(ours)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)
        again = load.load_model(tmp_path / "adapter", FP32, quantization=kind, trainable=True)
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert quantize.is_quantized(again)


def test_merging_into_it_and_saving_it_are_refused(tmp_path):
    """peft's merge writes to `weight.data`, which is a copy here: it would report success and do nothing."""
    folder = folder_of("llama", tmp_path)
    model = adapters.add(load.load_model(folder, FP32, quantization="int8"), AdapterSection(kind="lora", rank=2))
    for safe in (False, True):
        with pytest.raises(TuneletError, match="quantised"):
            model.merge_and_unload(safe_merge=safe)
    base = load.load_model(folder, FP32, quantization="int4")
    with pytest.raises(TuneletError, match="quantised"):
        save.save(base, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shape_that_does_not_fit_is_still_named(tmp_path):
    folder = folder_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: torch.ones(7, 64)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TuneletError, match=name):
        load.load_model(folder, FP32, quantization="int8")
    tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TuneletError, match=name):
        load.load_model(folder, FP32, quantization="int8")


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_still_found(kind, value, tmp_path):
    folder = folder_of("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TuneletError, match=r"model\.layers\.1\.mlp\.up_proj"):
        load.load_model(folder, FP32, quantization=kind)

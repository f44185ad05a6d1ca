"""LoRA through peft: which layers, what is saved, and that plain peft loads it."""

from __future__ import annotations

import pytest
import torch

from tunelet.errors import TuneletError
from tunelet.models import adapters, load, save
from tunelet.models.device import Choice
from tunelet.recipe import AdapterSection

FP32 = Choice("cpu", "float32", 1)


def with_lora(folder, choice=FP32, **section):
    return adapters.add(load.load_model(folder, choice), AdapterSection(kind="lora", **{"rank": 4, **section}))


def test_every_linear_layer_of_the_body_and_nothing_else(tiny_model_folder):
    model = with_lora(tiny_model_folder)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert sum(f".{layer}.lora_A" in name for name in trained) == 2
    assert all("lora_" in name for name in trained) and not any(
        "lm_head" in name or "embed" in name for name in trained
    )
    assert len(trained) == 2 * 7 * 2


def test_options_reach_peft(tiny_model_folder):
    model = with_lora(tiny_model_folder, rank=3, alpha=7.0, dropout=0.25, target_modules=["q_proj"])
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7.0, 0.25)
    assert len([name for name, p in model.named_parameters() if p.requires_grad]) == 4
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (3, 32) and layer.lora_dropout["default"].p == 0.25


def test_a_wrong_target_names_the_right_ones(tiny_model_folder):
    with pytest.raises(TuneletError, match="c_attn") as caught:
        with_lora(tiny_model_folder, target_modules=["c_attn"])
    assert "q_proj" in caught.value.why


def test_saved_in_float32_and_loaded_by_plain_peft(tiny_model_folder, tiny_tokenizer, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from tunelet.train.optimizer import AdamW

    model = with_lora(tiny_model_folder, Choice("cpu", "bfloat16", 1))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    optimizer = AdamW(model.named_parameters())
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    optimizer.step(1e-3)
    master = {name: tensor.clone() for name, tensor in optimizer.weights().items()}
    optimizer.finish()
    save.save(model, tiny_tokenizer, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert all(
        torch.equal(master[name.replace(".weight", ".default.weight")], tensor) for name, tensor in stored.items()
    )
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in stored.values()), (
        "kept in more than bf16"
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    plain = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours = load.load_model(tmp_path / "adapter", FP32)
    ids = torch.randint(3, 300, (1, 9))
    torch.testing.assert_close(plain(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)
    without = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)(ids).logits
    assert not torch.allclose(without, ours(ids).logits, atol=1e-3)


def test_an_adapter_folder_without_weights_or_base(tiny_model_folder, tiny_tokenizer, tmp_path):
    save.save(with_lora(tiny_model_folder), tiny_tokenizer, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace(str(tiny_model_folder), "/nowhere/base"))
    with pytest.raises(TuneletError, match="base model") as caught:
        load.load_model(tmp_path / "adapter", FP32)
    assert "/nowhere/base" in caught.value.why
    config.write_text(text)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(TuneletError, match="no weights"):
        load.load_model(tmp_path / "adapter", FP32)


def test_training_an_adapter_on_asks_for_the_same_adapter(tiny_model_folder, tiny_tokenizer, tmp_path):
    save.save(with_lora(tiny_model_folder, alpha=8.0), tiny_tokenizer, tmp_path / "adapter")
    model = load.load_model(tmp_path / "adapter", FP32, trainable=True)
    assert any(p.requires_grad for p in model.parameters())
    adapters.check_same(model.peft_config["default"], AdapterSection(kind="lora", rank=4, alpha=8.0), "it")
    with pytest.raises(TuneletError, match=r"rank = 4|not the one"):
        adapters.check_same(model.peft_config["default"], AdapterSection(kind="lora", rank=16, alpha=8.0), "it")
    with pytest.raises(TuneletError, match="is an adapter"):
        adapters.check_same(model.peft_config["default"], AdapterSection(), "it")

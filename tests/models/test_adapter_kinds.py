"""Every kind of adapter on the packed step: peft's own loss, gradients and answers, in peft's format, both ways."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from tunelet.data.examples import Origin, Tokens
from tunelet.data.pack import make_batch
from tunelet.errors import TuneletError
from tunelet.infer.engine import TorchEngine
from tunelet.models import adapters, head, load, save, virtual
from tunelet.models.device import Choice
from tunelet.models.ready import make_ready
from tunelet.recipe import AdapterSection

FP32 = Choice("cpu", "float32", 1)
KINDS = {
    "lora": {"kind": "lora", "rank": 4},
    "rslora": {"kind": "rslora", "rank": 4},
    "dora": {"kind": "dora", "rank": 4},
    "pissa": {"kind": "lora", "rank": 4, "init": "pissa"},
    "olora": {"kind": "rslora", "rank": 4, "init": "olora"},
    "ia3": {"kind": "ia3"},
    "prompt": {"kind": "prompt", "num_virtual_tokens": 5},
    "prompt-random": {"kind": "prompt", "num_virtual_tokens": 3, "init": "random"},
    "prompt-text": {"kind": "prompt", "num_virtual_tokens": 7, "init_text": "Answer with a command."},
    "prefix": {"kind": "prefix", "num_virtual_tokens": 5},
}
VIRTUAL = ("prompt", "prompt-random", "prompt-text", "prefix")
SHAPES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": False},
    "gpt2": {"model_type": "gpt2"},
}


def made(shape: str, folder, tokenizer):
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(2)
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}
    if shape == "gpt2":
        sizes |= {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0}
        sizes |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
    config = SHAPES[shape] | sizes
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.pop("model_type")](**config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    save.save(model.float(), tokenizer, folder)
    return folder


@pytest.fixture(scope="module", params=list(SHAPES))
def base(request, tmp_path_factory, tiny_tokenizer):
    return made(request.param, tmp_path_factory.mktemp(request.param), tiny_tokenizer)


def row(length: int, seed: int) -> Tokens:
    ids = torch.randint(4, 390, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Tokens(tuple(ids), (False,) + (True,) * (length - 1), ((0, length, "text"),), Origin("x", 1))


ROWS = [row(length, length) for length in (5, 19, 33, 7)]


def learned(folder, tokenizer, kind: str, choice=FP32):
    """A model with an adapter that has learned something."""
    model = adapters.add(load.load_model(folder, choice), AdapterSection(**KINDS[kind]), 1, tokenizer)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def in_plain_peft(folder, adapter):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


def plain_nll(model, rows) -> torch.Tensor:
    total = torch.zeros(())
    for one in rows:
        ids = torch.tensor(one.ids)[None]
        logits = model(input_ids=ids).logits[0, -ids.shape[1] :]
        total = total + F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradients_and_answers_are_pefts_own(base, tiny_tokenizer, tmp_path, kind):
    model = make_ready(learned(base, tiny_tokenizer, kind))
    save.save(model, tiny_tokenizer, tmp_path / "adapter")
    plain = in_plain_peft(base, tmp_path / "adapter")
    for name, p in plain.named_parameters():
        p.requires_grad_(any(part in name for part in ("lora_", "ia3_", "prompt_encoder")))
    expected = plain_nll(plain, ROWS)
    expected.backward()
    batch = make_batch(ROWS)
    found = head.nll_sum(model, batch)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    ours = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs) and len(ours) == sum(p.requires_grad for p in model.parameters())
    for name, grad in ours.items():
        wanted = theirs[name]
        if kind in ("pissa", "olora"):  # written with what it began as beside it: the first half is what is trained
            wanted = wanted[: grad.shape[0], : grad.shape[1]]
        far = 1e-4 if kind in ("pissa", "olora") else 1e-5  # the weights were taken apart and put together
        assert (grad - wanted).norm() <= far * wanted.norm() + 1e-6, name
    loaded = load.load_model(tmp_path / "adapter", FP32)
    with torch.no_grad():
        torch.testing.assert_close(head.nll_sum(loaded, batch), expected, rtol=1e-5, atol=0)
        wanted = plain(input_ids=torch.tensor(ROWS[1].ids)[None]).logits[0, -len(ROWS[1].ids) :]
        whole = make_batch([Tokens(ROWS[1].ids, (True,) * 19, ROWS[1].spans, ROWS[1].origin)])
        torch.testing.assert_close(head.own_logits(loaded, whole), wanted[:-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "prompt", "prefix"])
def test_generation_is_pefts_own(base, tiny_tokenizer, tmp_path, kind):
    """Prompts of different length in one batch and with a cache, against peft's forward of each prompt as it grows.
    (peft 0.21's own `generate` on transformers 5.24 does not give what its forward gives.)"""
    save.save(learned(base, tiny_tokenizer, kind), tiny_tokenizer, tmp_path / "adapter")
    engine = TorchEngine(load.load_model(tmp_path / "adapter", FP32), tiny_tokenizer, stop_ids=[2])
    prompts = [list(one.ids) for one in ROWS]
    found = engine.generate(prompts, max_new_tokens=12)
    plain = in_plain_peft(base, tmp_path / "adapter")
    for prompt, answer in zip(prompts, found, strict=True):
        wanted: list[int] = []
        while len(wanted) < 12 and 2 not in wanted:
            with torch.no_grad():
                wanted.append(int(plain(input_ids=torch.tensor([prompt + wanted])).logits[0, -1].argmax()))
        assert list(answer.ids) == [token for token in wanted if token != 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_yet_but_for_virtual_tokens(base, tiny_tokenizer, kind):
    batch = make_batch(ROWS)
    plain = load.load_model(base, FP32)
    with torch.no_grad():
        before = head.nll_sum(plain, batch)
        model = adapters.add(load.load_model(base, FP32), AdapterSection(**KINDS[kind]), 1, tiny_tokenizer)
        if kind in VIRTUAL:
            assert abs(head.nll_sum(model, batch) - before) > 1e-3
            with virtual.switched_off(model):
                assert torch.equal(head.nll_sum(model, batch), before)
        else:
            torch.testing.assert_close(head.nll_sum(model, batch), before, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora", "prompt", "prefix", "pissa"])
def test_the_same_seed_begins_alike(tiny_model_folder, tiny_tokenizer, kind):
    def begun(seed):
        model = adapters.add(
            load.load_model(tiny_model_folder, FP32), AdapterSection(**KINDS[kind]), seed, tiny_tokenizer
        )
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(begun(1), begun(1))
    if kind != "pissa":
        assert not torch.equal(begun(1), begun(2))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_virtual_tokens_before_branches(tiny_model_folder, tiny_tokenizer, kind, checkpointing):
    """A prompt with two answers in one row: the sums and gradients of two whole rows."""
    from dataclasses import replace

    from tunelet.models import sequences

    prompt, first, second = row(9, 1).ids, row(6, 2).ids, row(11, 3).ids
    whole = [
        Tokens(prompt + answer, (False,) * 9 + (True,) * len(answer), ((0, 9 + len(answer), "text"),), Origin("x", 1))
        for answer in (first, second)
    ]
    both = replace(
        whole[0],
        ids=prompt + first + second,
        mask=(False,) * 9 + (True,) * 17,
        spans=((0, 26, "text"),),
        branches=(9, 15),
        reference=(0.0, 0.0),
    )
    model = make_ready(learned(tiny_model_folder, tiny_tokenizer, kind), checkpointing=checkpointing).train()
    (weight,) = [p for p in model.parameters() if p.requires_grad]
    told = []
    for rows in (whole + ROWS[:1], [both, *ROWS[:1]]):
        weight.grad = None
        sums, counts = sequences.logprobs(model, make_batch(rows))
        (sums[0] - 2 * sums[1]).backward()
        told.append((sums.detach(), counts, weight.grad.clone()))
    for apart, together in zip(*told, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_virtual_tokens_where_rows_run_one_by_one(tiny_model_folder, tiny_tokenizer, monkeypatch):
    model = learned(tiny_model_folder, tiny_tokenizer, "prompt")
    batch = make_batch(ROWS)
    with torch.no_grad():
        packed = head.nll_sum(model, batch), head.own_logits(model, batch)
        monkeypatch.setattr(head, "packs", lambda model: False)
        torch.testing.assert_close((head.nll_sum(model, batch), head.own_logits(model, batch)), packed)
    with pytest.raises(TuneletError, match="prefix does not go"):
        adapters.add(load.load_model(tiny_model_folder, FP32), AdapterSection(kind="prefix"))


def test_virtual_tokens_leave_less_room(tiny_model_folder, tiny_tokenizer):
    model = learned(tiny_model_folder, tiny_tokenizer, "prompt")
    engine = TorchEngine(model, tiny_tokenizer)
    assert engine.max_length == 512 - 5
    with pytest.raises(TuneletError, match="at most 507"):
        engine.generate([[5] * 507], max_new_tokens=1)
    assert engine.generate([[5] * 500], max_new_tokens=50)[0].finish in ("context", "stop")


def test_virtual_tokens_begin_where_it_is_said(tiny_model_folder, tiny_tokenizer):
    base = load.load_model(tiny_model_folder, FP32)
    table = base.get_input_embeddings().weight.detach()

    def begun(**section):
        model = adapters.add(load.load_model(tiny_model_folder, FP32), AdapterSection(**section), 0, tiny_tokenizer)
        return virtual.of(head.causal_lm(model)).weight.detach()

    ids = tiny_tokenizer("Turn on", add_special_tokens=False)["input_ids"]
    text = begun(kind="prompt", num_virtual_tokens=7, init_text="Turn on")
    assert torch.equal(text, table[torch.tensor((ids * 7)[:7])])
    words = begun(kind="prompt", num_virtual_tokens=7)
    assert all(any(torch.equal(one, entry) for entry in table) for one in words)
    random = begun(kind="prompt", num_virtual_tokens=7, init="random")
    assert not any(torch.equal(random[0], entry) for entry in table)
    assert 0.3 < float(random.std() / table.std()) < 3
    # a prefix that begins as text is what a prompt of that text makes of itself
    batch = make_batch(ROWS)
    told = []
    for kind in ("prompt", "prefix"):
        section = AdapterSection(kind=kind, num_virtual_tokens=len(ids), init_text="Turn on")
        model = adapters.add(load.load_model(tiny_model_folder, FP32), section, 0, tiny_tokenizer)
        with torch.no_grad():
            told.append(head.nll_sum(model, batch))
    torch.testing.assert_close(*told)


def test_olora_and_pissa_take_their_part_out_of_the_weights(tiny_model_folder):
    for init in ("olora", "pissa"):
        before = load.load_model(tiny_model_folder, FP32).model.layers[0].mlp.up_proj.weight.detach().clone()
        section = AdapterSection(kind="lora", rank=4, alpha=6.0, init=init)
        model = adapters.add(load.load_model(tiny_model_folder, FP32), section)
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        part = 1.5 * b @ a
        torch.testing.assert_close(layer.base_layer.weight + part, before, atol=1e-5, rtol=1e-5)
        if init == "pissa":  # the best approximation of rank 4
            left = torch.linalg.svdvals(before)[4:].norm()
            assert layer.base_layer.weight.norm() <= 1.01 * left
        else:
            torch.testing.assert_close(b.t() @ b, torch.eye(4), atol=1e-5, rtol=0)


def test_a_rank_above_the_smaller_side_of_a_weight(tiny_model_folder, tiny_tokenizer, tmp_path):
    for init in ("olora", "pissa"):
        section = AdapterSection(kind="lora", rank=40, init=init)
        model = adapters.add(load.load_model(tiny_model_folder, FP32), section)
        with torch.no_grad():
            found = head.nll_sum(model, make_batch(ROWS))
            expected = head.nll_sum(load.load_model(tiny_model_folder, FP32), make_batch(ROWS))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["prompt", "prefix", "dora", "ia3"])
def test_training_goes_on_with_an_adapter(tiny_model_folder, tiny_tokenizer, tmp_path, kind):
    save.save(learned(tiny_model_folder, tiny_tokenizer, kind), tiny_tokenizer, tmp_path / "adapter")
    model = load.load_model(tmp_path / "adapter", FP32, trainable=True)
    adapters.check_same(model.peft_config["default"], AdapterSection(**KINDS[kind]), "it")
    head.nll_sum(model, make_batch(ROWS)).backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    with pytest.raises(TuneletError, match=f"adapter.kind = {kind}|not the one"):
        adapters.check_same(model.peft_config["default"], AdapterSection(kind="lora", rank=8), "it")
    frozen = load.load_model(tmp_path / "adapter", FP32)
    assert not any(p.requires_grad for name, p in frozen.named_parameters() if "prompt" in name or "lora_" in name)


def test_bf16_adapters_are_pefts_within_rounding(tiny_model_folder, tiny_tokenizer, tmp_path):
    batch = make_batch(ROWS)
    for kind in KINDS:
        model = learned(tiny_model_folder, tiny_tokenizer, kind, Choice("cpu", "bfloat16", 1))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}, kind
        save.save(model, tiny_tokenizer, tmp_path / kind)
        with torch.no_grad():
            found, exact = head.nll_sum(model, batch), head.nll_sum(load.load_model(tmp_path / kind, FP32), batch)
        assert abs(found - exact) < 0.01 * exact, kind


# -- whose base it is -------------------------------------------------------------------------------------------------


def test_an_adapter_knows_its_base(tiny_model_folder, tiny_tokenizer, tmp_path):
    save.save(learned(tiny_model_folder, tiny_tokenizer, "lora"), tiny_tokenizer, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())

    def on(folder):
        text = json.dumps(config | {"base_model_name_or_path": str(folder)})
        (tmp_path / "adapter" / "adapter_config.json").write_text(text)
        return load.load_model(tmp_path / "adapter", FP32)

    model = load.load_model(tiny_model_folder, FP32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(0.01)
    save.save(model, tiny_tokenizer, tmp_path / "tuned")
    with pytest.raises(TuneletError, match="another base") as caught:
        on(tmp_path / "tuned")
    assert "weights are not those" in caught.value.why
    with pytest.raises(TuneletError, match="another base") as caught:
        on(made("qwen3", tmp_path / "qwen", tiny_tokenizer))
    assert "instead of" in caught.value.why or "weights" in caught.value.why
    save.save(load.load_model(tiny_model_folder, FP32), tiny_tokenizer, tmp_path / "copy")
    on(tmp_path / "copy")  # the same weights somewhere else
    (tmp_path / "adapter" / "base.json").unlink()  # as peft makes them
    on(tmp_path / "tuned")


def test_an_adapter_of_another_shape_says_which_layer(tiny_model_folder, tiny_tokenizer, tmp_path):
    for kind in ("lora", "prompt", "ia3"):
        folder = tmp_path / kind
        save.save(learned(tiny_model_folder, tiny_tokenizer, kind), tiny_tokenizer, folder)
        (folder / "base.json").unlink()
        from transformers import LlamaConfig, LlamaForCausalLM

        other = LlamaConfig(
            vocab_size=400, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        save.save(LlamaForCausalLM(other), tiny_tokenizer, tmp_path / "other")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": str(tmp_path / "other")})
        )
        with pytest.raises(TuneletError, match="does not fit") as caught:
            load.load_model(folder, FP32)
        assert "size mismatch" in caught.value.why


def test_a_model_without_known_layers_for_ia3_names_its_own(tmp_path, tiny_tokenizer):
    model = load.load_model(made("llama", tmp_path, tiny_tokenizer), FP32)
    model.config.model_type = "something_new"
    with pytest.raises(TuneletError, match="which layers") as caught:
        adapters.add(model, AdapterSection(kind="ia3"))
    assert "down_proj" in caught.value.why


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_what_is_trained_is_told(tiny_model_folder, quantization):
    section = AdapterSection(kind="lora", rank=2)
    model = adapters.add(load.load_model(tiny_model_folder, FP32, quantization=quantization), section)
    told = adapters.described(model, section)
    plain = load.load_model(tiny_model_folder, FP32)
    assert told["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert told["parameters"] - told["trained"] == sum(p.numel() for p in plain.parameters())
    assert f"{told['trained']:,}" in adapters.line(told) and "rank 2" in adapters.line(told)

"""What a model name means, and every fault of a folder said clearly before anything is computed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunelet.errors import TuneletError
from tunelet.models import load, save, weights
from tunelet.models.device import Choice

SRC = str(Path(load.__file__).parents[2])
FP32, BF16 = Choice("cpu", "float32", 1), Choice("cpu", "bfloat16", 1)


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_loads_in_the_chosen_dtype_with_our_attention(folder):
    model = load.load_model(folder, BF16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config._attn_implementation == "tunelet"


def test_saved_and_loaded_in_plain_transformers(folder, tiny_tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert weights.stored_dtype(folder) == "float32"
    model = load.load_model(folder, BF16)
    save.save(model, tiny_tokenizer, tmp_path / "out", "bfloat16")
    assert weights.stored_dtype(tmp_path / "out") == "bfloat16"
    assert weights.count_parameters(tmp_path / "out") == sum(p.numel() for p in model.parameters())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "tunelet" not in json.dumps(config) and config["dtype"] == "bfloat16"
    assert (
        json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
        == tiny_tokenizer.eos_token_id
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert tokenizer("Turn on")["input_ids"] == tiny_tokenizer("Turn on")["input_ids"]
    assert not {"is_local", "local_files_only"} & set(
        json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    )


def no_config(folder):
    (folder / "config.json").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def not_a_number(folder):
    change(folder, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[5].fill_(float("nan")))


def missing_key(folder):
    change(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def other_shape(folder):
    change(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))


def shard_missing(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})
    )


def bad_config(folder):
    (folder / "config.json").write_text("{ this is not json")


def not_causal(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))


@pytest.mark.parametrize(
    "fault,said",
    [
        (no_config, "config.json"),
        (no_weights, "no weights"),
        (pickle, "pickle"),
        (cut_short, "damaged"),
        (pointer, "git-lfs"),
        (not_a_number, "model.layers.0.mlp.up_proj.weight"),
        (missing_key, "model.layers.1.mlp.up_proj.weight"),
        (other_shape, "model.norm.weight"),
        (shard_missing, "model-00001-of-00002"),
        (bad_config, "config.json"),
        (not_causal, "causal"),
    ],
)
def test_a_fault_of_the_folder_is_named(folder, fault, said):
    fault(folder)
    with pytest.raises(TuneletError) as caught:
        load.load_model(folder, FP32)
    assert said in str(caught.value)
    assert caught.value.fix and str(folder) in str(caught.value)


def test_a_pickle_is_never_opened(folder):
    """The classic attack: a pickle that runs a command when it is loaded."""
    (folder / "model.safetensors").unlink()

    class Attack:
        def __reduce__(self):
            return (open, (str(folder / "owned"), "w"))

    torch.save(Attack(), folder / "pytorch_model.bin")
    with pytest.raises(TuneletError, match="pickle"):
        load.load_model(folder, FP32)
    assert not (folder / "owned").exists()


def test_a_vocabulary_smaller_than_the_tokenizer(folder, tiny_tokenizer):
    model = load.load_model(folder, FP32)
    load.check_tokenizer(model, tiny_tokenizer, "it")
    model.resize_token_embeddings(len(tiny_tokenizer) - 3)
    with pytest.raises(TuneletError, match=f"{len(tiny_tokenizer)} entries, its model only {len(tiny_tokenizer) - 3}"):
        load.check_tokenizer(model, tiny_tokenizer, "it")


def test_names(tmp_path, folder, monkeypatch):
    for name, said in (
        ("", "empty"),
        ("no such model", "no such folder"),
        (str(tmp_path), "no model"),
        (str(folder / "config.json"), "not a folder"),
    ):
        with pytest.raises(TuneletError, match=said):
            load.resolve(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TuneletError, match="no model 'some-org/some-model'") as caught:
        load.resolve("some-org/some-model")
    assert "HF_HUB_OFFLINE" in caught.value.why
    # an existing path is a folder, never a hub name
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some-org").mkdir()
    shutil.copytree(folder, tmp_path / "some-org" / "some-model")
    assert load.resolve("some-org/some-model").samefile(tmp_path / "some-org" / "some-model")


def test_a_new_model_is_a_function_of_the_seed():
    shape = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "intermediate_size": 64,
        "num_attention_heads": 2,
    }
    ids = {"bos": None, "eos": 0, "pad": 0}
    a, b, c = (load.new_model(shape, 100, ids, seed, FP32) for seed in (1, 1, 2))
    assert torch.equal(a.model.embed_tokens.weight, b.model.embed_tokens.weight)
    assert not torch.equal(a.model.embed_tokens.weight, c.model.embed_tokens.weight)
    assert a.config.vocab_size == 100 and a.generation_config.eos_token_id == 0
    assert load.new_model(shape, 100, ids, 1).device.type == "meta"
    with pytest.raises(TuneletError, match=r"lama.*Did you mean"):
        load.new_model({"model_type": "lama"}, 100, ids, 0, FP32)
    with pytest.raises(TuneletError, match="architecture"):
        load.new_model({**shape, "num_attention_heads": 5}, 100, ids, 0, FP32)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("choice", [FP32, BF16])
def test_every_stored_dtype_loads_as_plain_transformers_loads_it(tiny_model, stored, choice, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_model.to(getattr(torch, stored)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(weights.files(tmp_path)) > 2
    ours = load.load_model(tmp_path, choice)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, choice.dtype))
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), ours.state_dict().values(), strict=True))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.name_or_path == str(tmp_path)
    assert ours.generation_config.to_dict() == plain.generation_config.to_dict()
    mine, theirs = ({**m.config.to_dict(), "_name_or_path": ""} for m in (ours, plain))
    assert mine == theirs


def test_training_does_not_write_to_the_files_it_came_from(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = load.load_model(folder, FP32)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_file_that_shrinks_while_it_is_read(folder):
    from tunelet.models.weights import tensors

    found = tensors(folder, "bfloat16", mapped=True)["model.norm.weight"]
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(OSError, match="too early"):
        found[...]


PEAK = """
import sys, torch, transformers
from transformers import LlamaForCausalLM
from tunelet.models import adapters, device, load
from tunelet.recipe import AdapterSection

def kilobytes(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

choice = device.Choice("cpu", sys.argv[2], 1)
device.apply(choice)
load.load_model(sys.argv[4], choice, quantization=sys.argv[3])  # what is imported and built once
before = kilobytes("VmRSS")
model = load.load_model(sys.argv[1], choice, quantization=sys.argv[3])
adapters.add(model, AdapterSection(kind="lora", rank=2))
print((kilobytes("VmHWM") - before) / 1e3)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_holds_one_copy(tiny_model_folder, tmp_path):
    """29M parameters stored in bf16. transformers alone takes 176 MB in float32: the mapped file beside its copy.

    int8 takes 31 MB, 90 with the bf16 weights beside it. Passing tensors are mapped one by one, so that what is
    measured is what is held: in the heap their leftovers differ by 25 MB from run to run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    big = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=6, vocab_size=4000, num_attention_heads=8
    )
    model = LlamaForCausalLM(big).bfloat16()
    model.save_pretrained(tmp_path)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert 25 < millions < 35
    settings = {"PYTHONPATH": SRC, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    for dtype, quantization, most in (("float32", "none", 4), ("bfloat16", "none", 2), ("bfloat16", "int8", 1.6)):
        command = [sys.executable, "-c", PEAK, str(tmp_path), dtype, quantization, str(tiny_model_folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | settings)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout.split()[-1]) < most * millions + 25, (dtype, quantization, done.stdout)

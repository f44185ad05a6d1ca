"""Exports to GGUF: every architecture passes its gate, planted faults are refused, `ready` knows a stale file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from tunelet.errors import GateError, TuneletError  # noqa: E402
from tunelet.infer import gguf_export, gguf_file, gguf_gate, gguf_model, gguf_tokenizer  # noqa: E402
from tunelet.models import save  # noqa: E402

pytestmark = pytest.mark.usefixtures("loopback")
SRC = Path(gguf_export.__file__).parents[2]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # so that a fault shows in what the model says
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
TEXTS = [
    "Turn on the light in the kitchen at 18:00, please. The bedroom fan is off.",
    "오후 7시 15분에 침실 불을 30퍼센트로 해 주세요. 거실 선풍기가 켜져 있습니다.",
    "What is 12 + 30? It is 42. def f(x): return x ** 2",
    "2026 1234 1234 2026 12 12 34 34 123 123",
]


def byte_level(cut, normalizer=None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 500 entries that cuts text by `cut`, with ChatML's tokens and one added word."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizer
    core.pre_tokenizer = cut
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.add_tokens(["smarthome"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def by_regex(regex: str):
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece() -> PreTrainedTokenizerFast:
    """Gemma's kind: BPE over characters, spaces as ▁, what is unknown as bytes, <bos> in front."""
    from tokenizers import processors

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    trained.train_from_iterator(TEXTS, trainer)
    told = json.loads(trained.to_str())["model"]
    vocab = {token: n for n, token in enumerate(special)}
    vocab |= {f"<0x{byte:02X}>": len(special) + byte for byte in range(256)}
    for token in sorted(told["vocab"], key=told["vocab"].get):
        vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in told["merges"]]
    core = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])])
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": special[4:]})
    tokenizer.chat_template = GEMMA
    return tokenizer


SMOLLM = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
TOKENIZERS = {
    "smollm": lambda: byte_level(SMOLLM),
    "qwen2": lambda: byte_level(by_regex(gguf_tokenizer.QWEN2), normalizers.NFC()),
    "llama3": lambda: byte_level(by_regex(gguf_tokenizer.LLAMA3)),
    "gemma": sentencepiece,
}
MODELS = {  # name -> (tokenizer, configuration)
    "llama": ("smollm", lambda **kw: transformers.LlamaConfig(**SHAPE, **kw)),
    "llama-untied": ("llama3", lambda **kw: transformers.LlamaConfig(**SHAPE, **kw | {"tie_word_embeddings": False})),
    "llama3-rope": ("llama3", lambda **kw: transformers.LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE, **kw)),
    "qwen2": ("qwen2", lambda **kw: transformers.Qwen2Config(**SHAPE, **kw | {"tie_word_embeddings": False})),
    "qwen3": ("qwen2", lambda **kw: transformers.Qwen3Config(**SHAPE, **kw)),
    "gemma3": (
        "gemma",
        lambda **kw: transformers.Gemma3TextConfig(
            **SHAPE | {"num_hidden_layers": 7}, query_pre_attn_scalar=16, sliding_window=32, **kw
        ),
    ),
}


def make(folder: Path, name: str, dtype: str = "float32", padded: int = 0) -> Path:
    """A model with made-up weights; `padded`: rows of embeddings beyond the tokenizer's entries."""
    kind, config = MODELS[name]
    tokenizer = TOKENIZERS[kind]()
    torch.manual_seed(0)
    ids = {f"{one}_token_id": getattr(tokenizer, f"{one}_token_id") for one in ("bos", "eos", "pad")}
    model = AutoModelForCausalLM.from_config(
        config(**{"vocab_size": len(tokenizer) + padded, "tie_word_embeddings": True, **ids})
    )
    for key, parameter in model.named_parameters():
        if key.endswith("norm.weight") or key.endswith(".bias"):  # they begin as ones and zeros, which hide a lost one
            parameter.data += 0.2 * torch.randn_like(parameter)
    save.save(model, tokenizer, folder, dtype)
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few rows: enough to see every fault here."""
    monkeypatch.setattr(gguf_gate, "POSITIONS", (60, 60))
    monkeypatch.setattr(gguf_gate, "NEW_TOKENS", (4, 4))
    monkeypatch.setattr("tunelet.infer.gguf_rows.ROWS", 6)
    monkeypatch.setattr("tunelet.infer.gguf_rows.CUT", 128)


# What comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_says_the_same(tmp_path, name):
    folder = make(tmp_path / "model", name, padded=13)
    for quant, bound in (("f16", 0.02), ("q8_0", 0.1)):
        made = gguf_export.export(folder, tmp_path / quant, quant)
        figures = made.parity["figures"]
        assert figures["mean_delta_logprob"] <= bound and figures["positions"] >= 50
        assert sorted(path.name for path in (tmp_path / quant).iterdir()) == sorted([made.file.name, "parity.json"])
    assert json.loads((tmp_path / "q8_0" / "parity.json").read_text()) == made.parity
    names = {tensor.name for tensor in gguf.GGUFReader(made.file).tensors}
    assert ("output.weight" in names) == (name in ("llama-untied", "qwen2"))


def test_trained_models_pass(tmp_path, shared):
    stories = shared / "weights-stories260K" / "hf"
    for path, quants in (("starter", ("f32", "q4_0")), (stories, ("bf16", "q4_0"))):
        for quant in quants:
            made = gguf_export.export(path, tmp_path / f"{Path(path).name}-{quant}", quant)
            assert made.parity["figures"]["mean_delta_logprob"] <= (1.0 if quant == "q4_0" else 0.02)


def test_quants_are_those_of_the_writer():
    assert set(gguf_export.QUANTS) == set(gguf_file.QUANTS) == set(gguf_gate.BOUNDS)


# Faults ------------------------------------------------------------------------------------------------------------


def wrong(method: str, change):
    """A fault: a GGUFWriter method that gets `change` of its argument; None: that is never called."""

    def plant(monkeypatch):
        real = getattr(gguf.GGUFWriter, method)

        def faulty(self, value, *args, **kw):
            changed = change(value)
            return None if changed is None else real(self, changed, *args, **kw)

        monkeypatch.setattr(gguf.GGUFWriter, method, faulty)

    return plant


def unpermuted(monkeypatch):
    monkeypatch.setitem(gguf_model.SHAPES, "llama", gguf_model.Shape("llama"))


def scaled_head(monkeypatch):
    real = gguf_file.weights_of
    calls = []

    def faulty(folder):
        found = real(folder)
        calls.append(folder)
        if len(calls) == 1:  # what is written, not what it is compared with
            shape, read = found["model.embed_tokens.weight"]
            found["model.embed_tokens.weight"] = (shape, lambda: read() * 1.001)
        return found

    monkeypatch.setattr(gguf_file, "weights_of", faulty)


def swapped(tokens):
    return [tokens[0], tokens[2], tokens[1], *tokens[3:]]


FAULTS = {
    "rope base": (wrong("add_rope_freq_base", lambda base: base * 10), "rope.freq_base"),
    "norm eps": (wrong("add_layer_norm_rms_eps", lambda eps: eps * 10), "epsilon"),
    "no template": (wrong("add_chat_template", lambda template: None), "no chat template"),
    "another template": (wrong("add_chat_template", lambda text: text.replace("\n", " ")), "another chat template"),
    "q and k not permuted": (unpermuted, "log-probability"),
    "head": (scaled_head, "token_embd.weight"),
    "merges": (wrong("add_token_merges", lambda merges: merges[:40]), "other tokens"),
    "swapped tokens": (wrong("add_token_list", swapped), "other tokens"),
    "eos": (wrong("add_eos_token_id", lambda id_: 5), "eos token"),
    "special as text": (wrong("add_token_types", lambda types: [1] * len(types)), "other tokens"),
    "another cut": (wrong("add_tokenizer_pre", lambda name: "smollm"), "other tokens"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_and_leaves_nothing(tmp_path, monkeypatch, name):
    plant, words = FAULTS[name]
    folder = make(tmp_path / "model", "llama-untied" if name == "another cut" else "llama")
    plant(monkeypatch)
    with pytest.raises(GateError) as caught:
        gguf_export.export(folder, tmp_path / "out", "f16")
    assert words in caught.value.why and caught.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_head_of_its_own_that_is_lost(tmp_path, monkeypatch):
    """An untied head that is left out: llama.cpp would take the embeddings for it, and say nothing."""
    folder = make(tmp_path / "model", "llama-untied")
    real = gguf_model.tensors
    first = []

    def faulty(config, weights):
        first.append(1)
        return [one for one in real(config, weights) if len(first) > 1 or one.place != "output.weight"]

    monkeypatch.setattr(gguf_model, "tensors", faulty)
    with pytest.raises(GateError, match="does not say") as caught:
        gguf_export.export(folder, tmp_path / "out", "f16")
    assert "output.weight" in caught.value.why and "log-probability" in caught.value.why


def test_a_run_without_stop_at_the_templates_end(tmp_path, monkeypatch):
    folder = make(tmp_path / "model", "gemma3")  # answers end at <end_of_turn>, which is not its eos
    wrong("add_eot_token_id", lambda id_: None)(monkeypatch)
    wrong("add_token_list", lambda tokens: [token.replace("<end_of", "<End_of") for token in tokens])(monkeypatch)
    with pytest.raises(GateError) as caught:
        gguf_export.export(folder, tmp_path / "out", "f16")
    assert "answers end at token" in caught.value.why


# Not supported -----------------------------------------------------------------------------------------------------


def test_what_llama_cpp_does_not_know_is_said(tmp_path, tiny_tokenizer):
    configs = {
        "gpt2": transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=64, vocab_size=len(tiny_tokenizer)),
        "biases": transformers.LlamaConfig(**SHAPE, vocab_size=len(tiny_tokenizer), attention_bias=True),
        "yarn": transformers.LlamaConfig(
            **SHAPE,
            vocab_size=len(tiny_tokenizer),
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        ),
    }
    words = {"gpt2": "gpt2", "biases": "biases", "yarn": "dynamic"}
    for name, config in configs.items():
        save.save(AutoModelForCausalLM.from_config(config), tiny_tokenizer, tmp_path / name, "float32")
        with pytest.raises(TuneletError, match="can't become a GGUF") as caught:
            gguf_export.export(tmp_path / name, tmp_path / "out")
        assert caught.value.exit_code == 2 and words[name] in caught.value.why
    assert not (tmp_path / "out").exists()


def test_an_unknown_way_to_cut_text(tmp_path):
    folder = make(tmp_path / "model", "llama", padded=100)
    cut = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    byte_level(cut).save_pretrained(folder)
    with pytest.raises(TuneletError, match="tokenizer can't be written") as caught:
        gguf_export.export(folder, tmp_path / "out")
    assert "Punctuation" in caught.value.why


def test_out_that_is_taken_and_quants_that_are_none(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(TuneletError, match="there already"):
        gguf_export.export("starter", tmp_path / "full")
    with pytest.raises(TuneletError, match="Did you mean 'q8_0'"):
        gguf_export.export("starter", tmp_path / "out", "q8")


# ready -------------------------------------------------------------------------------------------------------------


def test_ready_makes_it_once_and_again_when_stale(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make(tmp_path / "model", "llama")
    made = gguf_export.ready(folder)
    assert made.fresh and tmp_path / "cache" / "tunelet" / "gguf" in made.file.parents
    again = gguf_export.ready(folder)
    assert not again.fresh and again.file == made.file and again.parity == made.parity
    os.utime(made.file)  # touched, and the same
    assert not gguf_export.ready(folder).fresh
    with made.file.open("r+b") as file:  # one byte of a tensor, size unchanged
        file.seek(-100, 2)
        byte = file.read(1)
        file.seek(-100, 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(made.file)
    assert gguf_export.ready(folder).fresh
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 256}))
    other = gguf_export.ready(folder)
    assert other.fresh and other.file != made.file


def test_ready_is_cheap(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gguf_export.ready("starter")
    code = "import sys; from tunelet.infer import gguf_export; assert not gguf_export.ready('starter').fresh\n"
    code += "print(*[m for m in ('torch', 'transformers', 'gguf', 'xllamacpp', 'numpy') if m in sys.modules])"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SRC)}
    )
    assert (told.returncode, told.stdout.split()) == (0, []), told.stderr


def test_a_kill_leaves_the_old_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = gguf_export.ready("starter")
    made.file.with_name("parity.json").write_text("{")
    (made.file.parent.with_name(".tmp-q8_0")).mkdir()
    assert gguf_export.ready("starter").fresh
    assert sorted(path.name for path in made.file.parents[1].iterdir()) == [".lock", "q8_0"]

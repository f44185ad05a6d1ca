"""Merging an adapter into its base: every kind and several architectures, what is left after an error, and the verb."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunelet import cli, starter
from tunelet.data.render import Renderer, load_tokenizer
from tunelet.errors import GateError, TuneletError
from tunelet.infer import export, merge_gate
from tunelet.infer.engine import TorchEngine
from tunelet.models import adapters, load, save, weights
from tunelet.models.device import Choice
from tunelet.recipe import AdapterSection, Recipe
from tunelet.runs.record import Run

FP32 = Choice("cpu", "float32", 1)
SRC = Path(export.__file__).parents[2]
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # so that what an adapter changes shows in what the model says
}
CONFIGS = {
    "llama": lambda **kw: transformers.LlamaConfig(**SHAPE, **kw),
    "qwen3": lambda **kw: transformers.Qwen3Config(**SHAPE, **kw),
    "gemma3": lambda **kw: transformers.Gemma3TextConfig(**SHAPE, **kw),
    "gpt2": lambda **kw: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2, **kw
    ),
}
KINDS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "rslora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM"),
    "dora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "head": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
}


def make_base(folder: Path, tokenizer, kind: str = "llama", dtype: str = "float32", tied: bool = True) -> Path:
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = CONFIGS[kind](vocab_size=len(tokenizer), tie_word_embeddings=tied, **ids)
    save.save(AutoModelForCausalLM.from_config(config), tokenizer, folder, dtype)
    return folder


def make_adapter(base: Path, folder: Path, kind: str = "lora", tokenizer=None) -> Path:
    """By plain peft, its numbers drawn at random; with the tokenizer's files where one is given."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), KINDS[kind]())
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p) if "magnitude" not in name else 0.05 * torch.rand_like(p)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tied(tmp_path, tiny_tokenizer) -> Path:
    return make_base(tmp_path / "base", tiny_tokenizer)


@pytest.fixture
def lora(tmp_path, tied, tiny_tokenizer) -> Path:
    return make_adapter(tied, tmp_path / "adapter", tokenizer=tiny_tokenizer)


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("base", "adapter"))


# What comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "architecture", "stored", "asked", "is_tied"),
    [
        ("lora", "llama", "float32", "auto", True),
        ("lora", "llama", "bfloat16", "auto", False),
        ("rslora", "llama", "bfloat16", "float32", True),
        ("dora", "llama", "float32", "float16", True),
        ("dora", "llama", "bfloat16", "auto", False),
        ("ia3", "llama", "bfloat16", "auto", True),
        ("lora", "qwen3", "bfloat16", "auto", False),
        ("dora", "qwen3", "float32", "auto", True),
        ("lora", "gemma3", "bfloat16", "auto", True),
        ("lora", "gpt2", "float32", "bfloat16", True),
        ("rslora", "gpt2", "float32", "auto", True),
    ],
)
def test_the_merged_folder_is_the_adapter_on_its_base(
    tmp_path, tiny_tokenizer, kind, architecture, stored, asked, is_tied
):
    base = make_base(tmp_path / "base", tiny_tokenizer, architecture, stored, is_tied)
    adapter = make_adapter(base, tmp_path / "adapter", kind)
    before = {path: path.read_bytes() for folder in (base, adapter) for path in folder.iterdir()}
    merged = export.merge(adapter, tmp_path / "out", dtype=asked)
    dtype = stored if asked == "auto" else asked
    assert (merged.source.kind, merged.dtype, weights.stored_dtype(tmp_path / "out")) == (kind, dtype, dtype)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(plain.dtype) == f"torch.{dtype}" and plain.config.tie_word_embeddings is is_tied
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) is is_tied
    unmerged = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    ids = torch.randint(4, 400, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = unmerged.eval()(ids).logits
        found = plain.float().eval()(ids).logits
        with unmerged.disable_adapter():
            without = unmerged(ids).logits
    room = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.15}[dtype]
    assert float((wanted - found).abs().max()) <= room * float(wanted.abs().max())
    assert float((wanted - without).abs().mean()) > 5 * float((wanted - found).abs().mean())
    figures = merged.figures
    assert figures["positions"] >= 1000 and figures["storing"]["max_delta_logprob"] <= 1e-4
    assert figures["merging"]["max_delta_logprob"] <= 1e-3
    assert {path: path.read_bytes() for path in before} == before, "nothing is written to base or adapter"
    assert left_over(tmp_path) == ["out"]


def test_added_tokens_and_the_adapters_own_template_come_along(tmp_path, tiny_tokenizer, tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.add_tokens(["<tool>", "</tool>"], special_tokens=True)
    tokenizer.add_tokens(["불빛"])
    base = make_base(tmp_path / "base", tokenizer)
    (base / "chat_template.jinja").unlink()
    adapter = make_adapter(base, tmp_path / "adapter", tokenizer=tokenizer)
    export.merge(adapter, tmp_path / "out")
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.get_added_vocab() == tokenizer.get_added_vocab() and len(found) == len(tokenizer)
    assert found.chat_template == tokenizer.chat_template
    assert found("<tool>불빛</tool>")["input_ids"] == [len(found) - 3, len(found) - 1, len(found) - 2]


def test_it_stops_where_the_base_and_the_template_stop(tmp_path, tied, tiny_tokenizer):
    settings = json.loads((tied / "generation_config.json").read_text())
    (tied / "generation_config.json").write_text(
        json.dumps({**settings, "eos_token_id": 0, "do_sample": True, "top_k": 7})
    )
    export.merge(make_adapter(tied, tmp_path / "adapter"), tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert set(kept["eos_token_id"]) == {0, tiny_tokenizer.eos_token_id} and kept["top_k"] == 7


def test_settings_that_transformers_loads_and_does_not_save(tmp_path, tied, lora):
    settings = json.loads((tied / "generation_config.json").read_text())
    (tied / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.6}))
    export.merge(lora, tmp_path / "out")
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (kept["temperature"], kept["do_sample"]) == (0.6, True)


def test_an_adapter_of_the_head_unties_a_tied_model(tmp_path, tied):
    export.merge(make_adapter(tied, tmp_path / "adapter", "head"), tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(tied)
    assert not plain.config.tie_word_embeddings
    assert torch.equal(plain.get_input_embeddings().weight, before.get_input_embeddings().weight)
    assert not torch.equal(plain.get_output_embeddings().weight, before.get_output_embeddings().weight)


def test_merged_answers_as_the_adapter_does(tmp_path):
    tokenizer = load_tokenizer(starter.BASE)
    model = adapters.add(load.load_model(starter.BASE, FP32), AdapterSection(kind="lora", rank=4))
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.02)
    save.save(model, tokenizer, tmp_path / "adapter")
    export.merge(tmp_path / "adapter", tmp_path / "out", dtype="float32")
    prompts = [tokenizer(text)["input_ids"] for text in ("The kitchen", "Turn on the light", "침실 불을", "오후 7시")]
    said = []
    for folder in (tmp_path / "adapter", tmp_path / "out"):
        engine = TorchEngine(load.load_model(folder, FP32), load_tokenizer(folder))
        said.append([answer.ids for answer in engine.generate(prompts, max_new_tokens=24)])
    assert said[0] == said[1] and all(said[0])


# Bad input ---------------------------------------------------------------------------------------------------------


def test_nothing_to_merge(tmp_path, tied):
    with pytest.raises(TuneletError, match="nothing to merge") as caught:
        export.merge(tied, tmp_path / "out")
    assert caught.value.exit_code == 2 and "whole model" in caught.value.why
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tied), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(TuneletError, match="nothing to merge") as caught:
        export.merge(tmp_path / "adapter", tmp_path / "out")
    assert "prompt tuning" in caught.value.why and "beside its base" in caught.value.fix
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("where", ["adapter", "adapter/merged", "base", "base/x/y"])
def test_never_into_the_folder_of_adapter_or_base(tmp_path, lora, where):
    names = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(TuneletError, match="--out"):
        export.merge(lora, tmp_path / where)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == names


def test_out_must_be_free(tmp_path, lora):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(TuneletError, match="there already"):
            export.merge(lora, tmp_path / name)
    (tmp_path / "empty").mkdir()
    export.merge(lora, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_a_tokenizer_that_outgrows_the_model(tmp_path, lora, tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(lora)
    with pytest.raises(TuneletError, match="entries"):
        export.merge(lora, tmp_path / "out")
    assert left_over(tmp_path) == []


# Accidents ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing(tmp_path, lora, monkeypatch):
    def fails(model, tokenizer, folder, *rest, **kw):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, "save", fails)
    with pytest.raises(TuneletError, match="Cannot write") as caught:
        export.merge(lora, tmp_path / "out")
    assert "full" in caught.value.why and left_over(tmp_path) == []


def test_interrupted_leaves_nothing(tmp_path, lora, monkeypatch):
    def stopped(*args, **kw):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_gate, "check", stopped)
    with pytest.raises(KeyboardInterrupt):
        export.merge(lora, tmp_path / "out")
    assert left_over(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_before_the_gate_has_held_leaves_no_folder_and_is_swept(tmp_path, lora):
    code = (
        "import os, signal, sys; from tunelet.infer import export, merge_gate\n"
        "merge_gate.check = lambda *a, **kw: os.kill(os.getpid(), signal.SIGKILL)\n"
        "export.merge(sys.argv[1], sys.argv[2])"
    )
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    told = subprocess.run([sys.executable, "-c", code, lora, tmp_path / "out"], env=env, capture_output=True, text=True)
    assert told.returncode == -9, told.stderr
    assert left_over(tmp_path) == [".tmp-out"]
    export.merge(lora, tmp_path / "out")
    assert left_over(tmp_path) == ["out"]


# The verb ----------------------------------------------------------------------------------------------------------


def verb(capsys, *args) -> tuple[int, str, str]:
    capsys.readouterr()  # what fixtures said
    code = cli.main(["export", *map(str, args)])
    told = capsys.readouterr()
    return code, told.out, told.err


def make_run(folder: Path, base: Path, adapter: Path, data: Path, **model) -> Path:
    recipe = Recipe()
    recipe.model.path, recipe.data.train, recipe.adapter.kind = str(base), [str(data)], "lora"
    recipe.data.eval_fraction = 0.5
    for key, value in model.items():
        setattr(recipe.model, key, value)
    run = Run.create(folder, recipe)
    shutil.copytree(adapter, folder / "adapter")
    run.done()
    return folder


def test_a_run_is_compared_on_its_own_held_out_rows(tmp_path, capsys, tied, lora):
    chats = list(starter.rows("chat", "train", n=100))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    run = make_run(tmp_path / "run", tied, lora, tmp_path / "chats.jsonl")
    code, out, err = verb(capsys, run, "--merge", "--out", tmp_path / "out", "--json", tmp_path / "told.json")
    assert (code, err) == (0, "") and f"held-out rows of {run}" in out and len(out.splitlines()) <= 5
    told = json.loads((tmp_path / "told.json").read_text())
    assert told == json.loads((tmp_path / "out" / "merge.json").read_text())
    assert told["kind"] == "lora" and told["base"] == str(tied) and told["adapter"] == str(run / "adapter")
    assert told["figures"]["positions"] >= 1000 and told["versions"]["torch"] == torch.__version__
    assert told["bounds"]["merging"] == {"max_delta_logprob": 1e-3}
    for name in ("adapter/x", "model"):
        code, _, err = verb(capsys, run, "--merge", "--out", run / name)
        assert code == 2 and "folder" in err


def test_a_run_whose_data_is_gone_says_so_and_names_its_quantised_base(tmp_path, capsys, tied, lora):
    run = make_run(tmp_path / "run", tied, lora, tmp_path / "gone.jsonl", quantization="int8")
    code, out, _ = verb(capsys, run / "adapter", "--merge", "--out", tmp_path / "out")
    assert code == 0
    assert "held-out rows cannot be compared on" in out and "gone.jsonl" in out and "built-in rows" in out
    assert "int8" in out and "unquantised" in out
    told = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert "built-in" in told["rows_from"] and told["quantization"] == "int8" and told["run"] == str(run)


def test_the_verb_without_merge_says_what_it_can_do(tmp_path, capsys, lora):
    code, out, err = verb(capsys, lora, "--out", tmp_path / "out")
    assert (code, out) == (2, "") and "--merge" in err.splitlines()[-1]
    code, _, err = verb(capsys, lora, "--merge", "--out", tmp_path / "out", "--dtype", "bf16")
    assert code == 2 and "bfloat16" in err
    assert left_over(tmp_path) == []


def test_a_refusal_is_exit_code_1(tmp_path, capsys, lora, monkeypatch):
    refused = merge_gate.Checked(["it is wrong by 7"], {}, {})
    monkeypatch.setattr(merge_gate, "check", lambda *args, **kw: refused)
    code, _, err = verb(capsys, lora, "--merge", "--out", tmp_path / "out")
    assert code == GateError.exit_code == 1 and "it is wrong by 7" in err
    assert left_over(tmp_path) == []


def test_rows_without_a_template_are_texts(tmp_path, tiny_tokenizer, tiny_model_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    with_template = merge_gate.built_in_rows(tokenizer)
    tokenizer.chat_template = None
    rows = merge_gate.choose_rows(merge_gate.built_in_rows(tokenizer))
    assert with_template[0] != rows[0] and sum(len(row) - 1 for row in rows) >= 1000
    text = "".join(tokenizer.decode(row) for row in rows)
    assert any("가" <= letter <= "힣" for letter in text) and any("a" <= letter <= "z" for letter in text)
    assert Renderer(tokenizer).stop_ids == (tiny_tokenizer.eos_token_id,)

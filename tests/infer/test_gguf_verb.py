"""The verb export --to gguf, ollama and safetensors, LoRA files, and the bytes of tokens that llama.cpp holds back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from tunelet import cli, starter
from tunelet.data.render import Renderer, load_tokenizer
from tunelet.errors import TuneletError
from tunelet.infer import gguf_export, gguf_gate, gguf_ollama
from tunelet.infer.gguf_bytes import TokenBytes
from tunelet.recipe import Recipe
from tunelet.runs.record import Run

pytestmark = pytest.mark.usefixtures("loopback")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(gguf_gate, "POSITIONS", (60, 60))
    monkeypatch.setattr(gguf_gate, "NEW_TOKENS", (4, 4))
    monkeypatch.setattr("tunelet.infer.gguf_rows.ROWS", 6)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def adapter(folder: Path, config: peft.PeftConfig) -> Path:
    """On the starter, by plain peft, its numbers drawn at random."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(starter.BASE, dtype=torch.float32), config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad and "magnitude" not in name:
            p.data += 0.03 * torch.randn_like(p)
    model.save_pretrained(folder)
    return folder


def lora(**kw) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | kw)


def make_run(folder: Path, eval_rows: list[dict]) -> Path:
    recipe = Recipe()
    recipe.data.train, recipe.data.limit, recipe.eval.max_new_tokens = ["starter"], 40, 8
    recipe.eval.items = 2
    run = Run.create(folder, recipe)
    shutil.copytree(starter.BASE, folder / "model")
    run.write_jsonl("eval/after.jsonl", eval_rows)
    run.write_json("eval/after.json", {"metrics": {"stop_rate": {"value": 0.5}}})
    run.done()
    return folder


def verb(capsys, *args) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["export", *map(str, args)])
    told = capsys.readouterr()
    return code, told.out, told.err


# The verb ----------------------------------------------------------------------------------------------------------


def test_a_run_for_ollama_with_its_evaluation(tmp_path, capsys):
    rows = [
        {"item": f"held_out/{n}", "type": "held_out", "messages": [{"role": "user", "content": text}], "answer": "x"}
        for n, text in enumerate(("Is the lamp on?", "불을 켜 줘."))
    ]
    run = make_run(tmp_path / "run", rows)
    code, out, err = verb(capsys, run, "--to", "ollama", "--quant", "f16", "--json", tmp_path / "told.json")
    assert (code, err) == (0, "") and "0.0% of 2 answers are the same" in out and "stop_rate 50.0%" in out
    folder = run / "export" / "f16"
    assert sorted(path.name for path in folder.iterdir()) == ["Modelfile", "parity.json", "run-f16.gguf"]
    told = json.loads((tmp_path / "told.json").read_text())
    assert told == json.loads((folder / "parity.json").read_text())
    assert told["evaluation"]["items"] == 2 and f"held-out rows of {run}" in told["rows_from"]
    modelfile = (folder / "Modelfile").read_text()
    assert "FROM ./run-f16.gguf\n" in modelfile and 'PARAMETER stop "<|im_end|>"' in modelfile
    assert "TEMPLATE" in modelfile and "SYSTEM" not in modelfile
    code, out, _ = verb(capsys, run, "--to", "gguf", "--quant", "f16", "--no-evaluate")
    assert code == 0 and out.startswith("There already")


def test_starter_items_are_graded_again(tmp_path, capsys):
    from tunelet.evals.starter import evaluate
    from tunelet.infer.engine import TorchEngine
    from tunelet.models import load
    from tunelet.models.device import Choice

    tokenizer = load_tokenizer(starter.BASE)
    engine = TorchEngine(load.load_model("starter", Choice("cpu", "float32", 1)), tokenizer, Renderer(tokenizer))
    run = make_run(tmp_path / "run", evaluate(engine, items=2, max_new_tokens=8).items)
    code, out, _ = verb(capsys, run, "--to", "gguf", "--quant", "f16")
    assert code == 0 and "100.0% of" in out.splitlines()[-1]
    told = json.loads((run / "export" / "f16" / "parity.json").read_text())
    assert told["evaluation"]["same_answers"] == 1 and "executed_match_ko" in told["evaluation"]["metrics"]


def test_a_whole_model_as_safetensors_is_a_copy(tmp_path, capsys):
    code, out, err = verb(capsys, "starter", "--to", "safetensors", "--out", tmp_path / "out")
    assert (code, err) == (0, "") and "Copied" in out
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (starter.BASE / file).read_bytes()
    assert verb(capsys, "starter", "--to", "safetensors", "--out", tmp_path / "out")[0] == 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--to", "gguf", "--merge"], "--merge says nothing"),
        (["--to", "gguf", "--dtype", "float32"], "--dtype says nothing"),
        (["--to", "gguf", "--trust-remote-code"], "--trust-remote-code says nothing"),
        (["--to", "safetensors", "--no-evaluate"], "--no-evaluate says nothing"),
        (["--to", "ollama", "--lora"], "--lora says nothing"),
        (["--to", "safetensors", "--quant", "f16"], "--quant says nothing"),
        (["--to", "safetensors"], "--out"),
        (["--to", "safetensors", "--dtype", "float16", "--out", "x"], "copied as it is"),
        (["--to", "onnx"], "--to onnx"),
        (["--to", "gguf", "--quant", "q5"], "q5"),
        (["--to", "gguf", "--lora"], "whole model"),
        ([], "--to gguf"),
    ],
)
def test_options_that_mean_nothing(capsys, args, words):
    code, out, err = verb(capsys, "starter", *args)
    assert (code, out) == (2, "") and words in err


# LoRA --------------------------------------------------------------------------------------------------------------


def test_a_lora_beside_its_base_and_merged_say_the_same(tmp_path):
    pattern = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 32}, "use_rslora": True}
    folder = adapter(tmp_path / "adapter", lora(**pattern))
    beside = gguf_export.export(folder, tmp_path / "beside", "q8_0", lora=True)
    merged = gguf_export.export(folder, tmp_path / "merged", "q8_0")
    for made, kind in ((beside, "lora"), (merged, "model")):
        assert made.parity["kind"] == kind and made.parity["figures"]["mean_delta_logprob"] < 0.1
    assert beside.parity["tensors"] == {"F32": 2 * len(TARGETS) * 6} and beside.file.name == "adapter-lora.gguf"
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == ["adapter-q8_0.gguf", "parity.json"]


def test_a_lora_that_is_scaled_wrongly_is_refused(tmp_path, monkeypatch):
    from tunelet.errors import GateError
    from tunelet.infer import gguf_lora

    folder = adapter(tmp_path / "adapter", lora())
    real = gguf_lora._scale
    monkeypatch.setattr(gguf_lora, "_scale", lambda *args: 3 * real(*args))
    with pytest.raises(GateError, match="does not say"):
        gguf_export.export(folder, tmp_path / "out", "q8_0", lora=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: lora(use_dora=True), "DoRA"),
        (lambda: lora(target_modules=["q_proj", "lm_head"]), "head"),
        (lambda: lora(modules_to_save=["lm_head"]), "weights of the base"),
    ],
)
def test_what_is_no_lora_of_llama_cpps(tmp_path, config, words):
    folder = adapter(tmp_path / "adapter", config())
    with pytest.raises(TuneletError, match="can't become a LoRA file") as caught:
        gguf_export.export(folder, tmp_path / "out", lora=True)
    assert words in caught.value.why and not (tmp_path / "out").exists()


# Modelfiles and bytes ----------------------------------------------------------------------------------------------


def test_modelfiles_of_templates(tiny_tokenizer, tmp_path):
    chatml = Renderer(tiny_tokenizer, "chatml")
    assert gguf_ollama.system_of(chatml) == ""
    default = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe \"kind\".<|im_end|>\n' }}{% endif %}"
    source = default + starter_template()
    assert gguf_ollama.system_of(Renderer(tiny_tokenizer, source)) == 'Be "kind".'
    plain = Renderer(tiny_tokenizer, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert gguf_ollama.system_of(plain) is None
    remark = gguf_ollama.write(tmp_path / "m.gguf", tiny_tokenizer, plain, [2], 99999)
    told = (tmp_path / "Modelfile").read_text()
    assert "not ChatML" in remark and "TEMPLATE" not in told and "num_ctx 8192" in told


def starter_template() -> str:
    return (starter.BASE / "chat_template.jinja").read_text(encoding="utf-8")


def test_tokens_inside_characters_are_found_again():
    tokenizer = load_tokenizer(starter.BASE)
    table = TokenBytes(tokenizer)
    for text in ("뷁 냻 👍 é 가", "☃ ꙮ"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(table.of[id_] for id_ in ids).decode() == text
        held: list[int] = []
        for id_ in ids:  # as llama.cpp tells them: a token that ends inside a character comes with the next
            whole = b"".join(table.of[one] for one in (*held, id_))
            try:
                said = whole.decode()
            except UnicodeDecodeError:
                held.append(id_)
                continue
            found = table.held_back(said, id_, len(held)) if held else []
            assert b"".join(table.of[one] for one in (*found, id_)).decode() == said and len(found) == len(held)
            held = []

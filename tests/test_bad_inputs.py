"""Bad inputs, through the command line: exit 2, a message with file, row, cause and mend, nothing half-written.

Each case is a function that lays out the mistake in a folder and says what the message has to name.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tunelet import cli


@dataclass
class Bad:
    """`args`: the command; `names`: what its message has to hold; `out`: what must not be there afterwards."""

    args: list
    names: list[str]
    out: Path | None = None


CASES: dict[str, Callable[[Path, Path], Bad]] = {}


def case(function: Callable[[Path, Path], Bad]) -> Callable[[Path, Path], Bad]:
    CASES[function.__name__] = function
    return function


def chat(n: int = 0) -> dict:
    return {
        "messages": [{"role": "user", "content": f"Light {n}?"}, {"role": "assistant", "content": f"Light {n} is on."}]
    }


def jsonl(file: Path, rows: list, **changed: object) -> Path:
    """Rows to lines; `r3="..."` puts a raw text (or another row) in line 3."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for name, value in changed.items():
        lines[int(name[1:]) - 1] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def sft(folder: Path, model: Path | str, data: Path | str, *names: str, sets: tuple[str, ...] = ()) -> Bad:
    out = folder / "out"
    args = ["train", "sft", "--model", model, "--data", data, "--set", "train.max_steps=1", "--out", out]
    return Bad([*args, *[part for pair in sets for part in ("--set", pair)]], list(names), out)


def recipe(folder: Path, text: str, *names: str) -> Bad:
    file = folder / "my.toml"
    file.write_text(text, encoding="utf-8")
    return Bad(["align", file, "--out", folder / "out"], list(names), folder / "out")


def copy(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


# --- recipes and flags ---------------------------------------------------------------------------------------------


@case
def missing_recipe(folder, model):
    return Bad(["align", folder / "none.toml", "--out", folder / "out"], ["none.toml", "recipe init"], folder / "out")


@case
def unknown_key(folder, model):
    return recipe(folder, "[train]\nseed = 1\nlearning_rte = 1e-4\n", "my.toml, line 3", "train.learning_rate")


@case
def key_of_another_tool(folder, model):
    return recipe(folder, "[train]\nper_device_train_batch_size = 4\n", "my.toml, line 2", "train.batch_size")


@case
def unknown_section(folder, model):
    return recipe(folder, "[lora]\nr = 4\n", "my.toml, line 2", "adapter.rank")


@case
def wrong_type(folder, model):
    return recipe(folder, "[train]\nbatch_size = 'eight'\n", "my.toml, line 2", "train.batch_size", "integer")


@case
def out_of_range(folder, model):
    return recipe(folder, "[data]\n\nmax_length = 2\n", "my.toml, line 3", "data.max_length", "8")


@case
def broken_toml(folder, model):
    return recipe(folder, "[train]\nschedule = cosine\n", "my.toml, line 2", "quotes")


@case
def recipe_is_not_utf8(folder, model):
    (folder / "my.toml").write_bytes(b"# caf\xe9\n")
    return Bad(["align", folder / "my.toml"], ["my.toml, line 1", "UTF-8"])


@case
def recipe_is_a_folder(folder, model):
    return Bad(["align", folder], [str(folder), "folder"])


@case
def set_without_value(folder, model):
    return Bad(["demo", "--set", "train.max_steps"], ["--set train.max_steps", "key=value"])


@case
def set_unknown_key(folder, model):
    return Bad(["demo", "--set", "lr=1"], ["'lr'", "train.learning_rate"])


@case
def unknown_method(folder, model):
    return Bad(["train", "stf"], ["stf", "'sft'"])


@case
def no_method(folder, model):
    return Bad(["train"], ["which method", "tunelet train sft"])


@case
def unknown_adapter(folder, model):
    return Bad(["train", "sft", "--adapter", "qlora"], ["--adapter", "qlora", "lora"])


@case
def unknown_dtype(folder, model):
    return Bad(["chat", model, "--prompt", "hi", "--dtype", "fp16"], ["--dtype fp16", "float32"])


@case
def unknown_architecture(folder, model):
    text = "method = 'pretrain'\n[model]\npath = ''\n[model.architecture]\nmodel_type = 'lama'\n"
    bad = recipe(folder, text, "lama")
    texts = jsonl(folder / "texts.jsonl", [{"text": f"The light {n} is on."} for n in range(20)])
    return Bad(["train", "pretrain", "--recipe", bad.args[1], "--data", texts, "--out", bad.out], bad.names, bad.out)


@case
def no_gpu_here(folder, model):
    data = jsonl(folder / "d.jsonl", [chat(n) for n in range(9)])
    return sft(folder, model, data, "cuda", sets=("model.device=cuda",))


# --- data ----------------------------------------------------------------------------------------------------------


@case
def missing_file(folder, model):
    jsonl(folder / "train.jsonl", [chat()])
    return sft(folder, model, folder / "trian.jsonl", "trian.jsonl")


@case
def empty_file(folder, model):
    (folder / "empty.jsonl").touch()
    return sft(folder, model, folder / "empty.jsonl", "empty.jsonl")


@case
def folder_without_data(folder, model):
    (folder / "data").mkdir()
    (folder / "data" / "README.md").write_text("nothing")
    return sft(folder, model, folder / "data", str(folder / "data"))


@case
def broken_json_in_row_731(folder, model):
    data = jsonl(
        folder / "d.jsonl", [chat(n) for n in range(1000)], r731='{"messages": [{"role": "user", "content": "x"'
    )
    return sft(folder, model, data, "d.jsonl, line 731")


@case
def wrong_encoding(folder, model):
    lines = [json.dumps(chat(n)).encode() for n in range(9)]
    lines[4] = b'{"prompt": "caf\xe9", "completion": "yes"}'
    (folder / "latin.jsonl").write_bytes(b"\n".join(lines))
    return sft(folder, model, folder / "latin.jsonl", "latin.jsonl", "UTF-8")


@case
def a_row_that_is_no_object(folder, model):
    return sft(folder, model, jsonl(folder / "d.jsonl", [chat(n) for n in range(9)], r3="42"), "d.jsonl, line 3")


@case
def no_assistant_turn(folder, model):
    bad = {"messages": [{"role": "user", "content": "Anybody there?"}]}
    return sft(
        folder, model, jsonl(folder / "d.jsonl", [chat(n) for n in range(9)], r2=bad), "d.jsonl, line 2", "assistant"
    )


@case
def empty_answer(folder, model):
    bad = {"messages": [{"role": "user", "content": "Anybody there?"}, {"role": "assistant", "content": ""}]}
    return sft(folder, model, jsonl(folder / "d.jsonl", [chat(n) for n in range(9)], r4=bad), "d.jsonl, line 4")


@case
def unknown_role(folder, model):
    bad = {"messages": [{"role": "usre", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    return sft(folder, model, jsonl(folder / "d.jsonl", [chat(n) for n in range(9)], r6=bad), "d.jsonl, line 6", "usre")


@case
def all_answers_truncated(folder, model):
    long = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes"}]}
    data = jsonl(folder / "d.jsonl", [long] * 5)
    return sft(folder, model, data, "d.jsonl, lines 1, 2, 3, 4, 5", "max_length", sets=("data.max_length=32",))


@case
def one_answer_truncated(folder, model):
    long = {"messages": [{"role": "user", "content": "word " * 200}, {"role": "assistant", "content": "yes"}]}
    data = jsonl(folder / "d.jsonl", [chat(n) for n in range(9)], r7=long)
    return sft(folder, model, data, "d.jsonl, line 7", "max_length", sets=("data.max_length=64",))


@case
def several_faults_at_once(folder, model):
    rows = [chat(n) for n in range(20)]
    bad = {"messages": [{"role": "user", "content": "Anybody there?"}]}
    data = jsonl(folder / "d.jsonl", rows, r2="{", r11=bad, r19="[]")
    return sft(folder, model, data, "line 2", "line 11", "line 19")


@case
def unknown_format(folder, model):
    data = jsonl(folder / "d.jsonl", [chat(n) for n in range(9)])
    return sft(folder, model, data, "sharegtp", "sharegpt", sets=("data.format=sharegtp",))


@case
def unknown_column_role(folder, model):
    data = jsonl(folder / "d.jsonl", [{"Q": "a", "A": "b"}] * 9)
    return sft(folder, model, data, "promt", "prompt", sets=("data.columns={promt='Q', completion='A'}",))


@case
def column_that_is_not_there(folder, model):
    (folder / "d.csv").write_text("frage,antwort\na,b\nc,d\n")
    return sft(
        folder, model, folder / "d.csv", "d.csv", "'Q'", sets=("data.columns={prompt='Q', completion='antwort'}",)
    )


@case
def columns_nobody_knows(folder, model):
    (folder / "d.csv").write_text("foo,bar\na,b\nc,d\n")
    return sft(folder, model, folder / "d.csv", "d.csv", "foo")


@case
def broken_gzip(folder, model):
    whole = gzip.compress(json.dumps(chat()).encode() * 50)
    (folder / "d.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    return sft(folder, model, folder / "d.jsonl.gz", "d.jsonl.gz")


@case
def parquet_that_is_none(folder, model):
    (folder / "d.parquet").write_text("PAR1 not really")
    return sft(folder, model, folder / "d.parquet", "d.parquet")


@case
def a_binary_file(folder, model):
    (folder / "d.jsonl").write_bytes(bytes(range(256)) * 20)
    return sft(folder, model, folder / "d.jsonl", "d.jsonl")


@case
def an_unknown_kind_of_file(folder, model):
    (folder / "d.docx").write_bytes(b"PK\x03\x04")
    return sft(folder, model, folder / "d.docx", "d.docx")


@case
def preference_rows_for_sft(folder, model):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 9
    return sft(folder, model, jsonl(folder / "d.jsonl", rows), "d.jsonl, lines 1, 2, 3, 4, 5 and 4 more", "chosen")


@case
def a_data_set_of_the_hub_while_offline(folder, model):
    return sft(folder, model, "some-org/some-data", "some-org/some-data")


# --- models --------------------------------------------------------------------------------------------------------


def with_model(folder: Path, model: Path | str, *names: str, sets: tuple[str, ...] = ()) -> Bad:
    return sft(folder, model, jsonl(folder / "d.jsonl", [chat(n) for n in range(9)]), *names, sets=sets)


@case
def no_such_model_folder(folder, model):
    return with_model(folder, folder / "none", str(folder / "none"))


@case
def a_model_of_the_hub_while_offline(folder, model):
    return with_model(folder, "some-org/some-model", "some-org/some-model")


@case
def a_folder_without_a_model(folder, model):
    (folder / "void").mkdir()
    return with_model(folder, folder / "void", str(folder / "void"), "config.json")


@case
def a_model_without_tokenizer(folder, model):
    there = copy(model, folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (there / file).unlink()
    return with_model(folder, there, str(there), "tokenizer.json")


@case
def a_pickle_checkpoint(folder, model):
    there = copy(model, folder)
    (there / "model.safetensors").rename(there / "pytorch_model.bin")
    return with_model(folder, there, "pytorch_model.bin", "safetensors")


@case
def weights_cut_short(folder, model):
    there = copy(model, folder)
    whole = (there / "model.safetensors").read_bytes()
    (there / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return with_model(folder, there, "model.safetensors")


@case
def weights_that_are_not_numbers(folder, model):
    from safetensors.torch import load_file, save_file

    there = copy(model, folder)
    tensors = load_file(there / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, there / "model.safetensors", metadata={"format": "pt"})
    return with_model(folder, there, str(there), "NaN")


@case
def a_broken_config(folder, model):
    there = copy(model, folder)
    (there / "config.json").write_text('{"model_type": "llama",')
    return with_model(folder, there, "config.json")


@case
def not_a_causal_model(folder, model):
    there = copy(model, folder)
    (there / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    return with_model(folder, there, str(there))


@case
def a_tokenizer_of_another_model(folder, model):
    there = copy(model, folder)
    config = json.loads((there / "config.json").read_text())
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**config | {"vocab_size": 300})).save_pretrained(there)
    return with_model(folder, there, str(there), "300")


@case
def a_base_model_without_chat_template(folder, model):
    there = copy(model, folder)
    for file in there.glob("chat_template*"):
        file.unlink()
    file = there / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "chat_template"}))
    return with_model(folder, there, "chat template", "model.chat_template")


@case
def a_template_file_that_is_not_there(folder, model):
    return with_model(folder, model, "none.jinja", sets=(f"model.chat_template={folder / 'none.jinja'}",))


@case
def a_broken_template(folder, model):
    (folder / "t.jinja").write_text("{% for m in messages %}{{ m.content }}")
    return with_model(folder, model, "template", sets=(f"model.chat_template={folder / 't.jinja'}",))


@case
def lora_on_layers_that_are_not_there(folder, model):
    return with_model(folder, model, "q_prj", sets=("adapter.kind=lora", "adapter.target_modules=q_prj"))


@case
def an_adapter_whose_base_is_gone(folder, model):
    (folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "gone"), "r": 4, "task_type": "CAUSAL_LM"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / file, folder / "adapter" / file)
    shutil.copy(model / "model.safetensors", folder / "adapter" / "adapter_model.safetensors")
    return Bad(["chat", folder / "adapter", "--prompt", "hi"], [str(folder / "gone")])


# --- folders and files to write ------------------------------------------------------------------------------------


@case
def out_is_a_file(folder, model):
    bad = with_model(folder, model, str(folder / "out"))
    (folder / "out").write_text("mine")
    return Bad(bad.args, bad.names)


@case
def out_holds_other_things(folder, model):
    bad = with_model(folder, model, str(folder / "out"), "mine.txt")
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    return Bad(bad.args, bad.names)


@case
def out_holds_a_run_of_another_recipe(folder, model):
    from tunelet.recipe import Recipe
    from tunelet.runs.record import Run

    Run.create(folder / "out", Recipe(name="another"))
    return Bad(with_model(folder, model).args, [str(folder / "out"), "another recipe"])


@case
def out_below_a_file(folder, model):
    (folder / "file").write_text("mine")
    bad = with_model(folder, model, str(folder / "file"))
    return Bad([*bad.args[:-1], folder / "file" / "out"], bad.names)


@case
def resume_of_what_is_no_run(folder, model):
    return Bad(["train", "--resume", folder], [str(folder), "not a run"])


@case
def resume_with_other_settings(folder, model):
    return Bad(["train", "sft", "--resume", folder, "--set", "train.seed=2"], ["--resume", "--set"])


@case
def convert_onto_a_file_that_is_there(folder, model):
    data = jsonl(folder / "d.jsonl", [chat()])
    return Bad(["data", "convert", data, "--out", data], [str(data), "is there already"])


@case
def convert_of_nothing_usable(folder, model):
    data = jsonl(folder / "d.jsonl", [{"foo": 1}])
    out = folder / "o.jsonl"
    return Bad(["data", "convert", data, "--out", out], [str(data), "no row became an example"], out)


@case
def json_into_a_folder_that_is_not_there(folder, model):
    return Bad(["doctor", "--json", folder / "none" / "f.json"], ["--json"])


# --- the other verbs -----------------------------------------------------------------------------------------------


@case
def unknown_task(folder, model):
    return Bad(["eval", model, "--task", "mmul"], ["--task mmul", "held_out"])


@case
def report_of_what_is_no_run(folder, model):
    return Bad(["report", folder], [str(folder), "not a run"])


@case
def chat_with_a_data_file(folder, model):
    return Bad(["chat", jsonl(folder / "d.jsonl", [chat()]), "--prompt", "hi"], ["d.jsonl"])


@case
def no_such_prompts(folder, model):
    return Bad(
        ["generate", model, "--prompts", folder / "p.txt", "--out", folder / "o.jsonl"], ["p.txt"], folder / "o.jsonl"
    )


@case
def prompts_without_a_prompt(folder, model):
    prompts = jsonl(folder / "p.jsonl", [{"prompt": "a"}, {"foo": "b"}])
    out = folder / "o.jsonl"
    return Bad(["generate", model, "--prompts", prompts, "--out", out], ["p.jsonl, line 2", "foo"], out)


@case
def a_row_that_is_not_there(folder, model):
    data = jsonl(folder / "d.jsonl", [chat()])
    return Bad(["data", "mask", data, "--model", model, "--row", 7], ["d.jsonl", "no row 7"])


def test_there_are_enough():
    assert len(CASES) >= 40


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name, tmp_path, tiny_model_folder, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = CASES[name](tmp_path, tiny_model_folder)
    before = tree(tmp_path)
    code = cli.main([str(arg) for arg in bad.args])
    out, err = capfd.readouterr()
    assert code == 2, out + err
    assert "Traceback" not in out + err
    lines = err.strip().splitlines()
    assert lines[-1].startswith("fix: ") and len(lines[-1]) > 10, f"the last line is the remedy:\n{err}"
    for wanted in bad.names:
        assert wanted in err, f"{wanted!r} is not named:\n{err}"
    assert bad.out is None or not bad.out.exists(), f"half-written: {sorted(bad.out.rglob('*'))}"
    assert tree(tmp_path) == before, "files were left or changed"

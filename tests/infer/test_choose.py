"""Which engine answers, and the verbs that ask one: chosen for a reason, refused where it does not go together."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

pytest.importorskip("xllamacpp")

from tests.chat_server import ChatServer
from tests.infer.test_export import make_adapter, make_base
from tunelet.cli import main
from tunelet.errors import TuneletError
from tunelet.infer import bench, choose, gguf_export, gguf_file
from tunelet.infer.remote import RemoteEngine
from tunelet.models import load


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def file(cache, tmp_path, monkeypatch):
    """A file of the shipped model that counts as proved."""
    made = tmp_path / "starter.gguf"
    gguf_file.write(load.resolve("starter"), made, "q8_0")
    for name in ("there", "ready"):
        monkeypatch.setattr(gguf_export, name, lambda *_: gguf_export.Exported(made, {}))
    return made


def test_torch_where_llama_cpp_has_no_file(cache):
    chosen = choose.choose("starter", "auto", 1)
    assert chosen.engine == "torch" and "export --to gguf" in chosen.reason


def test_llama_cpp_for_one_where_its_file_is_there(file):
    assert choose.choose("starter", "auto", 1).engine == "llama.cpp"
    assert choose.choose("starter", "auto", 32).engine == "torch"
    assert choose.choose("starter", "torch", 1) == choose.Chosen("torch", "as asked")


def test_what_was_measured_here_decides(file):
    clients = [{"clients": n, "tokens_per_cpu_second": 0.0} for n in (1, 32)]

    def case(engine, alone, many):
        rows = [{**row, "tokens_per_cpu_second": rate} for row, rate in zip(clients, (alone, many), strict=True)]
        return {"engine": engine, "quant": "q8_0", "clients": rows}

    told = {"cases": [case("torch", 90.0, 100.0), case("llama.cpp", 40.0, 300.0)]}
    bench._keep(told, load.resolve("starter"))
    assert choose.choose("starter", "auto", 1).engine == "torch"
    many = choose.choose("starter", "auto", 32)
    assert many.engine == "llama.cpp" and "300" in many.reason
    bench._keep({"cases": told["cases"][:1]}, load.resolve("starter"))  # torch alone says nothing of the other
    assert choose.choose("starter", "auto", 1).engine == "llama.cpp"


def test_no_such_engine():
    with pytest.raises(TuneletError, match="llama"):
        choose.choose("starter", "lama.cpp", 1)


def test_generate_and_chat_say_which_engine_and_answer(file, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("hello\nTurn off the kitchen light\n", encoding="utf-8")
    asked = ["generate", "starter", "--prompts", str(prompts), "--max-new-tokens", "6", "--batch-size", "1"]
    assert main([*asked, "--out", str(out)]) == 0
    assert "Engine: llama.cpp" in capsys.readouterr().err
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == ["hello", "Turn off the kitchen light"]
    assert all(row["completion"] and 0 < row["tokens"] <= 6 for row in rows)
    assert main(["chat", "starter", "--prompt", "hello", "--max-new-tokens", "6"]) == 0
    assert rows[0]["completion"] in capsys.readouterr().out


def test_a_half_done_file_keeps_its_engine(file, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("hello\n", encoding="utf-8")
    asked = ["generate", "starter", "--prompts", str(prompts), "--max-new-tokens", "2", "--out", str(out)]
    assert main([*asked, "--engine", "torch"]) == 0
    part = out.with_name(out.name + ".part")
    out.rename(part)
    settings = {"max_new_tokens": 2, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 0, "model": "starter"}
    settings |= {"system": "", "raw": False, "template": None, "batch_size": 32, "engine": "torch", "prompts": "x"}
    part.with_name(part.name + ".json").write_text(json.dumps(settings), encoding="utf-8")
    assert main([*asked, "--engine", "llama.cpp"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--engine", "llama.cpp", "--dtype", "float32"], "--dtype"),
        (["--engine", "llama.cpp", "--trust-remote-code"], "--trust-remote-code"),
        (["--engine", "torhc"], "Did you mean"),
    ],
)
def test_what_does_not_go_together(file, tmp_path, capsys, flags, told):
    assert main(["chat", "starter", "--prompt", "hello", *flags]) == 2
    assert told in capsys.readouterr().err


def test_adapters_are_torchs(capsys):
    assert main(["chat", "--adapter", "a=nowhere", "--engine", "llama.cpp", "--prompt", "x"]) == 2
    assert "auto, torch" in capsys.readouterr().err


@pytest.fixture
def server(loopback):
    """An address that answers with what it was asked last, in capitals."""

    made = ChatServer(loopback, lambda question, body: question.upper())
    yield made
    made.close()


def test_an_address_answers_a_file_in_order(server, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("".join(f"question {n}\n" for n in range(20)), encoding="utf-8")
    asked = ["generate", "--prompts", str(prompts), "--out", str(out), "--engine", server.url]
    assert main([*asked, "--batch-size", "4", "--system", "Be loud."]) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["completion"] for row in rows] == [f"QUESTION {n}" for n in range(20)]
    assert {(row["tokens"], row["finish"]) for row in rows} == {(3, "stop")}


def test_an_address_is_heard_as_it_answers(server):
    from tunelet.data.examples import Message

    engine = RemoteEngine(server.url)
    pieces = [json.dumps({"choices": [{"delta": {"content": f"{n} "}}]}) for n in range(3)]
    sent = "".join(f"data: {piece}\n\n" for piece in pieces).encode()
    server.script = lambda question, body: (200, sent, {"Content-Type": "text/event-stream"})
    stream = engine.stream([Message("user", "count")], max_new_tokens=9)
    assert next(stream) == "0 "
    assert list(stream) == ["1 ", "2 "]
    stopped = engine.stream([Message("user", "count")], max_new_tokens=9)
    next(stopped)
    stopped.close()
    with pytest.raises(TuneletError, match="did not answer"):
        server.script = lambda question, body: (500, "")
        list(engine.stream([Message("user", "count")], max_new_tokens=9))


def test_a_chat_with_an_address_tells_its_tokens(server, tmp_path):
    told = tmp_path / "told.json"
    assert main(["chat", "--engine", server.url, "--prompt", "hello", "--json", str(told)]) == 0
    found = json.loads(told.read_text(encoding="utf-8"))
    assert (found["answer"], found["tokens"], found["finish"]) == ("HELLO", 3, "stop")


def test_an_address_cannot_do_everything(server, tmp_path, capsys):
    base = ["chat", "--prompt", "x", "--engine", server.url]
    for flags, told in (
        (["--raw"], "--raw"),
        (["--top-k", "3"], "top_k"),
        (["--template", "chatml"], "--template"),
        (["starter"], "behind #"),
    ):
        assert main([*base, *flags]) == 2
        assert told in capsys.readouterr().err


def test_an_address_that_is_not_there(loopback):
    with pytest.raises(TuneletError, match="can't be reached"):
        RemoteEngine("http://127.0.0.1:9/v1")


def test_an_adapters_shape_is_its_bases(tmp_path, tiny_tokenizer, cache, monkeypatch):
    base = make_base(tmp_path / "base", tiny_tokenizer)
    adapter = make_adapter(base, tmp_path / "adapter", tokenizer=tiny_tokenizer)
    monkeypatch.setattr(gguf_export, "there", lambda *_: gguf_export.Exported(tmp_path / "x.gguf", {}))
    bench._keep({"cases": []}, base)
    assert bench.kept(str(adapter)) == {"cases": []}
    bench._kept(base).unlink()
    assert choose.choose(str(adapter), "auto", 1).engine == "llama.cpp"


def test_choosing_llama_cpp_loads_no_torch(file):
    """A chat on llama.cpp begins at once."""
    code = "import sys; from tunelet.infer import bench, choose, gguf_export; gguf_export.there = lambda *_: 1; "
    code += "print(choose.choose('starter', 'auto', 1).engine, 'torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["llama.cpp", "False"]


@pytest.mark.parametrize(
    "line",
    ["export starter --to gguf", "chat starter --engine llama.cpp --prompt x", "bench starter --engine llama.cpp"],
)
def test_without_the_extra_it_is_said_what_to_install(cache, tmp_path, monkeypatch, capsys, line):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find(name, *a))
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert "no package gguf" in said and 'pip install "tunelet[serve]"' in said
    assert not list((tmp_path / "cache").rglob("*.gguf"))

"""The bench measures every engine in a process of its own, keeps what it found, and says which engine is faster."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("xllamacpp")

from tunelet.cli import main
from tunelet.errors import TuneletError
from tunelet.infer import bench, gguf_export, gguf_file
from tunelet.models import load
from tunelet.runs import bench_page


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Both engines on the shipped model, as the verb writes it."""
    folder = tmp_path_factory.mktemp("bench")
    cache = tmp_path_factory.mktemp("cache")

    def unproved(path, quant):  # the proof has tests of its own
        gguf_file.write(load.resolve(path), cache / "starter.gguf", quant)
        return gguf_export.Exported(cache / "starter.gguf", {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr(gguf_export, "ready", unproved)
        asked = ["bench", "starter", "--clients", "1", "--prompt", "8", "--answer", "4", "--out", str(folder)]
        assert main([*asked, "--engine", "torch", "--threads", "1"]) == 0
        assert bench.kept("starter") is None  # fewer threads than there are: not what others will have
        assert main([*asked, "--quant", "q8_0", "--clients", "2"]) == 0
        found = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
        assert bench.kept("starter")["cases"] == found["cases"]
    return found, folder


def test_every_engine_has_its_figures(told):
    found, _ = told
    assert [(case["engine"], case["quant"] != "") for case in found["cases"]] == [("torch", True), ("llama.cpp", True)]
    for case in found["cases"]:
        assert [row["clients"] for row in case["clients"]] == [1, 2]
        assert [row["tokens"] for row in case["clients"]] == [4, 8]
        assert min(row["tokens_per_cpu_second"] for row in case["clients"]) > 0
        assert case["first_token_seconds"] > 0 and case["load"]["cpu_seconds"] > 0
        assert case["most_alone"] == pytest.approx(found["memory_bytes_per_second"] / case["bytes"])
    torch, llama = found["cases"]
    assert llama["peak_mb"] < torch["peak_mb"]  # it runs without torch
    assert llama["bytes"] < torch["bytes"] or torch["quant"] == "float32"


def test_the_page_shows_them(told):
    found, folder = told
    page = (folder / "bench.html").read_text(encoding="utf-8")
    columns, rows = bench_page.table(found)
    assert "torch" in page and "llama.cpp q8_0" in page and "<svg" in page
    assert all(cell in page for row in rows for cell in row) and len(columns) == len(rows[0])


def case(engine, quant, **rates):
    clients = [{"clients": int(n[1:]), "tokens_per_cpu_second": rate} for n, rate in rates.items()]
    return {"engine": engine, "quant": quant, "clients": clients}


def test_the_faster_engine_depends_on_how_many_ask_and_on_the_file():
    ours, q8, q4 = (
        case("torch", "bfloat16", c1=10.0, c32=400.0),
        case("llama.cpp", "q8_0", c1=40.0, c32=150.0),
        case("llama.cpp", "q4_0", c1=60.0, c32=900.0),
    )
    figures = {"cases": [ours, q8, q4]}
    assert bench.fastest(figures, "q8_0", 1)[0] == "llama.cpp"
    name, why = bench.fastest(figures, "q8_0", 24)
    assert name == "torch" and "400" in why and "150" in why and "32 at once" in why
    assert bench.fastest(figures, "q4_0", 24)[0] == "llama.cpp"
    assert bench.fastest({"cases": [ours]}, "q8_0", 1) is None
    assert bench.fastest({"cases": [ours, q4]}, "q8_0", 1) is None  # what would answer was not measured


def test_what_the_model_cannot_read_is_refused(tmp_path, capsys):
    with pytest.raises(TuneletError, match="this model reads 512"):
        bench.run("starter", bench.cases(["torch"], [], "float32"), prompt=500, answer=50)
    assert main(["bench", "starter", "--engine", "vllm", "--out", str(tmp_path)]) == 2
    assert main(["bench", "starter", "--engine", "torch", "--quant", "q8_0", "--out", str(tmp_path)]) == 2
    assert "--quant is for llama.cpp" in capsys.readouterr().err

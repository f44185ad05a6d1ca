"""`tunelet compare` of results: from `eval --out` to a table that fits a terminal, words, JSON, and its mistakes."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from tunelet import cli
from tunelet.runs.record import RESOLVED


@pytest.fixture(scope="module")
def results(tmp_path_factory, tiny_model_folder) -> dict[str, Path]:
    """Folders of `eval --out`: one and same of one model, other of another seed's, worse with answers spoilt."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("results")
    other = Path(shutil.copytree(tiny_model_folder, folder / "OTHER"))
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(other)
    draw = random.Random(1)
    words = ["lamp", "door", "fan", "bed", "dog", "girl", "kitchen"]
    rows = [{"q": f"{draw.choice(words)} {n}?", "options": draw.sample(words, 4), "right": n % 4} for n in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "lamps_in_the_kitchen.toml").write_text(
        'name = "lamps_in_the_kitchen"\nprompt = "Q: {{q}}\\nA:"\nchoices = "options"\nanswer = "right"\n'
        'metrics = ["acc", "acc_norm", "f1"]\nrows = { files = ["rows.jsonl"] }\n',
        encoding="utf-8",
    )
    (folder / "texts.toml").write_text(
        'name = "texts"\nkind = "perplexity"\nprompt = "{{q}} {{options[0]}}"\nmetrics = ["word_perplexity"]\n'
        'rows = { files = ["rows.jsonl"] }\n',
        encoding="utf-8",
    )
    tasks = [part for name in ("lamps_in_the_kitchen", "texts") for part in ("--task", str(folder / f"{name}.toml"))]
    for name, of in (("one", tiny_model_folder), ("same", tiny_model_folder), ("other", other)):
        args = ["eval", str(of), *tasks, "--dtype", "float32", "--out", str(folder / name)]
        assert cli.main(args) == 0
    return {name: folder / name for name in ("one", "same", "other")} | {"rows": folder / "rows.jsonl"}


def run(capsys, *args) -> tuple[int, str, str]:
    code = cli.main(["compare", *map(str, args)])
    told = capsys.readouterr()
    return code, told.out, told.err


def spoilt(folder: Path, to: Path, right: int) -> Path:
    """A copy in which so many items more are right, of those that were wrong; where negative, fewer."""
    copy = Path(shutil.copytree(folder, to))
    (file,) = copy.glob("samples_lamps*")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    wrong = [line for line in lines if line["acc"] == (0 if right > 0 else 1)]
    for line in wrong[: abs(right)]:
        line["acc"] = float(right > 0)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return copy


def test_two_models(capsys, results):
    code, out, err = run(capsys, results["one"], results["other"], "--json", "-")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert [of["name"] for of in told["results"]] == ["A", "B"] and told["first"] == "A"
    against = told["against"]["B"]
    assert against["cautions"] == [] and against["untested"] == []
    tests = {(test["task"], test["metric"]): test for test in against["tests"]}
    assert {metric for _, metric in tests} == {"acc", "acc_norm", "f1", "word_perplexity"}
    for name, side in (("one", "first"), ("other", "second")):
        (file,) = results[name].glob("results_*.json")
        figures = json.loads(file.read_text(encoding="utf-8"))["results"]
        for (task, metric), test in tests.items():
            assert test[side] == pytest.approx(figures[task][f"{metric},none"]), metric
    assert tests["texts", "word_perplexity"]["verdict"] == "worse", "less is better, and noise made it more"
    assert tests["texts", "word_perplexity"]["difference"]["low"] > 0


def test_words_for_what_is_better_the_same_and_unknown(capsys, results, tmp_path):
    better = spoilt(results["one"], tmp_path / "better", 30)
    slightly = spoilt(results["one"], tmp_path / "slightly", -2)
    code, out, _ = run(capsys, results["one"], better, slightly)
    assert code == 0
    first, second = out[: out.index("C - A")], out[out.index("C - A") :]
    assert "B is better than A in: lamps_in_the_kitchen acc (80)." in first
    assert "The same within a point (of a perplexity: one percent): texts word_perplexity (80)." in first
    assert "Can't tell: chance alone would do as much" in second and "is better" not in second


def test_it_fits_80_columns(capsys, results, tmp_path, monkeypatch):
    better = spoilt(results["one"], tmp_path / "better", 30)
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(capsys, results["one"], better)
    lines = out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("task, figure"))
    end = next(n for n, line in enumerate(lines) if line.startswith("B is better"))
    assert max(len(line) for line in lines[start:end]) <= 80
    assert " ".join(lines[start].split()) == "task, figure A B B - A (95 %) p Holm needed"
    assert sum("…" in line for line in lines) == 0, "nothing is cut away"
    table = " ".join(" ".join(lines[start:end]).split())
    assert "+37.5 (" in table and "<.001" in table


def test_a_file_in_place_of_a_folder(capsys, results):
    files = [next(results[name].glob("results_*.json")) for name in ("one", "same")]
    code, out, _ = run(capsys, *files)
    assert code == 0 and "+0.0" in out and str(files[0]) in out


def test_fewer_items_in_one(capsys, results, tmp_path, tiny_model_folder):
    task = results["rows"].with_name("texts.toml")
    args = ["eval", str(tiny_model_folder), "--task", str(task), "--limit", "30", "--dtype", "float32"]
    assert cli.main([*args, "--out", str(tmp_path / "few")]) == 0
    code, out, _ = run(capsys, results["one"], tmp_path / "few")
    assert code == 0 and "They differ in how many items were asked (texts: all and 30)." in out
    assert "50 items are in A alone and left out (texts: number 30, 31, 32 and 47 more)." in out
    assert "A alone has lamps_in_the_kitchen." in out and "texts word_perplexity (30)" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["ONE"], ["one run", "at least two"]),
        (["ONE", "ONE"], ["given twice"]),
        (["ONE", "RUN"], ["holds results of an evaluation, and", "is a run", "compare the two folders of --out"]),
        (["NONE", "ONE"], ["neither results nor a run"]),
        (["ONE", "ROWS"], ["neither results nor a run"]),
        (["ONE", "ELSEWHERE"], ["no item in common", "A alone has"]),
        (["ONE", "BARE"], ["not beside it", "--log_samples"]),
    ],
)
def test_mistakes(capsys, results, tmp_path, args, words):
    known = {"ONE": results["one"], "ROWS": results["rows"], "NONE": tmp_path / "none"}
    known["RUN"] = tmp_path / "run"
    known["RUN"].mkdir()
    (known["RUN"] / RESOLVED).write_text("")
    for name in ("ELSEWHERE", "BARE"):
        known[name] = Path(shutil.copytree(results["one"], tmp_path / name.lower()))
    for file in known["ELSEWHERE"].glob("samples_*"):
        file.rename(file.with_name(file.name.replace("samples_", "samples_other_")))
    (file,) = known["ELSEWHERE"].glob("results_*")
    told = json.loads(file.read_text(encoding="utf-8"))
    for key in ("results", "n-samples"):
        told[key] = {f"other_{name}": of for name, of in told[key].items()}
    file.write_text(json.dumps(told), encoding="utf-8")
    next(known["BARE"].glob("samples_*")).unlink()
    code, out, err = run(capsys, *(known.get(arg, arg) for arg in args))
    assert (code, out) == (2, "")
    assert all(word in err for word in words), err
    assert err.splitlines()[-1].startswith("fix: ")

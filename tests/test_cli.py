"""The command line: verbs and flags of the interface, exit codes, JSON, errors that end in their remedy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tunelet
from tunelet import cli
from tunelet.errors import GateError, TuneletError

SRC = Path(tunelet.__file__).parents[1]
VERBS = ["demo", "align", "train", "eval", "chat", "generate", "report", "doctor", "compare", "sweep", "export"]
VERBS += ["data convert", "data doctor", "data render", "data mask", "recipe show", "recipe init"]
CHATS = [
    {"messages": [{"role": "user", "content": "Turn on the light."}, {"role": "assistant", "content": "It is on."}]},
    {"instruction": "Add 2 and 3.", "input": "", "output": "5"},
    {"messages": [{"role": "user", "content": "no answer"}]},
]


@pytest.fixture
def chats(tmp_path) -> Path:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CHATS), encoding="utf-8")
    return file


def run(capsys, *args) -> tuple[int, str, str]:
    code = cli.main([str(arg) for arg in args])
    told = capsys.readouterr()
    return code, told.out, told.err


def shell(*args: str, **kw) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    return subprocess.run([sys.executable, "-m", "tunelet", *args], capture_output=True, text=True, env=env, **kw)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(capsys, verb):
    code, out, _ = run(capsys, *verb.split(), "--help")
    assert code == 0
    assert f"tunelet {verb}" in out


@pytest.mark.parametrize("args", [[], ["data"], ["recipe"]])
def test_a_bare_command_shows_its_help(capsys, args):
    code, out, err = run(capsys, *args)
    assert (code, err) == (0, "") and "Commands:" in out


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"tunelet {tunelet.__version__}\n")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["trian"], "train"),
        (["data", "convrt"], "convert"),
        (["train", "sft", "--modle", "x"], "--model"),
        (["align"], "RECIPE"),
        (["chat"], "which model?"),
        (["generate", "starter", "--prompts", "p.txt"], "--out"),
        (["eval", "starter", "--items", "many"], "--items"),
        (["data", "mask", "starter", "--row", "0"], "--row"),
    ],
)
def test_usage_mistakes_are_exit_2_with_the_right_word(capsys, args, says):
    code, out, err = run(capsys, *args)
    assert (code, out) == (2, "")
    assert says in err
    assert err.splitlines()[-1].startswith("fix: ")
    assert "Traceback" not in err


def test_unknown_verbs_get_a_suggestion(capsys):
    assert "Did you mean 'train'?" in run(capsys, "trian")[2]


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (TuneletError("what", why="why", fix="do this"), 2, "fix: do this"),
        (GateError("did not hold", fix="look"), 1, "fix: look"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "fix: "),
        (OSError(28, "No space left on device", "runs/x/log.jsonl"), 2, "fix: free some disk space"),
        (OSError(30, "Read-only file system", "runs/x"), 2, "fix: choose"),
    ],
)
def test_exit_codes_and_last_lines(capsys, monkeypatch, error, code, last):
    def broken() -> None:
        raise error

    monkeypatch.setattr("tunelet.machine.report", broken)
    told = run(capsys, "doctor")
    assert told[0] == code
    assert told[2].splitlines()[-1].startswith(last)
    assert "Traceback" not in told[2]


def test_a_bug_keeps_its_traceback(capsys, monkeypatch):
    monkeypatch.setattr("tunelet.machine.report", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])
    monkeypatch.setattr("tunelet.machine.report", lambda: (_ for _ in ()).throw(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape"):
        cli.main(["doctor"])


def test_a_closed_pipe_is_no_error():
    code = f"{sys.executable} -m tunelet recipe show; echo rc=$? >&2"
    told = subprocess.run(
        ["bash", "-c", f"({code}) | head -1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    assert told.stdout.count("\n") == 1
    assert "Traceback" not in told.stderr and "BrokenPipe" not in told.stderr


def test_recipe_show_names_value_and_origin(capsys, tmp_path):
    file = tmp_path / "r.toml"
    file.write_text("[train]\nseed = 3\n")
    code, out, _ = run(capsys, "recipe", "show", file, "--set", "train.max_steps=7", "--model", "some/model")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert lines["train.seed"].rstrip().endswith(f"recipe {file}")
    assert lines["train.max_steps"].split()[1:] == ["7", "--set"]
    assert lines["model.path"].split()[1:] == ['"some/model"', "--model"]
    assert lines["train.epochs"].split()[1:] == ["1.0", "default"]
    code, out, _ = run(capsys, "recipe", "show", file, "--json")
    assert json.loads(out)["train.seed"] == {"value": 3, "origin": f"recipe {file}"}


def test_recipe_init_then_show(capsys, tmp_path, chats):
    file = tmp_path / "my.toml"
    assert run(capsys, "recipe", "init", "--model", "my-model", "--data", chats, "--out", file)[0] == 0
    code, out, _ = run(capsys, "recipe", "show", file, "--json", "-")
    values = json.loads(out)
    assert values["data.train"]["value"] == [str(chats)] and values["model.path"]["value"] == "my-model"
    assert values["name"]["value"] == "my"
    code, _, err = run(capsys, "recipe", "init", "--out", file)
    assert code == 2 and "is there already" in err


def test_doctor_says_what_will_be_used_and_why(capsys, tmp_path):
    target = tmp_path / "d.json"
    code, out, _ = run(capsys, "doctor", "--json", target)
    told = json.loads(target.read_text())
    assert code == 0
    for key in ("device", "dtype", "threads", "memory", "disk"):
        assert told["reasons"][key], key
        assert told["reasons"][key].split()[0] in out
    assert told["device"] in ("cpu", "cuda", "mps") and told["threads"] >= 1
    assert told["memory_mb"]["available"] > 0 and told["disk_free_mb"] > 0
    assert json.loads(run(capsys, "doctor", "--json")[1])["device"] == told["device"]


def test_json_targets_are_checked_before_the_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tunelet.machine.report", lambda: pytest.fail("worked first"))
    for target in (tmp_path / "none" / "x.json", tmp_path):
        code, _, err = run(capsys, "doctor", "--json", target)
        assert code == 2 and str(target) in err


def test_data_convert_counts_add_up(capsys, chats, tmp_path):
    out = tmp_path / "out.jsonl"
    code, text, err = run(capsys, "data", "convert", chats, "--out", out, "--json", "-")
    told = json.loads(text)
    assert code == 0
    assert told["rows_in"] == 3 == told["examples_out"] + sum(told["dropped"].values())
    assert told["findings"][0]["row"] == 3 and f"{chats}, line 3" in err
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == CHATS[0]
    assert rows[1]["messages"][-1] == {"role": "assistant", "content": "5"}
    assert run(capsys, "data", "convert", out, "--out", tmp_path / "again.jsonl")[0] == 0
    assert (tmp_path / "again.jsonl").read_text() == out.read_text(), "converting twice changes nothing"
    code, _, err = run(capsys, "data", "convert", chats, "--out", out)
    assert code == 2 and "is there already" in err


def test_data_doctor_is_a_check(capsys, chats, tmp_path):
    code, out, _ = run(capsys, "data", "doctor", chats)
    assert code == 1 and f"{chats}, line 3" in out
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(CHATS[0]) + "\n")
    assert run(capsys, "data", "doctor", good)[0] == 0


def test_data_doctor_fix_writes_a_clean_file(capsys, chats, tmp_path):
    fixed = tmp_path / "fixed.jsonl"
    assert run(capsys, "data", "doctor", chats, "--fix", fixed)[0] == 0
    assert run(capsys, "data", "doctor", fixed)[0] == 0
    assert fixed.read_text().count("\n") == 2


def test_data_mask_and_render(capsys, chats, tiny_model_folder, tmp_path):
    page = tmp_path / "mask.html"
    code, out, _ = run(capsys, "data", "mask", chats, "--model", tiny_model_folder, "--html", page)
    assert code == 0 and "[[It is on.<|im_end|>" in out and page.read_text().startswith("<!doctype html>")
    code, out, _ = run(capsys, "data", "mask", chats, "--model", tiny_model_folder, "--json", "-")
    told = json.loads(out)
    assert sum(told["mask"]) == told["trained"] > 0 and len(told["ids"]) == told["tokens"]
    assert "".join(p["text"] for p in told["pieces"] if p["trained"]).startswith("It is on.")
    code, out, _ = run(capsys, "data", "render", chats, "--model", tiny_model_folder, "--prompt", "--json", "-")
    assert json.loads(out)["text"].endswith("<|im_start|>assistant\n")
    code, _, err = run(capsys, "data", "mask", chats, "--model", tiny_model_folder, "--row", 3)
    assert code == 2 and "line 3" in err and "assistant" in err
    code, _, err = run(capsys, "data", "mask", chats, "--model", tiny_model_folder, "--row", 9)
    assert code == 2 and "no row 9" in err


def test_chat_asks_once(capsys, tiny_model_folder):
    code, out, _ = run(capsys, "chat", tiny_model_folder, "--prompt", "Hello", "--max-new-tokens", 5)
    assert code == 0 and out.endswith("\n")
    code, text, _ = run(capsys, "chat", tiny_model_folder, "--prompt", "Hello", "--max-new-tokens", 5, "--json")
    told = json.loads(text)
    assert told["answer"] == out[:-1] and told["tokens"] <= 5


def test_chat_keeps_history_and_obeys_its_commands(tiny_model_folder, tmp_path):
    saved = tmp_path / "saved.jsonl"
    lines = [
        "first",
        "/system Be brief.",
        "second",
        "third",
        f"/save {saved}",
        "/nonsense",
        "/reset",
        f"/save {saved}",
        "/quit",
        "never",
    ]
    told = shell("chat", str(tiny_model_folder), "--max-new-tokens", "3", input="\n".join(lines) + "\n")
    assert told.returncode == 0, told.stderr
    rows = [json.loads(line) for line in saved.read_text(encoding="utf-8").splitlines()]
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in rows[0]["messages"] if m["role"] == "user"] == ["second", "third"]
    assert rows[1]["messages"] == [{"role": "system", "content": "Be brief."}]
    assert "There is no /nonsense" in told.stdout


def test_chat_survives_a_conversation_that_is_too_long(tiny_model_folder):
    told = shell("chat", str(tiny_model_folder), "--max-new-tokens", "3", input="x " * 900 + "\n/reset\nhello\n")
    assert told.returncode == 0, told.stderr
    assert "/reset begins a new conversation" in told.stdout


def test_generate_answers_in_order_and_goes_on(capsys, tiny_model_folder, tmp_path, monkeypatch):
    from tunelet.infer import batch

    monkeypatch.setattr(batch, "CHUNK", 1)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{'word ' * (9 - n)}number {n}" for n in range(9)) + "\n")
    args = ["generate", tiny_model_folder, "--prompts", prompts, "--max-new-tokens", 4, "--batch-size", 2]
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert run(capsys, *args, "--out", whole)[0] == 0
    rows = [json.loads(line) for line in whole.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == prompts.read_text().splitlines()
    assert all(row["finish"] in ("stop", "length") for row in rows)

    real = batch._Part.write

    def killed(self, rows, seen=[0]):  # noqa: B006 - a counter
        real(self, rows)
        seen[0] += 1
        if seen[0] == 2:
            with self.file.open("a") as file:
                file.write('{"prompt": "cut sh')  # a kill in the middle of a write
            raise KeyboardInterrupt

    monkeypatch.setattr(batch._Part, "write", killed)
    assert run(capsys, *args, "--out", stopped)[0] == 130
    monkeypatch.setattr(batch._Part, "write", real)
    assert not stopped.exists()
    code, _, err = run(capsys, *args, "--out", stopped, "--temperature", 1)
    assert code == 2 and "other settings" in err
    code, out, _ = run(capsys, *args, "--out", stopped)
    assert code == 0 and "Going on after 4 of 9" in out
    assert stopped.read_text() == whole.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompts.txt", "stopped.jsonl", "whole.jsonl"]


def test_generate_takes_messages_and_keeps_columns(capsys, tiny_model_folder, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    prompts.write_text(json.dumps(CHATS[0] | {"id": 7}) + "\n" + json.dumps({"question": "why?"}) + "\n")
    code, text, _ = run(
        capsys, "generate", tiny_model_folder, "--prompts", prompts, "--out", out, "--max-new-tokens", 2, "--json"
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert code == 0 and rows[0]["id"] == 7 and "completion" in rows[0] and json.loads(text)["prompts"] == 2


def test_default_folders_are_fresh_after_finished_runs(tmp_path, monkeypatch):
    from tunelet.commands import common
    from tunelet.recipe import Recipe
    from tunelet.runs.record import Run

    monkeypatch.chdir(tmp_path)
    recipe = Recipe(name="mine")
    first = common.free_folder(recipe)
    assert first == Path("runs/mine")
    one = Run.create(first, recipe)
    assert common.free_folder(recipe) == first, "an unfinished run of the same recipe is taken up"
    assert common.free_folder(Recipe(name="mine", method="pretrain")) == Path("runs/mine-2")
    one.done()
    assert common.free_folder(recipe) == Path("runs/mine-2")


def test_ctrl_c_is_130_without_a_traceback(tiny_model_folder):
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    child = subprocess.Popen(
        [sys.executable, "-m", "tunelet", "chat", str(tiny_model_folder), "--prompt", "hi", "--max-new-tokens", "9999"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=env,
    )  # fmt: skip
    assert child.stdout.read(1), "the answer has begun"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode in (0, 130)
    assert "Traceback" not in err


def test_a_folder_with_a_tokenizer_alone_serves_where_no_weights_are_needed(capsys, chats, tiny_model_folder, tmp_path):
    folder = tmp_path / "tokenizer-only"
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (Path(tiny_model_folder) / file).exists():
            (folder / file).write_bytes((Path(tiny_model_folder) / file).read_bytes())
    assert run(capsys, "data", "mask", chats, "--model", folder)[0] == 0
    assert run(capsys, "data", "render", chats, "--model", folder)[0] == 0
    assert "line 3" in run(capsys, "data", "doctor", chats, "--model", folder)[1]
    for verb in (["chat", folder, "--prompt", "hi"], ["train", "sft", "--model", folder, "--out", tmp_path / "run"]):
        code, _, err = run(capsys, *verb)
        assert code == 2 and "holds no model" in err and not (tmp_path / "run").exists()


def test_columns_are_named_in_the_same_way_everywhere(capsys, tmp_path):
    rows = tmp_path / "odd.jsonl"
    rows.write_text(json.dumps({"instruction": "Say hi.", "text": "Hi."}) + "\n")
    code, _, err = run(capsys, "data", "convert", rows, "--out", tmp_path / "out.jsonl")
    flags = "--column prompt=instruction --column completion=text"
    assert code == 2 and flags in err.splitlines()[-1] and "columns = {" in err.splitlines()[-1]
    assert run(capsys, "data", "convert", rows, *flags.split(), "--out", tmp_path / "out.jsonl")[0] == 0
    code, text, _ = run(capsys, "recipe", "show", "--data", rows, *flags.split(), "--json", "-")
    told = json.loads(text)["data.columns"]
    assert told == {"value": {"prompt": "instruction", "completion": "text"}, "origin": "--column"}
    code, text, _ = run(capsys, "recipe", "init", "--data", rows, *flags.split())
    assert code == 0 and 'columns = { prompt = "instruction", completion = "text" }' in text

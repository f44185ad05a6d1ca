"""Documentation that cannot rot: every command of the READMEs runs or is checked, and both languages say the same."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tunelet import cli, starter

ROOT = Path(__file__).resolve().parents[1]
READMES = ["README.md", "README.ko.md"]
SCALE = ["docs/scale.md", "docs/scale.ko.md"]  # its commands are run by train/test_distributed.py
needs_base = pytest.mark.skipif(
    not (starter.BASE / "model.safetensors").is_file(), reason="the shipped base model is not here"
)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[list[str]]:
    """The commands of each fenced sh block, comments taken off."""
    found = re.findall(r"```sh\n(.*?)```", text(name), flags=re.S)
    return [[line for raw in block.splitlines() if (line := re.sub(r"\s+#.*", "", raw).strip())] for block in found]


def inline(name: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text(name), flags=re.S))


def commands(group) -> list[tuple[str, ...]]:
    """All verbs, as tuples of words."""
    import typer

    found = []
    for name, command in typer.main.get_command(group).commands.items():
        inner = getattr(command, "commands", None)
        found += [(name, sub) for sub in inner] if inner else [(name,)]
    return found


def options() -> set[str]:
    import typer

    def walk(command) -> set[str]:
        own = {flag for parameter in command.params for flag in parameter.opts}
        return own.union(*(walk(sub) for sub in getattr(command, "commands", {}).values()))

    return walk(typer.main.get_command(cli.app))


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny_model_folder) -> Path:
    """A folder with what the READMEs assume: my.jsonl, and MODEL for a model."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"Light {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(30)
    ]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(tiny_model_folder, tmp_path / "MODEL")
    return tmp_path


def run(line: str, monkeypatch) -> None:
    """Run a documented command; trainings take one step, conversations end at once."""
    program, *args = shlex.split(line)
    assert program == "tunelet", line
    if args[0] in ("align", "train"):
        args += ["--set", "train.max_steps=1", "--set", "data.limit=30", "--set", "eval.items=1"]
        args += ["--set", "eval.max_new_tokens=4", "--set", "data.eval_rows=4"]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main(args) == 0, line


@pytest.mark.parametrize("name", READMES)
def test_your_own_data(name, workplace, monkeypatch):
    mine = next(block for block in blocks(name) if any("my.jsonl" in line for line in block))
    for line in mine:
        run(line, monkeypatch)
    assert (workplace / "runs" / "my" / "report.html").is_file()


@needs_base
def test_the_starters_rows(workplace, monkeypatch):
    for line in next(block for block in blocks(READMES[0]) if any("runs/first-try" in line for line in block)):
        run(line, monkeypatch)


@pytest.mark.parametrize("name", [*READMES, *SCALE])
def test_every_block_is_run_or_checked(name):
    for block in blocks(name):
        for line in block:
            program, *args = shlex.split(re.sub(r"^torchrun .* -m tunelet", "tunelet", line))
            assert program in ("make", "tunelet"), line
            if program == "tunelet":
                known = commands(cli.app)
                assert any(tuple(args[: len(verb)]) == verb for verb in known), line
            else:
                told = subprocess.run(["make", "-n", *args], cwd=ROOT, capture_output=True, text=True)
                assert told.returncode == 0, told.stderr


@pytest.mark.parametrize("names", [READMES, SCALE], ids=["readme", "scale"])
def test_both_languages_have_the_same_commands(names):
    assert [[re.sub(r'"[^"]*"', '""', line) for line in block] for block in blocks(names[0])] == [
        [re.sub(r'"[^"]*"', '""', line) for line in block] for block in blocks(names[1])
    ]
    one, two = (
        sorted({part for part in inline(name) if part.startswith(("tunelet", "make", "python", "uv", "pip", "--"))})
        for name in names
    )
    assert one == two
    headings = [re.findall(r"^#+ ", text(name), flags=re.M) for name in names]
    assert headings[0] == headings[1]
    rows = [text(name).count("\n|") for name in names]
    assert rows[0] == rows[1], "tables of different length"


@pytest.mark.parametrize("name", READMES)
def test_every_verb_is_in_the_table(name):
    told = " ".join(inline(name))
    for verb in commands(cli.app):
        assert f"tunelet {verb[0]}" in told and verb[-1] in told, verb


@pytest.mark.parametrize("name", [*READMES, *SCALE, "CONTRIBUTING.md"])
def test_flags_and_files_named_exist(name):
    known = options() | {"--help", "--find-links", "--nproc-per-node", "--shutdown-timeout"}  # the last are torchrun's
    for part in inline(name):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", part):
            assert flag in known, f"{flag} in `{part}`"
    for target in re.findall(r"\]\(([^)#:]+)\)", text(name)):
        assert (ROOT / target).exists(), target
    for file in re.findall(r"(?:-r |scripts.)([\w.]+\.(?:txt|py))", text(name)):
        assert (ROOT / file).exists() or (ROOT / "scripts" / file).exists(), file


def test_ci_and_make_targets_are_there():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, ".ci/run can be executed"
    for target in ("demo", "install", "test", "lint", "install-parity"):
        told = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr


def test_the_notebook_and_the_changelog_are_dated_newest_first():
    dates = re.findall(r"^## (\d{4}-\d{2}-\d{2})", text("docs/notebook.md"), flags=re.M)
    assert dates and dates == sorted(dates, reverse=True)
    from tunelet import __version__

    assert f"## {__version__}" in text("CHANGELOG.md")

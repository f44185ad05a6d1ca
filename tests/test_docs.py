"""Documentation that cannot rot: every command of the READMEs runs or is checked, and both languages say the same."""

from __future__ import annotations

import io
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tunelet import cli, starter

ROOT = Path(__file__).resolve().parents[1]
READMES = ["README.md", "README.ko.md"]
SCALE = ["docs/scale.md", "docs/scale.ko.md"]  # its commands are run by train/test_distributed.py
PREFERENCE = ["docs/preference.md", "docs/preference.ko.md"]
ADAPTERS = ["docs/adapters.md", "docs/adapters.ko.md"]
EVALUATION = ["docs/evaluation.md", "docs/evaluation.ko.md"]
DEPLOY = ["docs/deploy.md", "docs/deploy.ko.md"]  # servers are started by serve/test_serve_starter.py
FOREIGN = ("curl", "docker", "vllm", "python", "pip")  # programs that only docs/deploy.md names
COMPARING = ("dpo", "orpo", "simpo", "kto")  # in the order of its tables' columns
needs_base = pytest.mark.skipif(
    not (starter.BASE / "model.safetensors").is_file(), reason="the shipped base model is not here"
)


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[list[str]]:
    """The commands of each fenced sh block, comments taken off."""
    found = re.findall(r"```sh\n(.*?)```", text(name), flags=re.S)
    found = [re.sub(r"\\\n\s*", "", block) for block in found]
    return [[line for raw in block.splitlines() if (line := re.sub(r"\s+#.*", "", raw).strip())] for block in found]


def inline(name: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text(name), flags=re.S))


def tables(name: str) -> list[list[str]]:
    """The cells of every row of every table."""
    return [[cell.strip() for cell in row.split("|")] for row in re.findall(r"^\| (.*) \|$", text(name), flags=re.M)]


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
        own = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
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


@pytest.fixture
def comparing(workplace) -> Path:
    """With what docs/preference.md assumes: PAIRS.jsonl, HELD_OUT.jsonl, VERDICTS.jsonl, JUDGE, and its recipes."""

    def write(name: str, rows: list[dict]) -> None:
        (workplace / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    pairs = [
        {"prompt": f"Is lamp {n} on?", "chosen": f"Lamp {n} is on.", "rejected": f"I'd rather not talk of lamp {n}."}
        for n in range(40)
    ]
    write("PAIRS.jsonl", pairs[:30])
    write("HELD_OUT.jsonl", pairs[30:33])
    write(
        "VERDICTS.jsonl",
        [{"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
         for pair in pairs[:15] for key in ("chosen", "rejected")],
    )  # fmt: skip
    shutil.copytree(workplace / "MODEL", workplace / "JUDGE")
    for recipe in re.findall(r"```toml\n(.*?)```", text(PREFERENCE[0]), flags=re.S):
        (workplace / recipe.partition("\n")[0].removeprefix("# ")).write_text(recipe)
    return workplace


def run(line: str, monkeypatch) -> None:
    """Run a documented command; trainings take one step, conversations end at once."""
    program, *args = shlex.split(line)
    assert program == "tunelet", line
    if args[0] in ("align", "train", "sweep"):
        args += ["--set", "train.max_steps=1", "--set", "data.limit=30", "--set", "eval.items=1"]
        args += ["--set", "eval.max_new_tokens=4", "--set", "data.eval_rows=4"]
    if args[0] == "sweep" and "--no-full" not in args:
        args.append("--no-full")  # a cell less to align
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main(args) == 0, line


@pytest.fixture
def adapting(comparing) -> Path:
    """With what docs/adapters.md assumes: en.jsonl, ko.jsonl, and the recipe and the prompts it shows."""
    for language in ("en", "ko"):
        shutil.copy(comparing / "my.jsonl", comparing / f"{language}.jsonl")
    shutil.copy(comparing / "my.jsonl", comparing / "HELD_OUT.jsonl")
    (recipe,) = re.findall(r"```toml\n# small.toml\n(.*?)```", text(ADAPTERS[0]), flags=re.S)
    (comparing / "small.toml").write_text(recipe)
    (prompts,) = re.findall(r"```json\n(.*?)```", text(ADAPTERS[0]), flags=re.S)
    (comparing / "prompts.jsonl").write_text(prompts)
    return comparing


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


def test_comparisons_end_to_end(comparing, monkeypatch):
    for line in itertools.chain(*blocks(PREFERENCE[0])):
        if "starter" not in line:
            run(line, monkeypatch)
    for name in ("my-dpo", "both"):
        assert "What happened to the model" in (comparing / "runs" / name / "report.html").read_text(encoding="utf-8")


@needs_base
def test_comparisons_without_pairs_at_hand(workplace, monkeypatch):
    (line,) = (line for line in itertools.chain(*blocks(PREFERENCE[0])) if "starter" in line)
    run(line, monkeypatch)
    assert (workplace / "runs" / "starter-orpo" / "report.html").is_file()


def test_adapters_end_to_end(adapting, monkeypatch, capsys):
    for line in itertools.chain(*blocks(ADAPTERS[0])):
        run(line, monkeypatch)
    for page in ("runs/small/report.html", "runs/which/sweep.html", "runs/layers/sweep.html", "merged/merge.json"):
        assert (adapting / page).is_file(), page
    assert len((adapting / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    capsys.readouterr()
    (code,) = re.findall(r"```python\n(.*?)```", text(ADAPTERS[0]), flags=re.S)
    exec(code, {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", ADAPTERS)
def test_kinds_and_keys_of_adapters_are_those_of_the_code(name):
    """Every kind with its default learning rates and its paper; every key with its readers and its default."""
    from typing import get_args

    from tunelet.infer import export
    from tunelet.recipe import ADAPTER_KEYS, INITS, AdapterSection
    from tunelet.train import defaults

    rows = tables(name)
    head = next(at for at, row in enumerate(rows) if row[1:2] == ["`lora`"])
    kinds = [cell.strip("`") for cell in rows[head][1:]]
    assert {*kinds, "none"} == set(get_args(AdapterSection.model_fields["kind"].annotation))
    told = {}
    for kind, cell in zip(kinds, rows[head + 2][1:], strict=True):
        told[kind] = (re.findall(r"\d+e-\d+", cell), re.findall(r"(\d+)M", cell)) if "e-" in cell else told["lora"]
    for kind, (rates, borders) in told.items():
        for many in (5, 49, 50, 400, 500):
            expected = rates[-1] if borders and many >= int(borders[0]) else rates[0]
            assert defaults.learning_rate("sft", kind, many * 10**6, False)[0] == float(expected), (kind, many)
    yes = {"yes", "예"}
    for row, those in ((rows[head + 4], {"lora", "rslora"}), (rows[head + 5], {"lora", "rslora", "dora", "ia3"})):
        assert {kind for kind, cell in zip(kinds, row[1:], strict=True) if cell in yes} == those
    assert {"PROMPT_TUNING", "PREFIX_TUNING"} <= set(export.PROMPTS)  # the two that cannot be merged
    assert all("arxiv.org" in cell for cell in rows[head + 6][1:])

    keys = {row[0].strip("`").removeprefix("adapter."): row for row in rows if row[0].startswith("`adapter.")}
    assert set(keys) == set(AdapterSection.model_fields) - {"kind"} == set(ADAPTER_KEYS)
    for key, row in keys.items():
        named = set(re.findall(r"`(\w+)`", row[1]))
        assert named == set(ADAPTER_KEYS[key]) or (key == "init" and named == set(kinds) - set(ADAPTER_KEYS[key])), key
        default = AdapterSection.model_fields[key].get_default(call_default_factory=True)
        assert default in ("", []) or row[2] == (default if isinstance(default, str) else f"{default:g}"), key
    words = set(inline(name))
    assert {kind for those in INITS.values() for kind in those} - {"text"} <= words


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_logged_and_printed_of_adapters_is_there(name):
    """Figures of the log, bounds of the gate, the two lines that are shown."""
    from tunelet.infer import merge_gate
    from tunelet.models import adapters

    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "src" / "tunelet").rglob("*.py"))
    for figure in ("grad_norm", "prompt_norm", "prompt_moved"):
        assert f"`{figure}`" in text(name) and f'"{figure}"' in code
    bounds = next(row[1] for row in tables(name) if "bfloat16: " in row[1])
    rounding = merge_gate.ROUNDING
    expected = [rounding[kind][of] for kind in ("bfloat16", "float16") for of in sorted(rounding[kind], reverse=True)]
    found = [float(number) for number in re.findall(r"(?<![a-z\d.])\d+(?:\.\d+)?", bounds)]
    assert found == [*expected, rounding["float32"]["max_delta_logprob"]]
    (shown,) = re.findall(r"```text\n(.*?)```", text(name), flags=re.S)
    lora = {"kind": "lora", "trained": 466_944, "parameters": 5_713_152, "share": 466_944 / 5_713_152, "mb": 1.867776}
    soft = {"kind": "prompt", "trained": 4_096, "parameters": 5_250_304, "share": 4_096 / 5_250_304, "mb": 0.016384}
    told = [adapters.line(lora | {"rank": 16}), adapters.line(soft | {"num_virtual_tokens": 16})]
    assert shown.splitlines() == told


@pytest.mark.parametrize("name", EVALUATION)
def test_an_exam_of_ones_own_end_to_end(name, workplace, monkeypatch, capsys):
    """Task, rows, metric and the comparison of results, as docs/evaluation.md shows them."""
    for file in re.findall(r"```(?:toml|python)\n(.*?)```", text(name), flags=re.S):
        (workplace / file.partition("\n")[0].removeprefix("# ")).write_text(file, encoding="utf-8")
    (rows,) = re.findall(r"```json\n(.*?)```", text(name), flags=re.S)
    (workplace / "exam.jsonl").write_text(rows, encoding="utf-8")
    sums = [{"question": f"{n} + 1 =", "result": n + 1} for n in range(3)]
    (workplace / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums), encoding="utf-8")
    shutil.copytree(workplace / "MODEL", workplace / "OTHER")
    for line in next(block for block in blocks(name) if any("my_sums.py" in line for line in block)):
        run(line, monkeypatch)
    shown = capsys.readouterr().out
    for figure in ("my_exam/acc ", "my_exam/acc_norm ", "my_sums/own "):
        assert figure in shown
    compared = next(line for line in itertools.chain(*blocks(name)) if line.startswith("tunelet compare results/exam"))
    run(compared, monkeypatch)
    assert "my_exam acc_norm (3)" in capsys.readouterr().out  # both are one model, and three items tell nothing


@pytest.mark.parametrize("name", EVALUATION)
def test_tasks_and_metrics_told_of_evaluation_are_those_of_the_code(name, capsys):
    from tunelet.evals import tasks

    told = set(inline(name))
    assert {task for task in tasks.shipped() if not task.startswith("kobest_")} <= told
    found = {kind: set() for kind in tasks.METRICS}
    for row in tables(name):
        if len(row) == 3 and (kind := row[1].strip("`")) in found:
            found[kind] |= set(re.findall(r"`(\w+)`", row[0]))
    assert found == {kind: set(metrics) for kind, metrics in tasks.METRICS.items()}
    for file in re.findall(r"```python\n(.*?)```", text(name), flags=re.S):
        if file.startswith("# instructions.py") or (file.startswith("# programs.py") and sys.platform == "linux"):
            exec(file, {})
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", PREFERENCE)
def test_formats_of_pairs_are_read_as_shown(name, tmp_path):
    from tunelet.data import doctor, formats

    shown = [part for part in inline(name) if part.startswith("{")]
    assert len(shown) == 7
    for number, row in enumerate(shown):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(row + "\n", encoding="utf-8")
        loaded = formats.load([str(file)], want="labelled" if 'completion"' in row else "preference")
        assert loaded.examples and not [*loaded.findings, *doctor.check(loaded.examples)], row


@pytest.mark.parametrize("name", PREFERENCE)
def test_settings_are_those_of_the_code(name):
    from tunelet.train import defaults, guard

    found = [
        [[float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", cell)] for cell in row[1:]]
        for row in tables(name)
        if len(row) == 5 and all("(" in cell and "]" not in cell for cell in row[1:])
    ]
    expected = []
    for parameters in (5_000_000, 135_000_000, 1_700_000_000):
        known = [guard.rates(method, "none", parameters) for method in COMPARING]
        chosen = [defaults.learning_rate(method, "none", parameters, False)[0] for method in COMPARING]
        expected.append([[rate, of.low, of.high] for rate, of in zip(chosen, known, strict=True)])
    betas = [guard.BETAS[method] for method in COMPARING]
    expected.append(
        [[defaults.beta(method, "sigmoid"), of.low, of.high] for method, of in zip(COMPARING, betas, strict=True)]
    )
    assert found == expected


@pytest.mark.parametrize("name", PREFERENCE)
def test_what_is_told_of_pairs_is_there(name):
    """Findings, figures, metrics, losses, keys: all names are the code's; every rule of the guard is told."""
    from tunelet.recipe import MethodSection, Recipe
    from tunelet.recipe_io import values
    from tunelet.runs.report_preference import KINDS

    told = set(inline(name))
    assert set(KINDS) <= told
    assert set(MethodSection.model_json_schema()["properties"]["loss_type"]["enum"]) <= told
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "src" / "tunelet").rglob("*.py"))
    names = {part.removeprefix("held_out/") for part in told if re.fullmatch(r"(?!runs/)[a-z]+(?:[_/][a-z]+)+", part)}
    assert len(names) > 25
    for part in names:
        assert f'"{part}"' in code or f"{part}:" in code, part
    keys = {part for part in told if re.fullmatch(r"(?:method|model|data|train)\.[a-z_]+", part)}
    assert keys <= set(values(Recipe()))


@needs_base
def test_exports_and_engines(workplace, monkeypatch, loopback):
    """RUN is the shipped model; bench asks for a little."""
    pytest.importorskip("xllamacpp")
    (workplace / "prompts.jsonl").write_text('{"prompt": "hello"}\n', encoding="utf-8")
    done = 0
    for line in itertools.chain(*blocks(DEPLOY[0])):
        verb = line.split()[1]
        if verb in ("export", "bench", "chat", "generate") and "ADAPTER" not in line and "http" not in line:
            line = line.replace("RUN", "starter") if "model" not in line else line.replace("RUN", "MODEL")
            line = line.replace("--out model", f"--out out{done}")
            more = " --max-new-tokens 4" if verb in ("chat", "generate") else ""
            more += " --clients 1 --prompt 8 --answer 4 --quant q8_0" if verb == "bench" else ""
            run(line + more, monkeypatch)
            done += 1
    assert done >= 6
    assert (workplace / "bench.html").is_file() and (workplace / "answers.jsonl").is_file()
    assert (workplace / "f16" / "parity.json").is_file() and len(list(workplace.glob("out*/config.json"))) == 2


@pytest.mark.parametrize("name", [*READMES, *SCALE, *PREFERENCE, *ADAPTERS, *EVALUATION, *DEPLOY])
def test_every_block_is_run_or_checked(name):
    for block in blocks(name):
        for line in block:
            program, *args = shlex.split(re.sub(r"^torchrun .* -m tunelet", "tunelet", line))
            if program in FOREIGN and name in DEPLOY:
                continue
            assert program in ("make", "tunelet"), line
            if program == "tunelet":
                known = commands(cli.app)
                assert any(tuple(args[: len(verb)]) == verb for verb in known), line
            else:
                told = subprocess.run(["make", "-n", *args], cwd=ROOT, capture_output=True, text=True)
                assert told.returncode == 0, told.stderr


@pytest.mark.parametrize(
    "names",
    [READMES, SCALE, PREFERENCE, ADAPTERS, EVALUATION, DEPLOY],
    ids=["readme", "scale", "preference", "adapters", "evaluation", "deploy"],
)
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
    figures = [set(re.findall(r"\d+(?:[.,]\d+)+|\d+e-\d+", text(name))) for name in names]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("name", READMES)
def test_every_verb_is_in_the_table(name):
    told = " ".join(inline(name))
    for verb in commands(cli.app):
        assert f"tunelet {verb[0]}" in told and verb[-1] in told, verb


@pytest.mark.parametrize("name", [*READMES, *SCALE, *PREFERENCE, *ADAPTERS, *EVALUATION, *DEPLOY, "CONTRIBUTING.md"])
def test_flags_and_files_named_exist(name):
    known = options() | {
        "--served-model-name",
        "--help",
        "--find-links",
        "--nproc-per-node",
        "--shutdown-timeout",
    }  # the last are torchrun's
    for part in inline(name):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", part):
            assert flag in known, f"{flag} in `{part}`"
    for target in re.findall(r"\]\(([^)#:]+)\)", text(name)):
        assert ((ROOT / name).parent / target).exists(), target
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

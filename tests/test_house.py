"""House rules that a machine can check: imports go one way, light modules stay light, files stay readable."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tunelet

SRC = Path(tunelet.__file__).parent
ROOT = SRC.parents[1]
HEAVY = ("torch", "transformers", "datasets", "peft", "pandas", "pyarrow", "sympy", "scipy", "sklearn")

# Who may import whom. A package may always import itself.
BOTTOM = {"errors", "recipe", "recipe_io", "recipe_names", "recipe_text", "starter"}
MAY: dict[str, set[str]] = {
    "__init__": set(),
    "errors": set(),
    "recipe": {"errors"},
    "recipe_names": {"errors"},
    "recipe_io": {"errors", "recipe", "recipe_names"},
    "recipe_text": {"errors", "recipe", "recipe_io"},
    "starter": {"errors"},
    "runs": {"errors", "recipe", "recipe_io", "recipe_text"},
    "data": BOTTOM,
    "models": BOTTOM | {"data", "runs"},
    "methods": BOTTOM | {"data", "models"},
    "infer": BOTTOM | {"data", "models", "runs"},
    "evals": BOTTOM | {"data", "models", "methods", "infer", "runs"},
    "train": BOTTOM | {"data", "models", "methods", "infer", "evals", "runs", "machine"},
    "machine": BOTTOM | {"models", "runs"},
    "domain": {"errors", "runs", "data", "infer"},
    "serve": {"errors", "data", "models", "infer", "runs"},
    "stages": {"errors", "recipe", "recipe_io", "runs"},
    "gates": {"errors", "recipe", "starter", "data", "evals", "runs"},
    "align": BOTTOM | {"gates", "stages", "data", "models", "methods", "infer", "evals", "train", "runs"},
    "sweep_grid": {"errors", "recipe", "recipe_io", "recipe_text"},
    "sweep_judge": {"errors", "align", "runs"},
    "sweep": BOTTOM | {"sweep_grid", "sweep_judge", "stages", "align", "models", "train", "runs"},
    "commands": BOTTOM
    | {"stages", "data", "models", "methods", "infer", "evals", "train", "runs", "align", "machine"}
    | {"sweep", "sweep_grid", "domain", "serve"},
    "cli": BOTTOM | {"commands"},
    "__main__": {"cli"},
}


def modules() -> list[Path]:
    return sorted(file for file in SRC.rglob("*.py"))


def part(file: Path) -> str:
    return file.relative_to(SRC).parts[0].removesuffix(".py")


def imported(file: Path) -> set[str]:
    """The parts of tunelet that a file imports anywhere, inside functions too; not under TYPE_CHECKING."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        names = []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = inside if node.module == "tunelet" else [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name == "tunelet" or name.startswith("tunelet."):
                below = name.split(".")[1] if "." in name else "__init__"
                there = (SRC / below).is_dir() or (SRC / f"{below}.py").exists()
                found.add(below if there else "__init__")
    return found


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(SRC)))
def test_imports_go_one_way(file):
    here = part(file)
    assert here in MAY, f"say in {Path(__file__).name} what {here} may import"
    assert imported(file) - {here, "__init__"} <= MAY[here]


def test_the_rule_has_no_circle():
    done: set[str] = set()
    while rest := {name: below - done for name, below in MAY.items() if name not in done}:
        free = {name for name, below in rest.items() if not below}
        assert free, f"a circle among {sorted(rest)}"
        done |= free


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(SRC)))
def test_files_stay_readable(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, "a file that passes 400 lines is asking to be two"
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "a file says what it is for, and not for"


def test_light_modules_import_nothing_heavy():
    """What `tunelet --help` and the light verbs import, in a fresh interpreter."""
    names = ["cli", "recipe_io", "recipe_text", "machine", "starter", "runs.record", "data.formats", "data.sources"]
    names += ["data.doctor", "data.examples", "infer.batch"]
    names += ["domain.build", "domain.export", "domain.pairs", "domain.writers", "domain.cloze"]
    code = f"import sys, importlib\nfor n in {names}: importlib.import_module('tunelet.' + n)\n"
    code += f"print(*[m for m in {HEAVY} if m in sys.modules])"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_env())
    assert told.returncode == 0, told.stderr
    assert told.stdout.split() == []


@pytest.mark.parametrize("first", ["tunelet.cli", "tunelet.align", "tunelet.data.render", "tunelet.infer.engine"])
def test_waiting_threads_sleep(first):
    """The OpenMP that torch loads has been told, whichever module comes first; a user's own choice stands."""
    code = f"import {first}, torch; torch.ones(1)"
    for given, expected in ((None, "PASSIVE"), ("active", "ACTIVE")):
        env = {**_env(), "OMP_DISPLAY_ENV": "true", **({"OMP_WAIT_POLICY": given} if given else {})}
        if given is None:
            env.pop("OMP_WAIT_POLICY", None)
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert told.returncode == 0, told.stderr
        lines = [line for line in told.stderr.splitlines() if "OMP_WAIT_POLICY" in line]
        if not lines:
            pytest.skip("this build of torch brings an OpenMP that does not tell its settings")
        assert all(expected in line.upper() for line in lines), lines


def test_help_answers_at_once():
    """<= 0.5 s of CPU for `tunelet --help`. The best of three: other work on the machine is not what is tested."""
    import resource

    best = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        told = subprocess.run([sys.executable, "-m", "tunelet", "--help"], capture_output=True, text=True, env=_env())
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert told.returncode == 0, told.stderr
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert best <= 0.5


def test_nothing_sends_or_unpickles():
    """No telemetry client and no pickle in the sources."""
    words = ("import pickle", "torch.load(", "import requests", "import httpx", "trackio", "wandb", "posthog", "sentry")
    found = [
        (str(file.relative_to(SRC)), word)
        for file in modules()
        for word in words
        if word in file.read_text(encoding="utf-8")
    ]
    assert not found


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(SRC.parent)}

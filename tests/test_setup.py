"""The set-up script: which torch it asks for, what it never does. No package is installed here."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import tomllib
import urllib.error
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_env():
    return load("scripts/setup_env.py")


def page(*files: str) -> str:
    return "\n".join(f'<a href="/whl/cpu/{file.replace("+", "%2B")}#sha256=ab">{file}</a><br/>' for file in files)


def test_the_wheel_of_this_python_and_machine_is_found(setup_env):
    html = page(
        "torch-2.12.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl",
        "torch-2.13.0+cpu-cp312-cp312-manylinux_2_28_x86_64.whl",
        "torch-2.13.0+cpu-cp311-cp311-win_amd64.whl",
        "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_aarch64.whl",
        "torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl",
    )
    args = {"version": "2.13.0", "python": "cp311"}
    found = setup_env.find_wheel(html, "https://host/whl/cpu/torch/", machine="x86_64", **args)
    assert found == "https://host/whl/cpu/torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl#sha256=ab"
    assert "aarch64" in setup_env.find_wheel(html, "https://host/whl/cpu/torch/", machine="aarch64", **args)
    assert setup_env.find_wheel(html, "https://host/", machine="riscv64", **args) is None
    assert setup_env.find_wheel("<html>moved</html>", "https://host/", machine="x86_64", **args) is None


def test_an_unreachable_index_is_told_and_cuda_stays_out(setup_env, monkeypatch):
    def refused(*_, **kw):
        assert kw["timeout"] <= 5, "a firewall must not cost minutes"
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(setup_env.urllib.request, "urlopen", refused)
    requirement, options, line = setup_env.cpu_torch()
    assert requirement == f"torch=={setup_env.TORCH}+cpu", "only a CPU build satisfies it"
    assert not options and "can't be reached" in line


def test_a_reachable_index_gives_its_wheel(setup_env, monkeypatch):
    name = f"torch-{setup_env.TORCH}+cpu-cp{sys.version_info.major}{sys.version_info.minor}"
    name += f"-cp{sys.version_info.major}{sys.version_info.minor}-manylinux_2_28_{setup_env.platform.machine()}.whl"
    monkeypatch.setattr(setup_env.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(page(name).encode()))
    requirement, options, _ = setup_env.cpu_torch()
    assert requirement.startswith(f"torch @ {setup_env.CPU_INDEX}/torch-") and not options
    monkeypatch.setattr(setup_env.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html></html>"))
    requirement, options, _ = setup_env.cpu_torch()
    assert requirement == f"torch=={setup_env.TORCH}+cpu" and setup_env.CPU_INDEX in options


def test_an_installed_torch_is_left_alone(setup_env, monkeypatch, capsys):
    monkeypatch.setattr(setup_env, "installed", lambda python: {"torch": "2.9.1+cu128"})
    monkeypatch.setattr(setup_env, "pip_install", lambda *_: pytest.fail("pip was asked"))
    setup_env.install_torch(Path("python"))
    assert "stays as it is" in capsys.readouterr().out


def test_a_cuda_build_is_refused_with_the_way_out(setup_env, monkeypatch):
    asked = []
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(setup_env, "installed", lambda python: {})
    monkeypatch.setattr(setup_env, "wants_cpu_build", lambda: True)
    monkeypatch.setattr(setup_env, "cpu_torch", lambda: (f"torch=={setup_env.TORCH}+cpu", [], "unreachable"))
    monkeypatch.setattr(setup_env, "pip_install", lambda _, *what: asked.append(what) or failed)
    monkeypatch.setattr(setup_env, "planned", lambda *_: ["torch", "nvidia-cublas", "triton"])
    with pytest.raises(setup_env.SetupError, match="PIP_FIND_LINKS"):
        setup_env.install_torch(Path("python"))
    assert [what for what in asked if what == (f"torch=={setup_env.TORCH}",)] == []


def test_cuda_packages_that_came_in_are_an_error(setup_env, monkeypatch):
    monkeypatch.setattr(setup_env, "wants_cpu_build", lambda: True)
    monkeypatch.setattr(setup_env, "installed", lambda python: {"torch": "2", "nvidia-cublas": "1", "triton": "3"})
    setup_env.check(Path("python"), {"nvidia-cublas", "triton", "torch"})
    with pytest.raises(setup_env.SetupError, match="nvidia-cublas"):
        setup_env.check(Path("python"), {"torch"})


def test_requirements_choose_torch_on_this_machine(setup_env, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    backend = load("scripts/torch-cpu/backend.py")
    monkeypatch.setattr(backend.setup_env, "wants_cpu_build", lambda: True)
    monkeypatch.setattr(backend.setup_env, "cpu_torch", lambda: ("torch==9+cpu", [], ""))
    wheel = tmp_path / backend.build_wheel(str(tmp_path))
    with zipfile.ZipFile(wheel) as archive:
        told = archive.read("tunelet_torch_cpu-1.dist-info/METADATA").decode()
    assert "Requires-Dist: torch==9+cpu" in told
    monkeypatch.setattr(backend.setup_env, "wants_cpu_build", lambda: False)
    with zipfile.ZipFile(tmp_path / backend.build_wheel(str(tmp_path))) as archive:
        assert "Requires-Dist" not in archive.read("tunelet_torch_cpu-1.dist-info/METADATA").decode()


def test_one_version_of_torch_everywhere(setup_env):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    torch = next(name for name in project["project"]["dependencies"] if name.startswith("torch"))
    ceiling = torch.rpartition("<")[2].split(".")
    tested = setup_env.TORCH.split(".")
    assert int(ceiling[1]) == int(tested[1]) + 1, "the ceiling is just above the version the tests run with"
    assert f"torch=={setup_env.TORCH}+cpu" in project["tool"]["uv"]["constraint-dependencies"][0]
    assert not [name for name in project["project"]["dependencies"] if "trl" in name], "a peer is never a dependency"

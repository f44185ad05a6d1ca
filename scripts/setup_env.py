"""Make .venv and install tunelet in it: what `make install`, `make demo` and `make test` run first. Only stdlib.

Not for a machine with its own environment (there: `pip install -e .`), and never a change to a torch that is installed.

    python scripts/setup_env.py [--venv .venv] [--extra dev] [--extra parity]

On Linux without an NVIDIA GPU torch's CPU build is taken: from PyTorch's CPU index, or, where that can't be reached,
from whatever pip is configured with (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL, pip.conf). CUDA packages are several GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = "2.13.0"  # the version the tests run with
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_NAMES = re.compile(r"^(nvidia|triton|cuda[-_])", re.IGNORECASE)
TIMEOUT_S = 5.0


class SetupError(Exception):
    """What went wrong and what to do; printed without a traceback."""


def has_nvidia_gpu() -> bool:
    """Whether the driver shows an NVIDIA GPU. A driver without a GPU counts as none."""
    smi = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    if not smi:
        return Path("/proc/driver/nvidia/version").exists() and bool(list(Path("/dev").glob("nvidia[0-9]*")))
    try:
        told = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return told.returncode == 0 and "GPU" in told.stdout


def wants_cpu_build() -> bool:
    """Only Linux wheels bring CUDA along; on macOS and Windows pip's torch is the small one."""
    return sys.platform == "linux" and not has_nvidia_gpu()


def find_wheel(page: str, base: str, *, version: str, python: str, machine: str) -> str | None:
    """The address of torch's CPU wheel on an index page (PEP 503), or None. `python`: "cp311"; `machine`: "x86_64"."""
    name = re.escape(f"torch-{version}+cpu-{python}-{python}-")
    for href in re.findall(r'href="([^"]+)"', page):
        file = urllib.parse.unquote(href.partition("#")[0].rpartition("/")[2])
        if re.fullmatch(rf"{name}(many)?linux\w*_{re.escape(machine)}\.whl", file):
            return urllib.parse.urljoin(base, href)
    return None


def cpu_torch(index: str = CPU_INDEX) -> tuple[str, list[str], str]:
    """(requirement, pip options, a line to print) for torch's CPU build, without asking pip.

    pip itself would retry an unreachable index for every package, minutes in all; one look at the page costs seconds.
    """
    address = f"{index}/torch/"
    try:
        context = ssl.create_default_context(cafile=os.environ.get("PIP_CERT") or None)
        with urllib.request.urlopen(address, timeout=TIMEOUT_S, context=context) as answer:
            page = answer.read().decode("utf-8", "replace")
    except (OSError, ValueError, urllib.error.URLError) as error:
        reason = getattr(error, "reason", error)
        line = f"PyTorch's CPU index can't be reached ({reason}); going on with what pip finds."
        return f"torch=={TORCH}+cpu", [], line
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    wheel = find_wheel(page, address, version=TORCH, python=python, machine=platform.machine())
    if wheel:
        return f"torch @ {wheel}", [], "torch: the CPU build from PyTorch's index."
    return f"torch=={TORCH}+cpu", ["--extra-index-url", index], "torch: the CPU build."


def run(command: list[str | Path], **kw: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], text=True, cwd=ROOT, **kw)  # type: ignore[call-overload]


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(venv: Path) -> Path:
    """The environment's Python; the environment is made where there is none, or where a broken one stands."""
    python = venv_python(venv)
    if python.exists() and run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return python
    print(f"Making {venv} with Python {platform.python_version()} ({sys.executable})", flush=True)
    made = run([sys.executable, "-m", "venv", *(["--clear"] if venv.exists() else []), venv], capture_output=True)
    if made.returncode:
        raise SetupError(
            f"the environment {venv} could not be made: {(made.stderr or made.stdout).strip().splitlines()[-1:]}\n"
            f"fix: on Debian and Ubuntu: sudo apt install python3.{sys.version_info.minor}-venv; "
            "or name another Python: make install PYTHON=/path/to/python3.11"
        )
    return python


def installed(python: Path) -> dict[str, str]:
    """{normalised name: version} of what the environment holds."""
    code = (
        "import importlib.metadata as m, json;"
        "names = {(d.metadata['Name'] or '').lower().replace('_', '-'): d.version for d in m.distributions()};"
        "print(json.dumps(names))"
    )
    told = run([python, "-c", code], capture_output=True)
    if told.returncode:
        raise SetupError(f"{python} does not run: {told.stderr.strip()}\nfix: delete that folder and try again")
    return json.loads(told.stdout)


def pip_install(python: Path, *what: str) -> subprocess.CompletedProcess[str]:
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    return run([python, "-m", "pip", "install", "--disable-pip-version-check", *quiet, *what])


def install_torch(python: Path) -> None:
    """torch's CPU build on Linux without an NVIDIA GPU, pip's torch elsewhere. An installed torch is left as it is."""
    have = installed(python)
    if "torch" in have:
        print(f"torch {have['torch']} is there and stays as it is.", flush=True)
        return
    if not wants_cpu_build():
        print("Installing torch", flush=True)
        if pip_install(python, f"torch=={TORCH}").returncode:
            raise SetupError(f"pip could not install torch {TORCH} (see above)\nfix: check the network, then try again")
        return
    requirement, options, line = cpu_torch()
    print(f"{line}\nInstalling torch (a download of about 190 MB where it is not at hand)", flush=True)
    if pip_install(python, requirement, *options).returncode == 0:
        return
    # No wheel is marked +cpu. Some platforms' plain wheels are CPU builds too: look before gigabytes are fetched.
    pip_install(python, "--upgrade", "pip>=24")  # older ones download in a dry run
    names = planned(python, f"torch=={TORCH}")
    cuda = sorted(name for name in names if CUDA_NAMES.match(name))
    if cuda or not names:
        raise SetupError(
            f"no CPU build of torch {TORCH} was found for Python {platform.python_version()} on {platform.machine()}"
            + (f"; pip would bring {len(cuda)} CUDA packages ({', '.join(cuda[:3])}, ...)" if cuda else "")
            + f"\nfix: let this machine reach {CPU_INDEX}, or put the wheel torch-{TORCH}+cpu in a folder and set "
            "PIP_FIND_LINKS=THAT_FOLDER, or use a Python that has one: make install PYTHON=python3.11"
        )
    if pip_install(python, f"torch=={TORCH}").returncode:
        raise SetupError("pip could not install torch (see above)\nfix: check the network, then try again")


def planned(python: Path, requirement: str) -> list[str]:
    """Names of what pip would install for `requirement`; empty where it finds nothing. Nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        told = run(
            [python, "-m", "pip", "install", "--quiet", "--dry-run", "--report", report, requirement],
            capture_output=True,
        )
        if told.returncode:
            return []
        return [item["metadata"]["name"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]


def install_tunelet(python: Path, extras: list[str]) -> None:
    """tunelet itself, editable, with torch held at the version that is there."""
    what = f".[{','.join(extras)}]" if extras else "."
    print(f"Installing tunelet{what[1:]} and what it needs", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "constraints.txt"
        held.write_text(f"torch=={installed(python)['torch']}\n", encoding="utf-8")
        if pip_install(python, "--editable", what, "--constraint", str(held)).returncode:
            raise SetupError(
                "pip could not install tunelet (see above)\n"
                "fix: check the network, then try again; if pip names a conflict with torch, remove .venv first"
            )


def check(python: Path, before: set[str]) -> None:
    """No CUDA package came in on a machine that cannot use it."""
    if not wants_cpu_build():
        return
    new = sorted(name for name in set(installed(python)) - before if CUDA_NAMES.match(name))
    if new:
        raise SetupError(f"CUDA packages came in: {', '.join(new)}\nfix: {python} -m pip uninstall -y {' '.join(new)}")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--venv", type=Path, default=ROOT / ".venv")
    options.add_argument(
        "--extra", action="append", default=[], help="an optional group of pyproject.toml: dev, hub, parity"
    )
    args = options.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 - an older Python gets a message, not a traceback
        print(
            f"tunelet needs Python 3.11 or newer, this is {platform.python_version()} ({sys.executable})",
            file=sys.stderr,
        )
        print("fix: install one, then: make install PYTHON=/path/to/python3.11", file=sys.stderr)
        return 2
    started = time.monotonic()
    venv = args.venv if args.venv.is_absolute() else ROOT / args.venv
    try:
        python = make_venv(venv)
        before = set(installed(python))
        install_torch(python)
        install_tunelet(python, args.extra)
        check(python, before)
    except SetupError as error:
        print(f"\nset-up stopped: {error}", file=sys.stderr)
        return 2
    (venv / "-".join([".installed", *args.extra])).touch()
    print(f"Ready after {time.monotonic() - started:.0f} s: {venv}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Starting a contestant in a fresh process, showing its progress, and getting its one line of JSON back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Importing tunelet sets these for itself; a peer must not get them. So they are looked at before.
USERS = {name: os.environ.get(name) for name in ("OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")}

from benchmarks import shapes  # noqa: E402
from tunelet.errors import TuneletError  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = ROOT / "build" / "benchmarks"


def scratch(options: Namespace) -> Path:
    """The folder for checkpoints and logs, there and writable. Raises TuneletError where it cannot be."""
    folder = Path(options.scratch or SCRATCH).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise TuneletError(
            f"{folder} cannot be written to.", why=str(error), fix="Name a folder: --scratch FOLDER"
        ) from error
    show(f"checkpoints and logs: {folder}")
    return folder


def checkpoint(base: Mapping[str, Any], shape: str) -> str:
    """The folder of the shape's checkpoint of random weights, written in a process of its own where it is not there."""
    there = shapes.written(shape, Path(base["scratch"]))
    return str(there or measure({**base, "task": "checkpoint", "shape": shape}, f"checkpoint {shape}")["model"])


def measure(spec: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Runs `python -m benchmarks.worker` on `spec` and returns what it printed.

    This process stays small: on Linux a child begins with its parent's peak of memory as its own. Raises TuneletError
    where the worker fails, with the end of its log (which stays; that of a success goes).
    """
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=spec["scratch"]))
    log = folder / "log.txt"
    (folder / "spec.json").write_text(json.dumps({**spec, "log": str(log)}), encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", str(folder / "spec.json")],
        cwd=ROOT,
        env=environment(spec["threads"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as worker:
        try:
            for line in worker.stderr:
                show(f"{label}: {line.rstrip()}", passing=True)
            out = worker.stdout.read()
            code = worker.wait()
        except BaseException:  # Ctrl-C, or a stop from outside: the worker must not go on alone
            worker.kill()
            raise
    if code == 2 and out.startswith("{"):
        raise TuneletError(f"{label}: {json.loads(out)['error']}")
    if code != 0 or not out.strip():
        shown = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-12:] if log.exists() else []
        raise TuneletError(
            f"{label} failed (exit code {code}).",
            why="\n".join(shown) or "it said nothing",
            fix=f"The whole log is {log}." + (" It was killed: probably for memory." if code in (-9, 137) else ""),
        )
    shutil.rmtree(folder)
    return json.loads(out)


def environment(threads: int) -> dict[str, str]:
    """What the user has, with as many threads for everybody, no network and no telemetry."""
    names = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    names |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    path = os.pathsep.join(p for p in (str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")) if p)
    env = {**os.environ, **names, "PYTHONPATH": path}
    for name, value in USERS.items():
        if value is None:
            env.pop(name, None)
    return env


def show(text: str, *, passing: bool = False) -> None:
    """A line on standard error; on a terminal a passing one is overwritten by the next."""
    if passing and sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{text[:150]}")
    elif sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{text}\n")
    else:
        sys.stderr.write(text + "\n")
    sys.stderr.flush()

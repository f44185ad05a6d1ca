"""Running a program that a model wrote, in a process that can do little but compute: off unless it is asked for.

What holds it in, without root and without any tool, on Linux (x86_64, aarch64):

- limits: CPU and wall-clock time, memory, open files; no core dumps; output goes nowhere; standard input is empty;
- seccomp: no process or thread is started, no signal sent, no socket made, no file written, changed, renamed or
  removed anywhere, no limit raised; root's privileges are dropped before;
- Landlock (Linux 5.13 and later, where it is switched on): no file is read but the standard library and the system's
  libraries, so no key, no home, no /etc/passwd, and no /proc;
- Python's audit hook refuses the same by name, for a readable reason in the verdict;
- an emptied environment, an empty working folder, no site-packages; the whole process group is killed at the end, and
  the process dies with its parent.

What does not: bugs of the kernel; side channels; that files exist, and their sizes (`stat`). Without Landlock it can
read what the user can; it has no way to send it off, but the text of its exception is in the verdict. A program runs
beside its tests in one process, so one that sets out to can forge its own pass (as with the reference): this holds in
what programs do to the machine. On other systems (macOS) only limits, the group and the hook are there, and a
program that sets out to can get around a hook: ask for that with `accept_weaker=True`, or use a container.
Not the building of programs (code.py) and not the child's side (code_jail.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError

WALLS = ("landlock", "seccomp", "hook")
START_SECONDS = 60.0  # of the child's own start, before the program's clock runs: a machine may be busy
LEAST_MEMORY_MB = 64
_JAIL = Path(__file__).with_name("code_jail.py")


@dataclass(frozen=True, slots=True)
class Verdict:
    """passed: the program ran to its end without an exception. why: what happened else, in a line, "" where it passed.
    walls: which of WALLS held it in."""

    passed: bool
    why: str
    walls: tuple[str, ...] = ()


def run(
    program: str,
    *,
    allow_execution: bool = False,
    seconds: float = 3.0,
    memory_mb: int = 512,
    accept_weaker: bool = False,
    walls: tuple[str, ...] = WALLS,
) -> Verdict:
    """Run `program` to its end in a limited process; see the module for what it can't do, and what isn't prevented.

    seconds: of wall-clock time, from the moment the process has confined itself. memory_mb: of address space.
    accept_weaker: run where seccomp can't be had. walls: those to put up; for tests of one alone.

    Raises TuneletError where execution was not allowed, the system can't confine it, or a limit is out of range.
    """
    if not allow_execution:
        raise TuneletError(
            "a program that a model wrote was not run",
            why="running it is off unless it is asked for: it may do anything a program can",
            fix="pass allow_execution=True, best in a container",
        )
    if not (seconds > 0 and math.isfinite(seconds)) or memory_mb < LEAST_MEMORY_MB:
        raise TuneletError(
            f"a limit of {seconds} s and {memory_mb} MB is out of range",
            why=f"a program needs a time, and Python itself takes about {LEAST_MEMORY_MB} MB",
            fix=f"give seconds > 0 and memory_mb >= {LEAST_MEMORY_MB}",
        )
    if os.name != "posix":
        raise TuneletError(
            "programs can't be run here",
            why="this system has no resource limits and no process groups",
            fix="use Linux, macOS, or Windows' subsystem for Linux",
        )
    required = () if accept_weaker else ("seccomp",)
    with tempfile.TemporaryDirectory(prefix="tunelet-code-") as scratch:
        return _confined(program, Path(scratch), seconds, memory_mb, walls, required)


def _confined(
    program: str, scratch: Path, seconds: float, memory_mb: int, walls: tuple[str, ...], required: tuple[str, ...]
) -> Verdict:
    secret = secrets.token_hex(16)  # an answer without it isn't the jail's
    ours, theirs = os.pipe()
    # -s -P and an empty environment are -I, which would not let the order of sets be fixed
    command = [sys.executable, "-s", "-P", "-S", "-B", str(_JAIL), str(theirs), str(math.ceil(seconds) + 1)]
    process = subprocess.Popen(
        [*command, str(memory_mb), ",".join(walls), ",".join(required)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PYTHONHASHSEED": "0"},
        cwd=scratch,
        pass_fds=(theirs,),
        start_new_session=True,
    )
    os.close(theirs)
    assert process.stdin
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin:  # it is told below that the child ended
            process.stdin.write(f"{secret}\n{program}".encode("utf-8", "surrogatepass"))
        told = _line(ours, START_SECONDS)
        standing = tuple((told or {}).get("walls", ()))
        if told is None or not set(required) <= set(standing):
            raise _unconfined(standing, told is not None)
        started = time.monotonic()
        said = _line(ours, seconds)
        late = time.monotonic() - started >= seconds
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already; macOS says so by the second
            os.killpg(process.pid, signal.SIGKILL)  # before wait(): until then the number is its own
        code = process.wait()
        os.close(ours)
    if said and said.get("secret") == secret:
        why = str(said["why"]).encode("utf-8", "backslashreplace").decode()  # half a character can't be stored
        return Verdict(bool(said["passed"]), why, standing)
    return Verdict(False, f"it was stopped after {seconds:g} s" if late else _death(code), standing)


def _line(descriptor: int, seconds: float) -> dict[str, Any] | None:
    """The next line, in JSON; None where none comes in time, or it is none. Reads no more than a verdict can be."""
    line, until = b"", time.monotonic() + seconds
    while not line.endswith(b"\n") and len(line) < 4096:
        if not select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
            return None
        got = os.read(descriptor, 1)
        if not got:
            return None
        line += got
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _death(code: int) -> str:
    """Why a child that left no verdict ended; its own SIGKILL at the end may have overtaken it."""
    if code < 0 and -code != signal.SIGKILL:
        return f"it died of {signal.Signals(-code).name}"
    return "it ended without a verdict"


def _unconfined(standing: tuple[str, ...], started: bool) -> TuneletError:
    if not started:
        return TuneletError(
            "the process that programs are run in does not start",
            why=f"{sys.executable} ended before it had confined itself",
            fix="try a larger memory_mb",
        )
    return TuneletError(
        "a program was not run: this system can't hold it in",
        why=f"seccomp is not to be had here; what stands is: {', '.join(standing) or 'nothing'}",
        fix="use Linux (x86_64 or aarch64) or a container, or accept_weaker=True to rely on limits and Python's hook",
    )

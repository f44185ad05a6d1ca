"""Annotators' files: one per person, only ever appended to, every line on the disk before it is confirmed.

Not for what follows from them (session.py, build.py).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import ValidationError

from tunelet.domain.records import Event
from tunelet.errors import TuneletError
from tunelet.runs import lock
from tunelet.runs.files import disk, sync

NAME = re.compile(r"[^\W_][\w-]{0,39}")  # also a file's name: no dot, no separator
LOCKS = ".locks"


def name_of(given: str) -> str:
    """The annotator's name. Raises TuneletError where it could not name a file, or would name one elsewhere."""
    name = given.strip()
    if not NAME.fullmatch(name):
        raise TuneletError(
            f"--as {given}: is no name for an annotator",
            why="it names a file: letters, digits, - and _, at most 40",
            fix="--as mina",
        )
    return name


class Log:
    """One annotator's events, in memory and on the disk."""

    def __init__(self, path: Path, events: list[Event]):
        self.path, self.events = path, events

    def append(self, event: Event) -> None:
        """Written and synced, then remembered: what the page shows as saved is."""
        line = (event.model_dump_json(exclude_defaults=True) + "\n").encode()
        with disk(self.path):
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                start = os.fstat(handle).st_size
                if os.write(handle, line) != len(line):  # the disk is full: half a line must not stay
                    os.ftruncate(handle, start)
                    raise TuneletError(f"Cannot write {self.path}.", why="the disk is full", fix="Free some space.")
                os.fsync(handle)
            finally:
                os.close(handle)
            if not start:
                sync(self.path.parent)
        self.events.append(event)


@contextlib.contextmanager
def opened(folder: Path, name: str, say: Callable[[str], None] = lambda text: None) -> Iterator[Log]:
    """The file of annotator `name` in `folder`, for this process alone. A last line that a crash cut off is taken
    away, and `say` is told.

    Raises TuneletError where someone is annotating under this name, or the file is broken elsewhere.
    """
    name = name_of(name)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.held(folder / LOCKS / name))
        except TuneletError as error:
            if "is in use" not in error.what:
                raise
            raise TuneletError(
                f"{name} is annotating already, in another window",
                why=error.why,
                fix="go on there, stop it with Ctrl-C, or take another name: --as NAME",
            ) from None
        path = folder / f"{name}.jsonl"
        half = _mend(path)
        if half:
            say(f"{path}: the last line was cut off by a crash ({half} bytes) and is taken away; all others are kept.")
        yield Log(path, _read(path))


def _mend(path: Path) -> int:
    """Bytes of a half-written last line, taken away. A whole line that lacks only its end is completed."""
    data = path.read_bytes() if path.is_file() else b""
    if not data or data.endswith(b"\n"):
        return 0
    start = data.rfind(b"\n") + 1
    with disk(path), path.open("r+b") as file:
        if _event(data[start:]) is not None:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
            lost = 0
        else:
            file.truncate(start)
            lost = len(data) - start
        file.flush()
        os.fsync(file.fileno())
    return lost


def _event(line: bytes) -> Event | None:
    try:
        return Event.model_validate_json(line)
    except ValidationError:
        return None


def _read(path: Path) -> list[Event]:
    """All whole lines: another process may be writing the last one."""
    data = path.read_bytes() if path.is_file() else b""
    lines = data.split(b"\n")[:-1]
    events = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        event = _event(line)
        if event is None or event.annotator != path.stem:
            why = "it is not an event" if event is None else f"it is {event.annotator}'s, in the file of {path.stem}"
            raise TuneletError(
                f"{path}, line {number}: can't be used: {line.decode('utf-8', 'replace')[:80]}",
                why=why,
                fix="mend or remove that line; the lines around it are not touched",
            )
        events.append(event)
    return events


def read_all(folder: Path) -> dict[str, list[Event]]:
    """annotator -> events, of all files in `folder`."""
    if not folder.is_dir():
        return {}
    return {path.stem: _read(path) for path in sorted(folder.glob("*.jsonl")) if NAME.fullmatch(path.stem)}

"""Writing files so that a reader sees the old one or the new one, never half of one; what goes wrong with a disk as
a clear error.

Not for what is in the files (record.py). No imports but the errors: anything that writes results may use it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError

# Prefix of files and folders in the making; only a kill leaves them behind, and the next opening of a run sweeps them.
TEMPORARY = ".tmp-"
LOCK = ".lock"  # carries the lock of a run's folder (lock.py)


def finite(value: Any) -> Any:
    """`value` as plain JSON values: NaN and infinities become None (JSON has neither), tensors' scalars numbers."""
    if hasattr(value, "item") and not isinstance(value, Mapping):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def write_atomically(path: Path, text: str) -> None:
    """Write `text` beside `path`, sync it, and rename it there: a reader sees the old file or the new one."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync a file or folder. Folders cannot be opened on Windows, which syncs renames itself."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file: Path) -> str:
    """Of the whole file, as hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


WRITABLE = "Choose an --out that can be written, or change the folder's permissions."
ROOM = "Free some space, or choose an --out on another disk, and run the same command again."
IN_THE_WAY = ("a file stands where a folder is needed", "Choose another --out, or move that file away.")
REASONS = {
    errno.ENOSPC: ("the disk is full", ROOM),
    errno.EDQUOT: ("your disk quota is used up", ROOM),
    errno.EROFS: ("the file system is read-only", "Choose an --out that can be written."),
    errno.EACCES: ("you may not write there", WRITABLE),
    errno.EPERM: ("you may not write there", WRITABLE),
    errno.ENOTDIR: IN_THE_WAY,
    errno.EEXIST: IN_THE_WAY,
}


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """What goes wrong with a disk (full, read-only, not permitted, a file in the way) as a TuneletError with `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in REASONS:
            raise
        why, fix = REASONS[error.errno]
        raise TuneletError(f"Cannot write {path}.", why=why, fix=fix) from error


@contextlib.contextmanager
def in_the_making(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place, whole and on the disk, when the block ends; after any error nothing
    of it is left, and what was at `out` stays. What a kill leaves is swept by the next try."""
    place = out.resolve()
    temporary, old = (place.with_name(f"{TEMPORARY}{kind}{place.name}") for kind in ("", "old-"))
    try:
        with disk(out):
            place.parent.mkdir(parents=True, exist_ok=True)
            for left in (temporary, old):
                shutil.rmtree(left, ignore_errors=True)
            temporary.mkdir()
        yield temporary
        with disk(out):
            for path in (*sorted(temporary.rglob("*")), temporary):
                sync(path)
            if place.exists():
                os.rename(place, old)
            os.rename(temporary, place)
            sync(place.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

"""One process at a time works in a run's folder: a lock that the system lets go when its process ends, however it ends.

Not for readers: reports and evaluations may look at a run while it is trained. Nothing can be stale after kill -9: the
lock is the system's (flock; on Windows a locked byte). The file `.lock` only carries it, names the process, and stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from tunelet.errors import TuneletError
from tunelet.runs.files import LOCK, disk

TAKEN = {errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
FAR = 2**20  # the byte that Windows locks: nobody else can read it, so it lies far behind the process' number


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is made where it is missing.

    Raises TuneletError where another process holds it or nothing can be written there.
    """
    path = folder / LOCK
    with disk(path):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _take(handle):
            raise TuneletError(
                f"{folder} is in use.",
                why=f"another process ({path.read_text() or 'just started'}) is working in it",
                fix="Wait until it has finished, stop it, or choose another --out.",
            )
        with disk(path):
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, f"process {os.getpid()}".encode())
        yield
    finally:
        os.close(handle)  # lets the lock go


def _take(handle: int) -> bool:
    """Lock an open file at once; False where another process has it."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Any other error: a file system without locks (some network shares). Training there goes on unguarded.
        return error.errno not in TAKEN
    return True

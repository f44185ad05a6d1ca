"""One process at a time in a run's folder; a killed one leaves nothing stale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tunelet
from tunelet.errors import TuneletError
from tunelet.recipe import Recipe
from tunelet.runs import lock
from tunelet.runs.record import Run, must_be_free

HOLDER = """
import sys, time
from pathlib import Path
from tunelet.runs import lock
with lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(Path(tunelet.__file__).parents[1])}
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], env=env, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.communicate()


def test_another_process_is_refused_until_it_is_killed(tmp_path, holder):
    with pytest.raises(TuneletError, match="in use") as caught, lock.held(tmp_path / "run"):
        pass
    assert str(holder.pid) in caught.value.why and caught.value.fix
    holder.kill()
    holder.wait()
    with lock.held(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"process {os.getpid()}"


def test_the_lock_goes_with_the_block_also_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), lock.held(tmp_path):
        raise ZeroDivisionError
    with lock.held(tmp_path), pytest.raises(TuneletError, match="in use"), lock.held(tmp_path):
        pass
    with lock.held(tmp_path):
        pass


def test_a_folder_with_a_lock_alone_is_free(tmp_path):
    """What a kill between the lock and the first file leaves."""
    with lock.held(tmp_path / "run"):
        must_be_free(tmp_path / "run")
    Run.create(tmp_path / "run", Recipe())
    with lock.held(tmp_path / "run"):
        Run.open_or_create(tmp_path / "run", Recipe())  # its sweep of half-made files leaves the lock alone
        with pytest.raises(TuneletError, match="in use"), lock.held(tmp_path / "run"):
            pass


@pytest.mark.skipif(os.name == "nt", reason="fcntl")
def test_file_systems_without_locks_go_on_unguarded(tmp_path, monkeypatch):
    import errno
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with lock.held(tmp_path), lock.held(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TuneletError, match="Cannot write"), lock.held(tmp_path / "file" / "run"):
        pass

"""Annotators' files: appended to, whole after a crash, one person each."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tunelet.domain import annotations
from tunelet.domain.records import Event
from tunelet.errors import TuneletError


def event(item="q1", kind="choose", annotator="mina", **more):
    more = {"choice": 1} | more if kind == "choose" else more
    return Event(at="2026-01-01T00:00:00+00:00", annotator=annotator, item=item, kind=kind, **more)


def test_appended_and_read_again(tmp_path):
    with annotations.opened(tmp_path, "mina") as log:
        log.append(event("q1"))
        log.append(event("q2", "reject", reason="unclear", note="무슨 뜻?"))
    with annotations.opened(tmp_path, "mina") as log:
        assert [one.item for one in log.events] == ["q1", "q2"]
        log.append(event("q3"))
    lines = (tmp_path / "mina.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and json.loads(lines[1])["note"] == "무슨 뜻?"
    assert list(annotations.read_all(tmp_path)) == ["mina"]


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_half_written_line_is_dropped_with_a_word(tmp_path, cut):
    path = tmp_path / "mina.jsonl"
    with annotations.opened(tmp_path, "mina") as log:
        log.append(event("q1"))
        log.append(event("q2", "reject", reason="unclear", note="둘째"))
    whole = path.read_bytes()
    path.write_bytes(whole[: -1 - cut])
    assert len(annotations.read_all(tmp_path)["mina"]) == 1  # a reader passes it by, and changes nothing
    told = []
    with annotations.opened(tmp_path, "mina", told.append) as log:
        assert [one.item for one in log.events] == ["q1"]
        log.append(event("q2"))
    assert len(told) == 1 and "cut off by a crash" in told[0]
    assert [json.loads(line)["item"] for line in path.read_text().splitlines()] == ["q1", "q2"]


def test_a_whole_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "mina.jsonl"
    with annotations.opened(tmp_path, "mina") as log:
        log.append(event("q1"))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    told = []
    with annotations.opened(tmp_path, "mina", told.append) as log:
        assert len(log.events) == 1 and not told
        log.append(event("q2"))
    assert len(path.read_text().splitlines()) == 2


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "mina.jsonl"
    path.write_text("not json\n" + event().model_dump_json() + "\n")
    with pytest.raises(TuneletError, match=r"mina.jsonl, line 1: can't be used"), annotations.opened(tmp_path, "mina"):
        pass
    path.write_text(event(annotator="other").model_dump_json() + "\n")
    with pytest.raises(TuneletError) as error:
        annotations.read_all(tmp_path)
    assert "other's, in the file of mina" in error.value.why
    assert path.read_text().count("\n") == 1  # nothing is changed


@pytest.mark.parametrize("name", ["", "../mina", "a/b", "..", ".hidden", "a b", "x" * 41, "con.txt", "a\0", "-x"])
def test_names_that_could_lead_elsewhere(tmp_path, name):
    with pytest.raises(TuneletError, match="is no name"):
        annotations.name_of(name)


def test_korean_names():
    assert annotations.name_of(" 민아 ") == "민아"


def test_one_name_at_once(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tunelet.domain import annotations\n"
        "with annotations.opened(Path(sys.argv[1]), 'mina'):\n print('in', flush=True); sys.stdin.read()\n"
    )
    with annotations.opened(tmp_path, "other"):
        pass
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert other.stdout.readline() == b"in\n"
        with pytest.raises(TuneletError, match="annotating already"), annotations.opened(tmp_path, "mina"):
            pass
        with annotations.opened(tmp_path, "jun"):  # others may
            pass
    finally:
        other.communicate()
    with annotations.opened(tmp_path, "mina"):  # and the name is free when its process has ended
        pass


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    with annotations.opened(tmp_path, "mina") as log:
        log.append(event("q1"))
        write = os.write
        monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:10]))
        with pytest.raises(TuneletError, match="Cannot write"):
            log.append(event("q2"))
        monkeypatch.undo()
        assert [one.item for one in log.events] == ["q1"]
    assert len(annotations.read_all(tmp_path)["mina"]) == 1
    assert (tmp_path / "mina.jsonl").read_bytes().endswith(b"\n")

"""A domain project's folder: what lies where, made in one piece, read with lines named.

    DOMAIN/
      domain.toml       name, writer, seed, where the documents were
      documents.jsonl   path, sha256, title
      chunks.jsonl      passages
      questions.jsonl   as the writer made them
      account.json      how many were asked for, kept and dropped, by reason
      annotations/NAME.jsonl   appended to, one file a person
      dataset/v1/ ...   built: test.jsonl, card.md, provenance.json, task.toml
      task.toml         the newest version as a task of `tunelet eval`

Not for documents (chunks.py), annotators' files (annotations.py) or the data set (build.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tunelet.domain.chunks import Read
from tunelet.domain.questions import Account
from tunelet.domain.records import Chunk, Document, Question, Strict
from tunelet.errors import TuneletError
from tunelet.runs.files import TEMPORARY, disk, sync, write_atomically

FILE = "domain.toml"
ANNOTATIONS = "annotations"
Record = TypeVar("Record", bound=BaseModel)


class Settings(Strict):
    """domain.toml. source: the folder of the documents, as it was named; size: characters of a chunk."""

    name: str
    source: str
    writer: str
    seed: int = 0
    size: int
    created: str
    tunelet: str


class Project:
    """An opened project. Raises TuneletError where the folder is none or a line of its files is broken."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / FILE
        if not path.is_file():
            fix = "tunelet domain new DOCS/ --out DIR makes one"
            raise TuneletError(f"{folder}: is no domain project", why=f"it holds no {FILE}", fix=fix)
        try:
            self.settings = Settings.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
            raise TuneletError(f"{path}: can't be read", why=str(error).splitlines()[0], fix="mend that file") from None
        self.documents = read_records(folder / "documents.jsonl", Document)
        self.chunks = {chunk.id: chunk for chunk in read_records(folder / "chunks.jsonl", Chunk)}
        self.questions = read_records(folder / "questions.jsonl", Question)
        for number, question in enumerate(self.questions, 1):
            if question.chunk not in self.chunks:
                raise TuneletError(
                    f"{folder / 'questions.jsonl'}, line {number}: its chunk {question.chunk} is not in chunks.jsonl",
                    fix="restore both files as they were made",
                )
        account = folder / "account.json"
        self.account: dict[str, Any] = json.loads(account.read_text(encoding="utf-8")) if account.is_file() else {}

    @property
    def annotations(self) -> Path:
        return self.folder / ANNOTATIONS


def check_free(folder: Path) -> None:
    """Raises TuneletError where no project can be made in `folder`."""
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        is_one = (folder / FILE).is_file()
        raise TuneletError(
            f"{folder}: is there already",
            why="it is a domain project, with people's answers perhaps" if is_one else "it is not written over",
            fix=f"tunelet domain status {folder} shows it; choose another folder for a new one"
            if is_one
            else "choose another folder",
        )


def create(folder: Path, settings: Settings, read: Read, questions: list[Question], account: Account) -> Project:
    """Write the project beside its place and rename it there: it is whole or not there."""
    import tomli_w

    check_free(folder)
    making = folder.with_name(f"{TEMPORARY}{folder.name}")
    with disk(folder):
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        write_atomically(making / FILE, tomli_w.dumps(settings.model_dump()))
        write_records(making / "documents.jsonl", read.documents)
        write_records(making / "chunks.jsonl", read.chunks)
        write_records(making / "questions.jsonl", questions)
        told = account.as_dict() | {"skipped_files": read.skipped}
        write_atomically(making / "account.json", json.dumps(told, ensure_ascii=False, indent=1) + "\n")
        (making / ANNOTATIONS).mkdir()
        if folder.is_dir():
            folder.rmdir()  # empty, as check_free saw; Windows renames onto no folder
        os.replace(making, folder)
        sync(folder.parent)
    return Project(folder)


def write_records(path: Path, records: Iterable[BaseModel]) -> None:
    write_atomically(path, "".join(record.model_dump_json() + "\n" for record in records))


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """All lines of a JSONL file as `kind`. Raises TuneletError that names the first line that is none, or where an id
    is there twice."""
    if not path.is_file():
        raise TuneletError(f"{path}: is missing", fix="restore it, or make the project again")
    out: list[Record] = []
    seen: set[str] = set()
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = kind.model_validate_json(line)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise TuneletError(
                f"{path}, line {number}: {where or 'it'}: {problem['msg']}", fix="mend that line"
            ) from None
        key = getattr(record, "id", None)
        if key is not None and key in seen:
            raise TuneletError(f"{path}, line {number}: the id {key} is there twice", fix="remove one of the lines")
        seen.add(str(key))
        out.append(record)
    return out


def slug(text: str) -> str:
    """A name that a task may have: letters, digits, - and _."""
    return re.sub(r"[^\w-]+", "-", text).strip("-") or "domain"

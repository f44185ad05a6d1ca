"""Where rows come from: the starter, a file, a folder, a hub id. A broken row is a finding, the others are read on.

Not for what a row means: that is formats.py. How the bytes of one file become rows is readers.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tunelet.data import readers
from tunelet.data.decode import ENDINGS, Note, kind_of
from tunelet.data.examples import Finding, Origin
from tunelet.errors import TuneletError, did_you_mean

# A folder often carries these beside its data; they are not data.
NOT_DATA = ("readme", "license", "licence", "notice", "changelog", "requirements", "dataset_info", "dataset_infos")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+){0,2}$")
PROBE_SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its source: an object (any JSON value in fact), or a string for plain text."""

    origin: Origin
    value: Any


@dataclass(frozen=True)
class Rows:
    """What a source held. `broken` counts, by reason, the rows that are not in `rows` but have an error finding."""

    source: str
    rows: list[Row]
    findings: list[Finding]
    broken: dict[str, int] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)


def read_rows(source: str, *, kind: str = "chat", seed: int = 0, split: str = "train", limit: int = 0) -> Rows:
    """All rows of `source` in order (the first `limit` of them where limit > 0).

    `source` is "starter", an existing file or folder (never a hub id), else a hub id `org/name[:config[:split]]`.
    `kind` and `split` say which of the starter's texts are meant ("chat", "text", "preference"; "train", "test").
    Raises TuneletError where the source as a whole cannot be read; a broken row is a finding, not an exception.
    """
    if source == "starter":
        return _starter(kind, split, seed, limit)
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, source, limit)
    if path.exists():
        return _files([path], source, limit)
    if _looks_like_a_path(source):
        raise _missing(path, source)
    return _hub(source, limit)


def _looks_like_a_path(source: str) -> bool:
    """Whether a name that does not exist was meant as a file: it ends as a data file does, or is written as a path."""
    return bool(
        kind_of(Path(source))
        or source.startswith((".", "/", "~", "\\"))
        or source.endswith("/")
        or source.count("/") > 1
        or "\\" in source
        or not HUB_ID.match(source)
    )


def _missing(path: Path, source: str) -> TuneletError:
    parent = path.parent
    if not parent.is_dir():
        return TuneletError(
            f"there is no file or folder '{source}'",
            why=f"its folder '{parent}' does not exist either (looked from {Path.cwd()})",
            fix="give the path of a data file or folder, or 'starter'",
        )
    near = did_you_mean(path.name, [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")])
    return TuneletError(
        f"there is no file or folder '{source}'",
        why=f"'{parent if str(parent) != '.' else Path.cwd()}' holds no '{path.name}'.{near}",
        fix="give the path of a data file or folder, or 'starter'",
    )


def _files(paths: list[Path], source: str, limit: int) -> Rows:
    rows: list[Row] = []
    findings: list[Finding] = []
    broken: dict[str, int] = {}
    hashes: dict[str, str] = {}
    for path in paths:
        left = limit - len(rows) - sum(broken.values()) if limit else 0
        if limit and left <= 0:
            break
        data = _bytes(path)
        hashes[str(path)] = hashlib.sha256(data).hexdigest()
        for item in readers.read(path, data):
            if isinstance(item, Note):  # said about the file, not about a row
                findings.append(item.finding)
            elif isinstance(item, Finding):
                findings.append(item)
                broken[item.kind] = broken.get(item.kind, 0) + 1
                left -= 1
            else:
                rows.append(Row(*item))
                left -= 1
            if limit and left <= 0:
                break
    return Rows(source, rows, findings, broken, hashes)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError as error:
        raise TuneletError(
            f"{path} cannot be read", why=str(error.strerror), fix=f"allow reading it: chmod u+r '{path}'"
        ) from error
    except OSError as error:
        raise TuneletError(
            f"{path} cannot be read", why=str(error), fix="check the disk and the path, then run the command again"
        ) from error


def data_files(folder: Path) -> list[Path]:
    """The data files of a folder and those in it, sorted; hidden files, READMEs, licences and the like are not data."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if any(part.startswith((".", "__")) for part in parts) or not path.is_file() or not kind_of(path):
            continue
        if path.name.lower().split(".")[0] in NOT_DATA:
            continue
        found.append(path)
    return found


def _folder(folder: Path, source: str, limit: int) -> Rows:
    files = data_files(folder)
    if not files:
        raise TuneletError(
            f"the folder '{source}' holds no data file",
            why=f"looked for files ending in {', '.join(ENDINGS)} (and .gz of them); hidden files do not count",
            fix="give the folder that holds the data, or a file",
        )
    return _files(files, source, limit)


def _starter(kind: str, split: str, seed: int, limit: int) -> Rows:
    from tunelet import starter

    rows = []
    digest = hashlib.sha256()
    kind = "preference" if kind == "labelled" else kind  # single verdicts are made of pairs
    for number, value in enumerate(starter.rows(kind, split, n=limit or None, seed=seed), start=1):
        rows.append(Row(Origin(f"starter {kind}/{split}", number, "row"), value))
        digest.update(json.dumps(value, ensure_ascii=False, sort_keys=True, default=str).encode())
    return Rows("starter", rows, [], {}, {f"starter {kind}/{split}": digest.hexdigest()})


# Hub ---------------------------------------------------------------------------------------------------------------


def offline_asked() -> bool:
    """Whether the environment says that the hub must not be asked."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").strip().lower() in ("1", "true", "yes", "on") for name in names)


def hub_reachable(seconds: float = PROBE_SECONDS) -> bool:
    """Whether the hub (or the proxy to it) takes a connection within `seconds`: the libraries retry for most of
    a minute before they say no. In a thread, since looking up a name has no time limit of its own."""
    target = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or os.environ.get("HF_ENDPOINT", "")
    address = urlsplit(target if "//" in target else f"//{target}" if target else "//huggingface.co")
    reached: list[bool] = []

    def probe() -> None:
        try:
            socket.create_connection(
                (address.hostname or "huggingface.co", address.port or 443), timeout=seconds
            ).close()
            reached.append(True)
        except OSError:
            reached.append(False)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(reached and reached[0])


def _hub(source: str, limit: int, load: Callable[..., Any] | None = None) -> Rows:
    name, *rest = source.split(":")
    config, split = (rest + [""] * 2)[:2]
    asked = offline_asked()
    offline = asked or not hub_reachable()
    if offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when datasets is imported
        if not _in_cache(name):
            because = (
                "HF_HUB_OFFLINE asks for no network" if asked else "the hub does not answer: this machine is offline"
            )
            raise TuneletError(
                f"'{source}' is no file or folder here, and the hub cannot be asked for it",
                why=f"{because}, and '{name}' is not in the local cache",
                fix="give the path of a local file, or run once with a network so that it is cached",
            )
    if load is None:
        from datasets import load_dataset as load
    try:
        table = load(name, config or None, split=split or "train")
    except (OSError, ValueError, KeyError) as error:  # datasets' own errors derive from these
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TuneletError(
            f"the data set '{source}' cannot be loaded from the hub",
            why=first,
            fix="check its name; configuration and split follow after colons: org/name:config:split",
        ) from error
    rows = []
    for number, value in enumerate(table, start=1):
        if limit and number > limit:
            break
        rows.append(Row(Origin(source, number, "row"), value))
    return Rows(source, rows, [], {}, {source: str(getattr(table, "_fingerprint", ""))})


def _in_cache(name: str) -> bool:
    """Whether the hub's cache or that of datasets holds anything of this data set; looked up without importing them."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub") / ("datasets--" + name.replace("/", "--"))
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets") / name.replace("/", "___")
    return hub.is_dir() or prepared.is_dir()

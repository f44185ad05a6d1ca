"""Bytes -> text, and what is said where the bytes are not UTF-8; the small shapes that all readers of files share.

Not for parsing: json_rows.py and tables.py do that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunelet.data.examples import Finding, Origin

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
# Half of a surrogate pair. Bytes that are not UTF-8 are decoded to U+DC80..U+DCFF, and stay in their row until named.
SURROGATE = re.compile("[\ud800-\udfff]")
STRAY_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class Note:
    """A finding about the file as a whole: no row is lost by it."""

    finding: Finding


Item = tuple[Origin, Any] | Finding | Note


def kind_of(path: Path) -> str:
    """The ending that says how to read `path` ('.gz' taken off), '' where it is no data file."""
    name = path.name.lower().removesuffix(".gz")
    return next((ending for ending in ENDINGS if name.endswith(ending)), "")


def guess_encoding(data: bytes) -> str:
    """The likeliest encoding of bytes that are not UTF-8, by which decodes them to letters. For advice only."""
    try:
        text = data.decode("cp949")
    except UnicodeDecodeError:
        return "CP1252"
    hangul = sum("가" <= character <= "힣" for character in text)
    beyond = sum(character > "\x7f" for character in text)
    return "CP949" if hangul > 0.8 * beyond else "CP1252"


def wrong_encoding(origin: Origin, text: str) -> Finding:
    """The finding for a row decoded with `surrogateescape` that kept stray bytes; the byte is counted within `text`."""
    at = STRAY_BYTE.search(text).start()
    raw = text.encode("utf-8", "surrogateescape")
    before = len(text[:at].encode("utf-8", "surrogateescape"))
    path = Path(origin.file)
    return Finding(
        "wrong_encoding",
        "error",
        f"byte {before + 1} of the row (0x{raw[before]:02x}) is not UTF-8",
        origin,
        f"iconv -f {guess_encoding(raw)} -t UTF-8 '{path.name}' > 'utf8-{path.name}'",
    )

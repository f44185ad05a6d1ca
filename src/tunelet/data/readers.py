"""The bytes of one data file -> its rows, each with its line; whatever is broken becomes a finding that names the line.

Not for choosing files (sources.py) nor for what a row means (formats.py). Nothing here raises for bad content.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tunelet.data import json_rows, tables
from tunelet.data.decode import ENDINGS, Item, Note, kind_of
from tunelet.data.examples import Finding, Origin

READERS: dict[str, Callable[[str, bytes], Iterator[Item]]] = {
    ".jsonl": json_rows.lines,
    ".ndjson": json_rows.lines,
    ".json": json_rows.document,
    ".csv": tables.csv_rows,
    ".tsv": tables.tsv_rows,
    ".parquet": tables.parquet_rows,
    ".txt": tables.text_rows,
}


def read(path: Path, data: bytes) -> Iterator[Item]:
    """Rows and findings of one file in order. Every Finding that is yielded bare stands for one row that was lost."""
    file = str(path)
    kind = kind_of(path)
    if not kind:
        yield Finding(
            "unknown_file",
            "error",
            f"'{path.name}' ends in none of {', '.join(ENDINGS)}",
            Origin(file, 1),
            "convert it to JSONL or CSV and give it that ending",
        )
        return
    if path.name.lower().endswith(".gz") or data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            yield Finding(
                "broken_gzip",
                "error",
                f"the gzip file is damaged: {error}",
                Origin(file, 1),
                "download or pack it again",
            )
            return
    if not data.strip(b" \t\r\n\x00\xef\xbb\xbf"):
        yield Note(Finding("empty_file", "error", "the file is empty", Origin(file, 1), "give a file that holds rows"))
        return
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") and kind != ".parquet":
        yield Finding(
            "wrong_encoding",
            "error",
            "the file is UTF-16 (its first two bytes are a UTF-16 mark), UTF-8 is read",
            Origin(file, 1),
            f"iconv -f UTF-16 -t UTF-8 '{path.name}' > utf8{kind}",
        )
        return
    yield from READERS[kind](file, data.removeprefix(b"\xef\xbb\xbf"))

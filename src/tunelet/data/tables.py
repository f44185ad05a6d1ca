"""Tables and plain text -> rows: CSV, TSV, Parquet, .txt. A row that cannot be read becomes a finding with its line.

Not for choosing columns: which column is the prompt is decided in formats.py.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator

from tunelet.data import detect
from tunelet.data.decode import STRAY_BYTE, Item, Note, wrong_encoding
from tunelet.data.examples import Finding, Origin

SEPARATOR = "<|endoftext|>"
# Names that stand in a header only; a table with one of them may call other columns 1, 2, 3.
KNOWN = {*detect.LISTS, *detect.TEXTS, *detect.PROMPT_LIKE, "answer", "output", "response", "completion", "label"}
# A cell of a real table may be a whole document; the csv module refuses more than 131,072 characters unless told.
csv.field_size_limit(2**31 - 1)


def csv_rows(file: str, data: bytes) -> Iterator[Item]:
    """Comma-separated rows under a header line, as RFC 4180 has them."""
    return _table(file, data, ",")


def tsv_rows(file: str, data: bytes) -> Iterator[Item]:
    """Tab-separated rows under a header line."""
    return _table(file, data, "\t")


def _table(file: str, data: bytes, delimiter: str) -> Iterator[Item]:
    text = data.decode("utf-8", "surrogateescape")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header: list[str] | None = None
    at = 1
    while True:
        origin = Origin(file, at)
        try:
            cells = next(reader, None)
        except csv.Error as error:  # a lone carriage return in an unquoted cell, mostly
            yield Finding("broken_csv", "error", f"not CSV: {error}", origin, "put the cell in double quotes")
            at = reader.line_num + 1
            continue
        if cells is None:
            break
        at = reader.line_num + 1
        if not cells or cells == [""]:
            continue
        if header is None:
            header, notes = _header(origin, cells, delimiter)
            yield from notes
        else:
            yield _cells(origin, header, cells, delimiter, reader.line_num)
    if header is not None and text.count('"') % 2:
        yield Note(
            Finding(
                "unbalanced_quotes",
                "warning",
                "the file holds an odd number of double quotes: rows after the open one may have run together",
                Origin(file, 1),
                'write a double quote inside a cell twice ("")',
            )
        )


def _header(origin: Origin, cells: list[str], delimiter: str) -> tuple[list[str], list[Note]]:
    """Column names, each one unique, and what is wrong with them."""
    notes = []
    names: list[str] = []
    for number, cell in enumerate(cells, start=1):
        name = cell.strip() or f"column {number}"  # an index column without a name is what pandas writes
        if name in names:
            notes.append(
                Note(
                    Finding(
                        "duplicate_header",
                        "error",
                        f"two columns are named '{name}'",
                        origin,
                        f"rename one of them; the second is read as '{name} {number}'",
                    )
                )
            )
            name = f"{name} {number}"
        names.append(name)
    other = {",": "\t", "\t": ","}[delimiter]
    if len(names) == 1 and any(sign in names[0] for sign in (other, ";")):
        notes.append(
            Note(
                Finding(
                    "wrong_delimiter",
                    "error",
                    f"the header is one column, '{names[0][:40]}'",
                    origin,
                    "separate by commas in a .csv, by tabs in a .tsv",
                )
            )
        )
    elif not KNOWN.intersection(map(str.lower, names)) and any(map(_looks_like_data, names)):
        notes.append(
            Note(
                Finding(
                    "missing_header",
                    "error",
                    f"the first line looks like data, not like column names: '{', '.join(names)[:60]}'",
                    origin,
                    "put a line with the columns' names first, for instance prompt,completion",
                )
            )
        )
    return names, notes


def _looks_like_data(name: str) -> bool:
    """A number or a whole sentence is no name of a column: the first row was taken for a header."""
    return len(name) > 64 or name.replace(".", "").isdigit() or bool(re.search(r"\s\S*[.?!]$", name))


def _cells(origin: Origin, header: list[str], cells: list[str], delimiter: str, last_line: int) -> Item:
    joined = delimiter.join(cells)
    if STRAY_BYTE.search(joined):
        return wrong_encoding(origin, joined)
    if len(cells) != len(header):
        more = "a comma inside a cell without quotes?" if len(cells) > len(header) else "a cell is missing"
        if last_line - origin.line > 20:
            more = f"it runs on to line {last_line}: a double quote was not closed?"
        return Finding(
            "ragged_row",
            "error",
            f"the row has {len(cells)} cells, the header {len(header)}: {more}",
            origin,
            "put cells that hold the delimiter in double quotes, and leave none out",
        )
    return origin, dict(zip(header, cells, strict=True))


def parquet_rows(file: str, data: bytes) -> Iterator[Item]:
    """Rows of a Parquet file, row group by row group; lists and structs become lists and dicts."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        for batch in table.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Origin(file, number, "row"), value
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines()[0]
        yield Finding(
            "broken_parquet",
            "error",
            f"not readable as Parquet after row {number}: {reason}",
            Origin(file, number + 1, "row"),
            "download or write the file again",
        )


def text_rows(file: str, data: bytes) -> Iterator[Item]:
    """Documents of a text file: separated by <|endoftext|> where that occurs, else the whole file is one document."""
    text = data.decode("utf-8", "surrogateescape")
    if "\r" in text:
        text = re.sub("\r\n?", "\n", text)
    line = 1
    for piece in text.split(SEPARATOR):
        start = line + (len(piece) - len(piece.lstrip("\n"))) if piece.strip() else line
        line += piece.count("\n")
        document = piece.strip("\n") if SEPARATOR in text else piece
        if not document.strip():
            continue
        origin = Origin(file, start)
        yield wrong_encoding(origin, document) if STRAY_BYTE.search(document) else (origin, document)

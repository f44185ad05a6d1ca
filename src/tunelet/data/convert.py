"""Examples -> JSONL that `formats.load` reads back to equal examples. All rows or no file.

Not for choosing what to write: formats.py converts, doctor.py mends.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tunelet.data.examples import Chat, Example, Labelled, Message, Text
from tunelet.errors import TuneletError


def row_of(example: Example) -> dict[str, Any]:
    """An example as one row: messages (with tools, and weight 0 where a turn is not trained), text, or a preference."""
    if isinstance(example, Text):
        return {"text": example.text}
    tools = {"tools": list(example.tools)} if example.tools else {}
    if isinstance(example, Chat):
        return {"messages": _turns(example.messages), **tools}
    if isinstance(example, Labelled):
        row = {"prompt": _turns(example.prompt), "completion": _turns(example.completion), "label": example.label}
        return {**row, **tools}
    return {name: _turns(getattr(example, name)) for name in ("prompt", "chosen", "rejected")} | tools


def _turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    return [m.as_dict() if m.weight == 1 else {**m.as_dict(), "weight": m.weight} for m in messages]


def write_jsonl(examples: Iterable[Example], file: Path) -> int:
    """Writes the rows to a new file; how many there are. Raises TuneletError where the file is there already."""
    if file.exists():
        raise TuneletError(
            f"{file} is there already", why="it is not written over", fix="choose another file, or delete it"
        )
    half = file.with_name(f".{file.name}.part")
    count = 0
    try:
        with half.open("w", encoding="utf-8") as out:
            for example in examples:
                out.write(json.dumps(row_of(example), ensure_ascii=False) + "\n")
                count += 1
            out.flush()
            os.fsync(out.fileno())
        half.replace(file)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise TuneletError(
            f"{file} cannot be written", why=str(error), fix="choose a folder with room that you may write to"
        ) from error
    return count

"""JSON and JSON lines -> rows: one finding for each broken one, whatever is left of the file is still read.

Not for what a row means: formats.py decides that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from tunelet.data.decode import STRAY_BYTE, SURROGATE, Item, Note, wrong_encoding
from tunelet.data.examples import Finding, Origin


class DuplicateKey(ValueError):
    """An object names a key twice with different values: which one is meant cannot be known."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        first: dict[str, Any] = {}
        for key, value in pairs:
            if key in first and first[key] != value:
                raise DuplicateKey(key)
            first.setdefault(key, value)
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def _broken(origin: Origin, error: Exception, text: str) -> Finding:
    """What is wrong with a piece of JSON, in words."""
    if isinstance(error, DuplicateKey):
        return Finding(
            "duplicate_key",
            "error",
            f"the key '{error}' stands twice, with different values",
            origin,
            "remove one of them",
        )
    if isinstance(error, RecursionError):
        return Finding("broken_json", "error", "nested too deeply to be read", origin, "flatten the row")
    if not isinstance(error, json.JSONDecodeError):
        return Finding("broken_json", "error", f"not JSON: {error}", origin, "write the row as one JSON object")
    before = text[: error.pos].rstrip()
    after = text[error.pos : error.pos + 1]
    near = text[max(0, error.pos - 15) : error.pos + 15].replace("\n", " ")
    fix = "write the row as one JSON object"
    if "\x00" in text:
        return Finding(
            "nul_bytes",
            "error",
            "holds NUL bytes: written by a program that crashed or a disk that was full",
            origin,
            "remove the line or make the file again",
        )
    if before.endswith(",") and (after in "}]" or error.msg.startswith("Illegal trailing comma")):
        fix = "remove the comma before the closing bracket"
    elif text.lstrip()[:2] in ("{'", "['"):
        fix = "use double quotes, not single ones: write it with json.dumps, not with str"
    elif error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()):
        fix = "the row is cut off: write it again in full, on one line"
    elif error.msg.startswith("Invalid control character"):
        fix = "write line breaks and tabs inside strings as \\n and \\t"
    return Finding(
        "broken_json",
        "error",
        f"not JSON: {error.msg.removesuffix(' at')} at character {error.pos + 1}, near '{near}'",
        origin,
        fix,
    )


def _text_is_sound(value: Any) -> bool:
    """No half of a surrogate pair in any string: such a string cannot be written or tokenised."""
    if isinstance(value, str):
        return not SURROGATE.search(value)
    if isinstance(value, dict):
        return all(_text_is_sound(k) and _text_is_sound(v) for k, v in value.items())
    if isinstance(value, list):
        return all(_text_is_sound(item) for item in value)
    return True


def _row(origin: Origin, value: Any, text: str) -> Item:
    """A parsed row, checked for what no format can use."""
    if not isinstance(value, (dict, str)):
        name = {list: "a list", int: "a number", float: "a number", bool: "true or false", type(None): "null"}[
            type(value)
        ]
        return Finding(
            "not_an_object",
            "error",
            f"the row is {name}, not an object",
            origin,
            'write {"prompt": ..., "completion": ...}',
        )
    if STRAY_BYTE.search(text):
        return wrong_encoding(origin, text)
    if ("\\ud" in text or "\\uD" in text) and not _text_is_sound(value):
        return Finding(
            "broken_text",
            "error",
            "a string holds half of a surrogate pair (\\ud83d alone)",
            origin,
            "write the text again",
        )
    return origin, value


def lines(file: str, data: bytes) -> Iterator[Item]:
    if (
        data.lstrip()[:1] == b"["
        and data.rstrip()[-1:] == b"]"
        and b"\n" in data.strip()
        and not _first_line_is_json(data)
    ):
        yield from document(file, data)  # an array under the wrong ending
        return
    for number, raw in enumerate(data.split(b"\n"), start=1):
        if not raw.strip():
            continue
        origin = Origin(file, number)
        text = raw.decode("utf-8", "surrogateescape").strip("\ufeff \t\r")
        if not text:
            continue
        if STRAY_BYTE.search(text):
            yield wrong_encoding(origin, text)
            continue
        try:
            value = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            yield _broken(origin, error, text)
            continue
        if isinstance(value, str):
            value = {"text": value}
        yield _row(origin, value, text)


def _first_line_is_json(data: bytes) -> bool:
    try:
        _DECODER.decode(data.lstrip().split(b"\n", 1)[0].decode("utf-8").strip())
    except (ValueError, RecursionError):
        return False
    return True


ROW_KEYS = {
    "messages",
    "conversations",
    "conversation",
    "prompt",
    "instruction",
    "question",
    "text",
    "chosen",
    "rejected",
}
_SPACE = re.compile(r"[ \t\r\n]*")
# Where the next row of a broken array begins: an object that follows on a closed one.
_NEXT = re.compile(r"\}[ \t\r\n]*,[ \t\r\n]*(?=\{)")


def document(file: str, data: bytes) -> Iterator[Item]:
    text = data.decode("utf-8", "surrogateescape")
    start = _SPACE.match(text).end()
    if text[start : start + 1] == "[":
        yield from _array(file, text, start + 1)
        return
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        if _first_line_is_json(data):  # JSON lines under the ending .json: common, and meant
            yield from lines(file, data)
        else:
            at = getattr(error, "pos", 0)
            yield _broken(Origin(file, text.count("\n", 0, at) + 1), error, text)
        return
    if not isinstance(value, dict):
        yield _row(Origin(file, 1, "row"), value if not isinstance(value, str) else {"text": value}, text)
        return
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(lists) == 1 and not ROW_KEYS & {key.lower() for key in value}:
        for number, item in enumerate(value[lists[0]], start=1):
            yield _row(Origin(file, number, "row"), item, text if "\\u" in text else "")
    else:
        yield _row(Origin(file, 1, "row"), value, text)


def _array(file: str, text: str, at: int) -> Iterator[Item]:
    """The elements of a JSON array one by one, so that a broken one costs one row and not the file."""
    number = 0
    line, counted = 1, 0
    while True:
        at = _SPACE.match(text, at).end()
        if at >= len(text):
            yield Finding(
                "broken_json",
                "error",
                "the array is not closed: the file is cut off",
                Origin(file, text.count("\n") + 1),
                "write the file again in full",
            )
            return
        if text[at] == "]":
            rest = text[at + 1 :].strip()
            if rest:
                yield Finding(
                    "broken_json",
                    "error",
                    f"something follows the closed array: '{rest[:30]}'",
                    Origin(file, text.count("\n", 0, at) + 1),
                    "keep one array in the file, or write one row a line (.jsonl)",
                )
            return
        number += 1
        start = at
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = getattr(error, "pos", start)
            line, counted = line + text.count("\n", counted, where), where
            problem = _broken(Origin(file, line), _moved(error, text, start), text[start : where + 40])
            yield problem
            following = _NEXT.search(text, max(start, where - 1))
            if not following:
                return
            at = following.end()
            continue
        yield _row(
            Origin(file, number, "row"), value if not isinstance(value, str) else {"text": value}, text[start:at]
        )
        at = _SPACE.match(text, at).end()
        if text[at : at + 1] == ",":
            at = _SPACE.match(text, at + 1).end()
            if text[at : at + 1] == "]":
                yield Note(
                    Finding(
                        "trailing_comma",
                        "warning",
                        "a comma stands before the closing bracket; read on without it",
                        Origin(file, text.count("\n", 0, at) + 1),
                        "remove the comma",
                    )
                )
        elif text[at : at + 1] not in ("]", ""):
            yield Note(
                Finding(
                    "missing_comma",
                    "error",
                    f"no comma between row {number} and the next",
                    Origin(file, text.count("\n", 0, at) + 1),
                    "put a comma between the rows",
                )
            )
            if text[at] not in '{["':  # no row begins here
                return


def _moved(error: Exception, text: str, start: int) -> Exception:
    """The same error with its position counted from the start of the row."""
    if isinstance(error, json.JSONDecodeError):
        return json.JSONDecodeError(error.msg, text[start : error.pos + 40], max(0, error.pos - start))
    return error

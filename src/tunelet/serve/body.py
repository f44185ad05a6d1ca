"""The bytes of a request become a JSON object, or a refusal: size, time, encoding, depth, doubled keys, odd numbers.

Not for what the fields mean (asked.py). Python's reader takes NaN, lone surrogates and the last of two equal keys; what
stands behind this server (tokenizers, grammars written in C++) does not, or reads them otherwise.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

from tunelet.serve.refusal import Refusal, bad

DEPTH = 64  # of lists and objects in one another: recursive readers of schemas stand behind this
PATIENCE = 30.0  # seconds for a whole body: a client that stalls holds no connection for ever


async def read(scope: dict[str, Any], receive: Any, most: int) -> dict[str, Any]:
    """The object in a request's body. Raises Refusal: 400, 408, 413 or 415."""
    headers = dict(scope["headers"])
    if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
        # a form of another site cannot send this type unasked
        raise Refusal(415, "The body has to be JSON: send the header Content-Type: application/json.")
    told = headers.get(b"content-length", b"0")
    if told.isdigit() and len(told) < 19 and int(told) > most:
        raise _too_large(most)
    data = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refusal(408, "The connection was closed before the body was whole.")
                data += message.get("body", b"")
                if len(data) > most:
                    raise _too_large(most)
                more = message.get("more_body", False)
    except TimeoutError:
        raise Refusal(
            408, f"The body did not arrive within {PATIENCE:.0f} s.", headers={"Connection": "close"}
        ) from None
    return parse(bytes(data))


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"The body is larger than {most} bytes.", headers={"Connection": "close"})


def parse(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(
            data.decode(), object_pairs_hook=_object, parse_float=_float, parse_int=_int, parse_constant=_constant
        )
    except UnicodeDecodeError:
        raise bad("The body is not UTF-8.") from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        raise bad(f"The body is not JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from None
    if not isinstance(found, dict):
        raise bad("The body has to be a JSON object.")
    _check(found)
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise bad("An object in the body has the same key twice.")
    return found


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise bad("A number in the body is too large.")
    return value


def _int(text: str) -> int:
    if len(text) > 19 or not -(2**63) <= (value := int(text)) < 2**63:
        raise bad("A number in the body is too large.")
    return value


def _constant(text: str) -> None:
    raise bad(f"The body is not JSON: {text} is no number there.")


def _check(found: Any) -> None:
    """Level by level: refuse what is nested too deeply, and strings that are no text (half of a surrogate pair)."""
    level = [found]
    for _ in range(DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str) and not value.isascii() and not _is_text(value):
                raise bad("A string in the body is no text: it holds half of a surrogate pair.")
        if not below:
            return
        level = below
    raise _too_deep()


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _too_deep() -> Refusal:
    return bad(f"The body is nested more than {DEPTH} levels deep.")

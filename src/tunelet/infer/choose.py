"""Which engine answers, and why: by what is asked for, what is there, and what was measured on this machine.

Not for opening it (commands/common.py) nor for measuring (bench.py).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from tunelet.errors import TuneletError, did_you_mean
from tunelet.infer import bench, gguf_export
from tunelet.infer.endpoint import is_url

ENGINES = ("auto", "torch", "llama.cpp")
QUANT = "q8_0"


@dataclass(frozen=True)
class Chosen:
    """engine: torch, llama.cpp or an address; reason: a clause for the user."""

    engine: str
    reason: str


def choose(model: str, engine: str, at_once: int) -> Chosen:
    """The engine for `at_once` requests at a time on `model`. engine: as asked; auto chooses.

    auto takes llama.cpp only where its proved file is there: making one takes a minute, and is asked for by name
    (--engine llama.cpp, or tunelet export). Raises TuneletError for what is no engine.
    """
    if engine not in ENGINES and not is_url(engine):
        raise TuneletError(
            f"--engine {engine}: there is no such engine.{did_you_mean(engine, ENGINES)}",
            fix=f"one of {', '.join(ENGINES)}, or an address: http://127.0.0.1:8080/v1#MODEL",
        )
    if engine != "auto":
        return Chosen(engine, "as asked")
    if importlib.util.find_spec("xllamacpp") is None:
        return Chosen("torch", "llama.cpp is not installed")
    if gguf_export.there(model, QUANT) is None:
        return Chosen("torch", "llama.cpp has no file of it, which tunelet export --to gguf makes")
    measured = bench.kept(model)
    if measured is not None and (found := bench.fastest(measured, QUANT, at_once)):
        return Chosen(*found)
    if at_once == 1:
        return Chosen("llama.cpp", "its proved file is there, and has half the bytes to read for a token")
    return Chosen("torch", "nothing is measured for many at once, which tunelet bench does")

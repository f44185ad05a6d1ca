"""How fast this machine answers with a model, by engine and quantisation, and how fast it could at best.

Not for measuring one engine (bench_worker.py) nor for showing the figures (runs/bench_page.py). Results are kept for
this machine and shape of model, so that `choose` can take the engine that is faster for the work at hand.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError
from tunelet.infer import gguf_source
from tunelet.runs import environment, history
from tunelet.runs.files import finite, write_atomically

CLIENTS = (1, 4, 16, 32)
QUANTS = ("q8_0", "q4_0")
PROMPT, ANSWER = 128, 64  # tokens
REPEATS = 5  # of a single prompt's first token
READ_MB = 256  # to find how fast memory is read: larger than any cache that one core has to itself
# What of a model its speed depends on, by its names in config.json.
SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPE += ("intermediate_size", "vocab_size")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    engine: str
    quant: str  # of llama.cpp's file; torch: the dtype

    @property
    def name(self) -> str:
        return f"{self.engine} {self.quant}"


def cases(engines: Sequence[str], quants: Sequence[str], dtype: str) -> list[Case]:
    return [
        case
        for engine in engines
        for case in ([Case(engine, dtype)] if engine == "torch" else [Case(engine, quant) for quant in quants])
    ]


def run(
    model: str,
    wanted: Sequence[Case],
    *,
    clients: Sequence[int] = CLIENTS,
    prompt: int = PROMPT,
    answer: int = ANSWER,
    threads: int = 0,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Measure each case in a process of its own, and keep the figures for `choose`. JSON values: machine, model,
    limits, cases. model: a run, a model folder or a hub id. Raises TuneletError for bad input."""
    from tunelet.data.tokenizer import load_tokenizer
    from tunelet.infer import gguf_export, gguf_file, merge_files
    from tunelet.infer.engine import context_length
    from tunelet.models import device, load, weights

    choice = device.choose(threads=threads)
    of = gguf_source.source(model)
    base = of.base or of.folder
    config = gguf_file.text_config(base)
    most = context_length(config)
    if most and prompt + answer > most:
        raise TuneletError(
            f"--prompt {prompt} and --answer {answer} are {prompt + answer} tokens; this model reads {most}",
            fix="give smaller ones",
        )
    found = []
    parameters = weights.count_parameters(base)
    tokenizer = load.tokenizer_folder(model)
    speed = bandwidth(choice.threads)
    for case in wanted:
        progress(f"{case.name}: measuring")
        file, size = "", parameters * (4 if case.quant == "float32" else 2)
        if case.engine == "llama.cpp":
            exported = gguf_export.ready(model, case.quant)
            file, size = str(exported.file), exported.file.stat().st_size
        spec = {
            "engine": case.engine,
            "model": model,
            "tokenizer": str(tokenizer),
            "file": file,
            "dtype": case.quant if case.engine == "torch" else "",
            "slots": max(clients),
            "context": prompt + answer,
            "threads": choice.threads,
            "prompt": prompt,
            "answer": answer,
            "clients": list(clients),
            "repeats": REPEATS,
            "seed": 0,
            "vocabulary": config.vocab_size,
            "banned": merge_files.stop_ids(load_tokenizer(tokenizer), base),
        }
        figures = _worker(spec)
        # each token of a single answer needs all weights once
        found.append({"engine": case.engine, "quant": case.quant, "bytes": size, "most_alone": speed / size, **figures})
    told = {
        "model": model,
        "parameters": parameters,
        "machine": machine(choice.threads),
        "prompt": prompt,
        "answer": answer,
        "memory_bytes_per_second": speed,
        "cases": found,
    }
    if not threads:
        _keep(told, base)
    return told


def _worker(spec: Mapping[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tunelet.infer.bench_worker"], input=json.dumps(spec), capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise TuneletError(f"{spec['engine']}: could not be measured", why=last[0], fix="leave it out: --engine")
    return json.loads(done.stdout.strip().splitlines()[-1])


@cache
def bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory: the best of a few products of a large matrix and a
    vector, which read every number once."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows = READ_MB * 1_000_000 // 4 // 4096
        matrix, vector = torch.ones(rows, 4096), torch.ones(4096)
        best = float("inf")
        for _ in range(7):
            began = time.perf_counter()
            torch.mv(matrix, vector)
            best = min(best, time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    return rows * 4096 * 4 / best


def machine(threads: int) -> dict[str, Any]:
    return {"cpu": environment.cpu_name(), "threads": threads}


# -- kept for the choice ----------------------------------------------------------------------------------------------


def _kept(base: Path) -> Path:
    """Where the figures of a model with the shape of `base` are kept, for this machine and all the cores one may use.
    Read from config.json alone: whoever chooses an engine has not loaded torch yet."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    told = [environment.cpu_name(), environment.usable_cores(), *(config.get(key) for key in SHAPE)]
    return history.cache() / "bench" / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.json"


def _keep(told: Mapping[str, Any], base: Path) -> None:
    path = _kept(base)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(finite(told)))


def kept(model: str) -> dict[str, Any] | None:
    """The figures measured last on this machine for a model of this one's shape."""
    of = gguf_source.source(model)
    try:
        return json.loads(_kept(of.base or of.folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def fastest(told: Mapping[str, Any], quant: str, clients: int) -> tuple[str, str] | None:
    """(engine, why) for so many at once, of figures that `run` made; None where torch and llama.cpp with files of
    `quant` were not both measured."""
    best: dict[str, tuple[float, int]] = {}
    for case in told["cases"]:
        if case["engine"] == "torch" or case["quant"] == quant:
            near = min(case["clients"], key=lambda row: abs(row["clients"] - clients))
            best[case["engine"]] = near["tokens_per_cpu_second"], near["clients"]
    if len(best) < 2:
        return None
    (name, (rate, number)), (_, (beside, _)) = sorted(best.items(), key=lambda one: -one[1][0])
    return name, f"measured here: {rate:.0f} tokens a CPU second with {number} at once, the other {beside:.0f}"

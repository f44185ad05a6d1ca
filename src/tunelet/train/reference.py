"""Log-probabilities under the model that a training starts from, computed once, before anything is trained: no second
model is ever held in memory.

Not the losses that use them (methods/). They are kept in ~/.cache/tunelet/reference (or $XDG_CACHE_HOME) under a hash
of the weights, the rows and everything that rounds; deleting that folder is safe: they are computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch

from tunelet.data import pack
from tunelet.data.examples import Tokens
from tunelet.models import sequences
from tunelet.models.device import Choice
from tunelet.runs import history
from tunelet.runs.files import write_atomically
from tunelet.train import distributed

BATCH_TOKENS = 2048  # of a forward; nothing is kept for a backward


def attached(model: Any, rows: Sequence[Tokens], choice: Choice, console: Any) -> list[Tokens]:
    """The rows, each with its sequences' log-probabilities under `model` as it is now. All processes take part."""
    if not rows:
        return []
    world = distributed.world()
    file = history.cache() / "reference" / f"{digest(model, rows, choice)}.json"
    found = world.told(_read(file, rows) if world.first else None)
    if found is None:
        console.print(f"Reference: log-probabilities of {len(rows):,} rows ...", markup=False, highlight=False)
        found = compute(model, rows, choice.device)
        if world.first:
            _keep(file, found)
    else:
        console.print(f"Reference: {len(rows):,} rows, from the cache", markup=False, highlight=False)
    return [replace(row, reference=tuple(of)) for row, of in zip(rows, found, strict=True)]


def compute(model: Any, rows: Sequence[Tokens], on: str) -> list[list[float]]:
    """For each row the sums of log-probabilities of its sequences. Processes share the work."""
    world = distributed.world()
    sizes = [max(1, len(row.branches)) for row in rows]
    out = torch.zeros(len(rows), max(sizes), dtype=torch.float64)
    for number, places in enumerate(batches(rows)):
        if number % world.size == world.rank:
            scored = iter(sequences.scored(model, pack.make_batch([rows[place] for place in places]).to(on)))
            for place in places:
                out[place, : sizes[place]] = torch.tensor([next(scored)[0] for _ in range(sizes[place])])
    world.add_up(out)
    return [line[:size] for line, size in zip(out.tolist(), sizes, strict=True)]


def batches(rows: Sequence[Tokens]) -> list[list[int]]:
    """Places of rows, those of similar length together."""
    out: list[list[int]] = []
    held = 0
    for place in sorted(range(len(rows)), key=lambda place: -len(rows[place].ids)):
        if not out or held + len(rows[place].ids) > BATCH_TOKENS:
            out.append([])
            held = 0
        out[-1].append(place)
        held += len(rows[place].ids)
    return out


def digest(model: Any, rows: Sequence[Tokens], choice: Choice) -> str:
    """Of all that decides the figures: every weight, the config, scales of adapters, every token and target, device,
    dtype, threads and versions."""
    out = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        out.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        out.update(raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    for row in rows:
        out.update(json.dumps([list(map(int, row.ids)), list(map(int, row.mask)), row.branches]).encode())
    told = {key: value for key, value in asdict(choice).items() if key != "reasons"}
    told |= {name: version(name) for name in ("torch", "transformers")} | {"batch": BATCH_TOKENS}
    told["config"] = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    told["scales"] = [getattr(module, "scaling", None) for module in model.modules()]
    out.update(json.dumps(told, sort_keys=True, default=str).encode())
    return out.hexdigest()[:32]


def _read(file: Any, rows: Sequence[Tokens]) -> list[list[float]] | None:
    """None where there is nothing, or nothing that can be used."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not (isinstance(found, list) and all(isinstance(of, list) for of in found)):
        return None
    fits = [len(of) for of in found] == [max(1, len(row.branches)) for row in rows]
    return found if fits and all(isinstance(x, float) and math.isfinite(x) for of in found for x in of) else None


def _keep(file: Any, found: list[list[float]]) -> None:
    """Where the folder cannot be written, the next run computes them again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(found) + "\n")
    except OSError:
        return

"""`python -m benchmarks settings`: which public settings make the peer fastest on this machine, tried one after the
other; what `trl-best` in peer.py stands on.

Not a search: the list is short, and a setting that fails is told with its reason.
"""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks import process, train
from benchmarks.measure import machine, versions
from benchmarks.process import show
from tunelet.errors import TuneletError

_LOW = {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": False, "gradient_checkpointing": False}
_CAST = {"model_init_kwargs": {"dtype": "float32"}, "bf16": True, "gradient_checkpointing": False}
_EAGER = {**_LOW, "model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"}}


def _cut(micro: int, batch_size: int) -> dict[str, int]:
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": batch_size // micro}


def tried(batch_size: int) -> dict[str, dict[str, Any]]:
    """What is tried -> settings; rows are grouped by length in all of them. batch_size: a multiple of 4."""
    whole, half, pairs, single = (_cut(n, batch_size) for n in (batch_size, batch_size // 2, 2, 1))
    return {
        "bf16 weights, all rows padded together": {**_LOW, **whole},
        "bf16 weights, half of the rows at a time": {**_LOW, **half},
        "bf16 weights, two rows at a time": {**_LOW, **pairs},
        "bf16 weights, one row at a time: no padding": {**_LOW, **single},
        "bf16 weights, padding_free": {**_LOW, **whole, "padding_free": True, "max_length": None},
        "bf16 weights, eager attention, two rows at a time": {**_EAGER, **pairs},
        "bf16 weights, eager attention, one row at a time": {**_EAGER, **single},
        "bf16 weights, torch_compile, two rows at a time": {**_LOW, **pairs, "torch_compile": True},
        "float32 weights, bf16 autocast, all rows padded together": {**_CAST, **whole},
        "float32 weights, bf16 autocast, two rows at a time": {**_CAST, **pairs},
    }


def run(options: Namespace) -> int:
    """The verb: tries each (or those of options.only), writes options.json after each, prints the table."""
    train.contestants(Namespace(**{**vars(options), "only": ["trl-default", "trl-best"], "peer_set": []}))
    every = tried(options.batch_size)
    chosen = {name: given for name, given in every.items() if not options.only or options.only in name}
    if not chosen:
        raise TuneletError(f"Nothing that is tried has '{options.only}' in its name.", fix="\n".join(every))
    scratch = process.scratch(options)
    base = {"device": options.device, "threads": options.threads, "scratch": str(scratch)}
    model = process.checkpoint(base, options.shape)
    found: list[dict[str, Any]] = []
    work = train.work(Namespace(**{**vars(options), "peer_set": []}))
    for name, given in [("its defaults", None), *chosen.items()]:
        variant = "trl-default" if given is None else "trl-best"
        spec = {**base, **work, "task": "step", "model": model, "contestant": variant, "variant": variant}
        entry: dict[str, Any] = {"name": name, "given": given or {}}
        try:
            gemm = process.measure({**base, "task": "gemm"}, name)
            entry |= {"gemm": gemm, **process.measure({**spec, "peer_set": given or {}}, name)}
            show(f"{name}: {train.line(entry, gemm)}")
        except TuneletError as error:
            entry["error"] = str(error)
            show(f"{name}: {error}")
        found.append(entry)
        if options.json:
            head = {"benchmark": "settings", "method": options.method, "peer": options.peer, **base, "work": work}
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            about = {"machine": machine(), "versions": versions(), "time": when}
            train.write(Path(options.json), {**head, **about, "tried": found})
    for entry in sorted(found, key=lambda one: -one.get("tokens_per_cpu_second", 0)):
        rate, peak = entry.get("tokens_per_cpu_second", 0), entry.get("peak_mb", 0)
        print(f"{entry['name']:<60}{rate:>8.0f} tokens/CPU-s{peak:>8.0f} MB")
    return 0

"""`python -m benchmarks serve`: `tunelet serve` and a peer answer the same requests over HTTP, in turns; tokens that
each server makes in a CPU second of its own process, for one client and for many.

Not a test: nothing here passes or fails on a time. What the clients cost is not counted.
"""

from __future__ import annotations

import http.client
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from benchmarks import process, shapes
from benchmarks.measure import machine, versions
from benchmarks.process import show
from benchmarks.train import write
from tunelet.errors import TuneletError

PEERS = ("llama-server", "transformers")
READY = 300  # seconds that a server may take to begin
CONTEXT_STEP = 256


def run(options: Namespace) -> int:
    """The verb: measures, writes options.json after every pair, prints what was found."""
    scratch = process.scratch(options)
    base = {"device": "cpu", "threads": options.threads, "scratch": str(scratch)}
    model = process.checkpoint(base, options.model) if options.model in shapes.SHAPES else options.model
    spec = {
        "model": _with_tokenizer(model),
        "engine": options.engine,
        "quant": options.quant,
        "slots": max(options.clients),
        "context": -(-(options.prompt + options.shared + options.answer) // CONTEXT_STEP) * CONTEXT_STEP,
        "threads": options.threads,
        "dtype": options.dtype,
    }
    names = ["tunelet", *([options.peer] if options.peer else [])]
    pairs: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    for number in range(options.pairs):
        pair = {}
        for name in names if number % 2 == 0 else reversed(names):  # who comes first changes: noise hits all alike
            pair[name] = measured(name, spec, options)
            told = ", ".join(f"{n}: {rate:.0f}" for n, rate in pair[name]["tokens_per_cpu_second"].items())
            show(f"pair {number + 1} of {options.pairs}, {name}: tokens/CPU-s with clients {told}")
        pairs.append(pair)
        result = {**_setting(options), **summary(pairs, options.peer)}
        if options.json:
            write(Path(options.json), result)
    print(table(result))
    return 0


def _with_tokenizer(model: str) -> str:
    folder = Path(model)
    if folder.is_dir() and (folder / "config.json").exists() and not (folder / "tokenizer.json").exists():
        raise TuneletError(
            f"{folder} has no tokenizer.",
            why="a checkpoint of random weights comes without one",
            fix="Copy a tokenizer of SmolLM2 there: tokenizer.json and tokenizer_config.json",
        )
    return model


def measured(name: str, spec: Mapping[str, Any], options: Namespace) -> dict[str, Any]:
    """One contestant, started anew: rates by number of clients, CPU seconds and memory when ready."""
    ours = ["tunelet", "serve", f"bench={spec['model']}"]
    for flag in ("engine", "quant", "slots", "context"):
        ours += [f"--{flag}", str(spec[flag])]
    theirs = ["benchmarks.serve_peer", name, json.dumps(spec)]
    command = [sys.executable, "-m", *([*ours, "--port", "0"] if name == "tunelet" else theirs)]
    server = subprocess.Popen(
        command, cwd=process.ROOT, env=process.environment(spec["threads"]), stdout=subprocess.PIPE, text=True
    )
    try:
        address = _ready(server, name)
        watched = psutil.Process(server.pid)
        start = _cpu(watched)
        rates, walls = {}, {}
        _ask(address, _prompts(1, options, -1), options.answer)  # what happens once only
        for number in options.clients:
            cpu, wall = _cpu(watched), time.perf_counter()
            tokens = _ask(address, _prompts(number, options, number), options.answer)
            rates[str(number)] = tokens / (_cpu(watched) - cpu)
            walls[str(number)] = tokens / (time.perf_counter() - wall)
        memory = watched.memory_info().rss / 1e6
    finally:
        server.terminate()
        server.wait(60)
    return {
        "tokens_per_cpu_second": rates,
        "tokens_per_second": walls,
        "start_cpu_seconds": start,
        "rss_mb": memory,
    }


def _ready(server: subprocess.Popen[str], name: str) -> str:
    """The address that the server prints when it answers."""
    end = time.monotonic() + READY
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("Ready: "):
            return line.split()[1].rstrip(",")
        if time.monotonic() > end:
            break
    raise TuneletError(f"{name} did not begin to answer (exit code {server.poll()})")


def _cpu(watched: psutil.Process) -> float:
    times = watched.cpu_times()
    return times.user + times.system


def _prompts(clients: int, options: Namespace, seed: int) -> list[list[list[int]]]:
    """For each client the prompts that it asks one after the other. The first `shared` tokens are the same for all."""
    rng = random.Random(f"{options.seed}/{seed}")

    def ids(number: int) -> list[int]:
        return [rng.randrange(100, options.vocabulary) for _ in range(number)]

    common = ids(options.shared)
    return [[common + ids(options.prompt) for _ in range(options.rounds)] for _ in range(clients)]


def _ask(address: str, prompts: Sequence[Sequence[Sequence[int]]], answer: int) -> int:
    """All clients at once; how many tokens they got."""
    got = [0] * len(prompts)
    wrong: list[BaseException] = []

    def client(place: int) -> None:
        try:
            for ids in prompts[place]:
                got[place] += _one(address, ids, answer)
        except Exception as error:  # told by the thread that waits
            wrong.append(error)

    threads = [threading.Thread(target=client, args=(place,)) for place in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise TuneletError("a client got no answer", why=f"{type(wrong[0]).__name__}: {wrong[0]}")
    return sum(got)


def _one(address: str, ids: Sequence[int], answer: int) -> int:
    where = urlsplit(address)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=600)
    body = {"model": "bench", "prompt": list(ids), "max_tokens": answer, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    told = json.loads(reply.read())
    connection.close()
    if reply.status != 200:
        raise RuntimeError(f"{reply.status}: {told}")
    return int(told["usage"]["completion_tokens"])


def _setting(options: Namespace) -> dict[str, Any]:
    names = ("peer", "model", "engine", "quant", "dtype", "clients", "prompt", "shared", "answer", "rounds", "threads")
    return {
        "benchmark": "serve",
        **{name: getattr(options, name) for name in names},
        "machine": machine(),
        "versions": versions(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "pairs_asked": options.pairs,
    }


def summary(pairs: Sequence[Mapping[str, Any]], peer: str | None) -> dict[str, Any]:
    """rates: of each contestant and number of clients the median over the pairs; ratios: the median of tunelet's rate
    over the peer's in the same pair."""
    clients = list(pairs[0]["tunelet"]["tokens_per_cpu_second"])
    key = "tokens_per_cpu_second"

    def middle(name: str, of: Callable[[Mapping[str, Any]], float]) -> float:
        return statistics.median(of(pair[name]) for pair in pairs)

    out: dict[str, Any] = {
        "pairs_done": len(pairs),
        "rates": {name: {n: middle(name, lambda one, n=n: one[key][n]) for n in clients} for name in pairs[0]},
        "start_cpu_seconds": {name: middle(name, lambda one: one["start_cpu_seconds"]) for name in pairs[0]},
        "rss_mb": {name: middle(name, lambda one: one["rss_mb"]) for name in pairs[0]},
    }
    if peer:
        out["ratios"] = {n: statistics.median(p["tunelet"][key][n] / p[peer][key][n] for p in pairs) for n in clients}
    return out


def table(result: Mapping[str, Any]) -> str:
    """What is printed at the end."""
    lines = []
    for name, rates in result["rates"].items():
        told = "".join(f"{rate:>9.0f}" for rate in rates.values())
        start, memory = result["start_cpu_seconds"][name], result["rss_mb"][name]
        lines.append(f"{name:<14}{told} tokens/CPU-s, ready after {start:.1f} CPU-s, {memory:.0f} MB")
    head = f"{'clients':<14}" + "".join(f"{n:>9}" for n in next(iter(result["rates"].values())))
    ratios = [f"{'ratio':<14}" + "".join(f"{one:>9.2f}" for one in result["ratios"].values())] if result["peer"] else []
    return "\n".join([head, *lines, *ratios, f"medians of {result['pairs_done']} pairs, {result['threads']} threads"])

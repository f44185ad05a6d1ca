"""One engine measured in a process of its own, so that its memory and its threads are nobody else's: `python -m
tunelet.infer.bench_worker` reads a case as JSON from standard input and writes the figures to standard output.

Not for choosing what is measured (bench.py).
"""

from __future__ import annotations

import json
import queue
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from tunelet.infer.request import Engine, Request


def main() -> int:
    case = json.loads(sys.stdin.read())
    began = time.perf_counter(), time.process_time()
    engine = opened(case)
    load = {"seconds": time.perf_counter() - began[0], "cpu_seconds": time.process_time() - began[1]}
    held = _held_mb()
    try:
        figures = measured(engine, case)
    finally:
        engine.close()
    json.dump({"load": load, "held_mb": held, "peak_mb": _peak_mb(), **figures}, sys.stdout)
    return 0


def opened(case: dict[str, Any]) -> Engine:
    """The engine of a case: engine, model, tokenizer, file, slots, context, threads, dtype."""
    from tunelet.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(Path(case["tokenizer"]))
    if case["engine"] == "llama.cpp":
        from tunelet.infer.llama_cpp import LlamaCppEngine

        return LlamaCppEngine(
            Path(case["file"]),
            tokenizer,
            None,
            slots=case["slots"],
            context=case["context"],
            threads=case["threads"],
        )
    from tunelet.infer.continuous import ContinuousEngine
    from tunelet.models import device, load

    choice = device.choose("auto", case["dtype"], case["threads"])
    device.apply(choice)
    model = load.load_model(case["model"], choice)
    # no stop token: every answer has the length that is asked for
    return ContinuousEngine(
        model, tokenizer, None, slots=case["slots"], context=case["context"], prefix_mb=0, stop_ids=[-1]
    )


def measured(engine: Engine, case: dict[str, Any]) -> dict[str, Any]:
    """Time to first token and rates: alone, and with several clients that each ask as soon as they are answered."""
    rng = random.Random(case["seed"])
    vocabulary = min(case["vocabulary"], 60_000)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(1, vocabulary) for _ in range(length)]

    _ask(engine, [prompt(8)], 4, case["banned"])  # what happens once only
    firsts, prefill = [], []
    for _ in range(case["repeats"]):
        cpu = time.process_time()
        [first] = _ask(engine, [prompt(case["prompt"])], 1, case["banned"])
        firsts.append(first)
        prefill.append(case["prompt"] / (time.process_time() - cpu))
    clients = []
    for number in case["clients"]:
        wall, cpu = time.perf_counter(), time.process_time()
        told = _ask(engine, [prompt(case["prompt"]) for _ in range(number)], case["answer"], case["banned"])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        tokens = number * case["answer"]
        clients.append(
            {
                "clients": number,
                "tokens_per_second": tokens / wall,
                "tokens_per_cpu_second": tokens / cpu,
                "first_token_seconds": statistics.median(told),
                "tokens": tokens,
            }
        )
    return {
        "first_token_seconds": statistics.median(firsts),
        "prefill_tokens_per_cpu_second": statistics.median(prefill),
        "clients": clients,
    }


def _ask(engine: Engine, prompts: list[list[int]], most: int, banned: list[int]) -> list[float]:
    """All at once, `most` tokens each; seconds to the first token of each."""
    told: queue.SimpleQueue[tuple[int, float, Any]] = queue.SimpleQueue()
    began = time.perf_counter()
    for place, ids in enumerate(prompts):
        request = Request(ids, most, logit_bias=dict.fromkeys(banned, -1e4))
        engine.submit(request, lambda piece, place=place: told.put((place, time.perf_counter(), piece)))
    first: dict[int, float] = {}
    left = len(prompts)
    while left:
        place, at, piece = told.get()
        if piece.finish not in ("", "length"):
            raise RuntimeError(piece.error or f"an answer ended early: {piece.finish}")
        first.setdefault(place, at - began)  # a token inside a character is told with the next one, or at the end
        left -= bool(piece.finish)
    return [first[place] for place in range(len(prompts))]


def _held_mb() -> float:
    import psutil

    return psutil.Process().memory_info().rss / 1e6


def _peak_mb() -> float | None:
    """Of this process alone: what getrusage tells begins with the memory of the one that started it."""
    status = Path("/proc/self/status")
    if status.exists():
        found = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(found.split()[1]) * 1024 / 1e6
    from tunelet.models.device import peak_mb

    return peak_mb()


if __name__ == "__main__":
    sys.exit(main())

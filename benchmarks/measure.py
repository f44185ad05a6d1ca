"""Inside a contestant's own process: its clock, its peak of memory, and the matrix-product peak of the machine."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """cpu: user + system seconds of this process, all its threads; wall: seconds of the clock."""

    cpu: float
    wall: float


class Clock:
    """Starts at `start()`; `stop()` gives what has passed since. On a GPU both wait until its work is done."""

    def __init__(self, device: str):
        self.device = device

    def _now(self) -> Reading:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return Reading(time.process_time(), time.perf_counter())

    def start(self) -> None:
        self.began = self._now()

    def stop(self) -> Reading:
        now = self._now()
        return Reading(now.cpu - self.began.cpu, now.wall - self.began.wall)


def peak_mb(device: str) -> float:
    """Most memory this process has held so far, MB of 10^6 bytes: resident (ru_maxrss); on a GPU, allocated there."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6


def set_up(device: str, threads: int) -> None:
    """Threads of torch, as many for every contestant. Raises TuneletError where the GPU asked for is not there."""
    import torch

    torch.set_num_threads(threads)
    if device == "cuda":
        if not torch.cuda.is_available():
            from tunelet.errors import TuneletError

            raise TuneletError(
                "The device cuda cannot be used.",
                why=f"torch {torch.__version__} reaches no GPU here",
                fix="Leave --device out, or install a torch built for that GPU.",
            )
        torch.cuda.init()


def gemm(device: str, seconds: float = 1.5) -> dict[str, float]:
    """Best bf16 product of two square matrices: GFLOP per CPU-second (on a GPU per second), 2 x size^3 FLOPs each.

    The best of many, not the mean: it is the peak that a step is held against. 2048 on a CPU; on a GPU 8192, ten in a
    row, as starting one takes longer there than a small one.
    """
    import torch

    size, repeat = (8192, 10) if device == "cuda" else (2048, 1)
    x, y = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    clock, best_cpu, best_wall, began = Clock(device), float("inf"), float("inf"), time.perf_counter()
    x @ y
    while time.perf_counter() - began < seconds:
        clock.start()
        for _ in range(repeat):
            x @ y
        took = clock.stop()
        best_cpu, best_wall = min(best_cpu, took.cpu), min(best_wall, took.wall)
    work = repeat * 2 * size**3 / 1e9
    counted = best_wall if device == "cuda" else best_cpu
    return {"gflops_per_cpu_second": work / counted, "gflops_per_second": work / best_wall}


def versions() -> dict[str, str]:
    """Versions of everything that decides the figures."""
    from importlib import metadata

    names = ("torch", "transformers", "peft", "trl", "liger-kernel")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": sys.version.split()[0], **found}


def machine() -> dict[str, str | int]:
    """The CPU's name and how many cores this process may use."""
    name = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cpu": name, "cores": cores}

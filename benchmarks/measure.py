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
    """Threads of torch, as many for every contestant."""
    import torch

    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.init()


def gemm(device: str, seconds: float = 1.5, size: int = 2048) -> dict[str, float]:
    """Best bf16 product of two size x size matrices: GFLOP per CPU-second (on a GPU per second), 2 x size^3 FLOPs each.

    The best of many, not the mean: it is the peak that a step is held against.
    """
    import torch

    x, y = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    clock, best_cpu, best_wall, began = Clock(device), float("inf"), float("inf"), time.perf_counter()
    x @ y
    while time.perf_counter() - began < seconds:
        clock.start()
        x @ y
        took = clock.stop()
        best_cpu, best_wall = min(best_cpu, took.cpu), min(best_wall, took.wall)
    work = 2 * size**3 / 1e9
    per_second = work / best_wall
    return {
        "gflops_per_cpu_second": per_second if device == "cuda" else work / best_cpu,
        "gflops_per_second": per_second,
    }


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

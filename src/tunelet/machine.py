"""What `tunelet doctor` reports: the machine, what tunelet will use of it, and why.

Not for choosing device and dtype: that is `models/device.py`, asked here.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

NEEDS = {"torch": "trains and answers", "transformers": "models and tokenizers", "peft": "adapters"}
CUDA_NAMES = re.compile(r"^(nvidia|triton)", re.IGNORECASE)
LOW_MEMORY_MB, LOW_DISK_MB = 2_000, 2_000


def report(folder: Path = Path()) -> dict[str, Any]:
    """Plain JSON values. "reasons" says why for device, dtype, threads, memory and disk; "notes" what to look at.

    Memory and disk are in MB (10^6 bytes); the disk is the one of `folder`, where runs go.
    """
    from tunelet.models import device as devices
    from tunelet.runs import environment

    choice = devices.choose()
    told = environment.environment()
    available = available_memory_mb()
    disk = round(shutil.disk_usage(folder).free / 1e6)
    cuda = cuda_packages()
    notes = []
    if cuda and choice.device == "cpu":
        notes.append(
            f"{len(cuda)} CUDA packages are installed and there is no NVIDIA GPU in use: a fresh environment by "
            "`make install` takes torch's CPU build and saves several GB"
        )
    if available is not None and available < LOW_MEMORY_MB:
        notes.append(f"only {available} MB of memory are free: close other programs, or set a small train.batch_size")
    if disk < LOW_DISK_MB:
        notes.append(f"only {disk} MB of disk are free here: checkpoints need room, choose an --out on another disk")
    return {
        "device": choice.device,
        "dtype": choice.dtype,
        "threads": choice.threads,
        "memory_mb": {"total": told["memory_mb"], "available": available},
        "disk_free_mb": disk,
        "reasons": {
            **choice.reasons,
            "memory": "what the system counts as free for new programs; a run's need is checked against it",
            "disk": f"the disk of {folder.resolve()}, where runs/ is made",
        },
        "python": told["python"],
        "packages": told["packages"],
        "platform": told["platform"],
        "cpu": told["cpu"],
        "cores": told["cores"],
        "cuda_packages": cuda,
        "starter": starter_there(),
        "notes": notes,
    }


class Crowding:
    """`with Crowding(threads) as crowd: ...`, then `crowd.wanted`: cores that `threads` threads of this process and all
    other programs asked for, as a multiple of those the machine has. Up to 1 nobody waited for a core."""

    def __init__(self, threads: int):
        self.threads, self.wanted = threads, 1.0

    def __enter__(self) -> Crowding:
        self.began = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        import psutil

        clock, everyone, own = (now - then for now, then in zip(self._read(), self.began, strict=True))
        others = max(0.0, everyone - own) / max(clock, 1e-6)
        self.wanted = (self.threads + others) / (psutil.cpu_count() or self.threads)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: the clock, CPU time of every program (and what a host took away), CPU time of this process."""
        import psutil

        times = psutil.cpu_times()
        every = sum(times[:8]) - times.idle - getattr(times, "iowait", 0.0)  # guests are in user and nice already
        return time.perf_counter(), every, time.process_time()


def available_memory_mb() -> int | None:
    """Memory for new programs, cgroup limits included; None where the platform does not tell."""
    import psutil

    available = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            room = int(Path(limit).read_text()) - int(Path(used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        available = min(available, max(room, 0))
    return round(available / 1e6)


def cuda_packages() -> list[str]:
    """Installed packages that are of use with an NVIDIA GPU only."""
    names = {dist.metadata["Name"] or "" for dist in importlib.metadata.distributions()}
    return sorted(name for name in names if CUDA_NAMES.match(name))


def starter_there() -> bool:
    """Whether the shipped base model is in place, so that `tunelet demo` needs no network."""
    from tunelet.starter import BASE

    return (BASE / "model.safetensors").is_file()


def lines(told: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, value, why) rows for people."""
    reasons, memory = told["reasons"], told["memory_mb"]
    packages = told["packages"]
    return [
        ("device", told["device"], reasons.get("device", "")),
        ("dtype", told["dtype"], reasons.get("dtype", "")),
        ("threads", str(told["threads"]), reasons.get("threads", "")),
        ("memory", f"{_gb(memory['available'])} free of {_gb(memory['total'])}", reasons["memory"]),
        ("disk", f"{_gb(told['disk_free_mb'])} free", reasons["disk"]),
        ("processor", told["cpu"], f"{told['cores']['usable']} logical cores usable"),
        ("python", told["python"], sys.executable),
        *((name, packages.get(name, "missing"), why) for name, why in NEEDS.items()),
        ("CUDA packages", str(len(told["cuda_packages"])), ", ".join(told["cuda_packages"][:4])),
        ("starter", "there" if told["starter"] else "missing", "the model of `tunelet demo`"),
    ]


def _gb(mb: int | None) -> str:
    return "unknown" if mb is None else f"{mb / 1000:.1f} GB"

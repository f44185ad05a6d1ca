"""What a run ran on: versions, processor, cores, memory, platform, for env.json. Nothing private: no names, paths or
variables.

Not for choosing a device (models/device.py). Reads package versions from their metadata, so that torch is not imported.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

PACKAGES = (
    "tunelet",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "peft",
    "numpy",
    "pydantic",
    "datasets",
    "pyarrow",
)


def environment(choice: Any = None) -> dict[str, Any]:
    """The environment as plain JSON values. `choice`: the device choice (dataclass with device, dtype, threads,
    reasons), if made.
    """
    out: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": {"system": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "cpu": cpu_name(),
        "cores": {"usable": usable_cores(), "logical": os.cpu_count()},
        "memory_mb": memory_mb(),
    }
    if choice is not None:
        out["choice"] = dataclasses.asdict(choice) if dataclasses.is_dataclass(choice) else dict(choice)
    return out


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_mb() -> int | None:
    """Physical memory in MB (10^6 bytes), None where the platform does not tell."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6)
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

"""Energy of a stretch of work: read from the hardware's counters where they can be read, else estimated and labelled
so.

Not a plan (predictions are the loop's). Counters: RAPL through Linux' powercap for CPU packages, NVML for NVIDIA
GPUs; they count
the whole package or board, with everything else that runs on it.
Estimate (Green Algorithms, Lannelongue et al. 2021, doi 10.1002/advs.202100707, its defaults for an unknown CPU; PUE
1 as
this is no data centre):  Wh = (CPU seconds x 12 W + wall seconds x GB of memory held x 0.3725 W) / 3600
CO2 is always an estimate: Wh x the world's average of 480 g/kWh in 2023 (Ember, Global Electricity Review 2024).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

WATTS_PER_CORE = 12.0
WATTS_PER_GB = 0.3725
GRAMS_PER_KWH = 480.0
POWERCAP = Path("/sys/class/powercap")
SAMPLE_SECONDS = 20.0  # RAPL's counters run over after about half an hour at the least

Counter = Callable[[], float]  # joules since some moment, never falling


class Meter:
    """`with Meter(device) as meter: ...` then `meter.reading()`, also while it runs."""

    def __init__(self, device: str = "cpu", *, counters: Mapping[str, Counter] | None = None):
        self.device = device
        self._counters = dict(find_counters(device) if counters is None else counters)
        self._end: tuple[float, float, dict[str, float]] | None = None
        self._quit = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> Meter:
        self._start = self._now()
        if self._counters:
            self._sampler = threading.Thread(target=self._sample, name="energy", daemon=True)
            self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._quit.set()
        if self._sampler is not None:
            self._sampler.join()
        self._end = self._now()

    def _sample(self) -> None:
        while not self._quit.wait(SAMPLE_SECONDS):
            for counter in self._counters.values():
                counter()

    def _now(self) -> tuple[float, float, dict[str, float]]:
        return time.monotonic(), cpu_seconds(), {name: counter() for name, counter in self._counters.items()}

    def reading(self) -> dict[str, Any]:
        """{"energy_wh", "kind": "measured"|"estimated", "method", "seconds", "cpu_seconds", "parts_wh", "co2_g",
        ...}.
        """
        now = self._end or self._now()
        seconds, cpu = now[0] - self._start[0], now[1] - self._start[1]
        measured = {name: (joules - self._start[2][name]) / 3600 for name, joules in now[2].items()}
        return reading(self.device, seconds, cpu, peak_gb(), measured)


def reading(device: str, seconds: float, cpu: float, gb: float | None, measured: Mapping[str, float]) -> dict[str, Any]:
    """Figures of a stretch of work, from what was counted. `measured`: Wh by counter ("cpu", "gpu")."""
    parts = {f"{name}, measured": wh for name, wh in measured.items()}
    methods = [f"{name}: {SOURCES[name]}" for name in measured]
    missing = [name for name in ("cpu", *(["gpu"] if device != "cpu" else [])) if name not in measured]
    if "cpu" in missing:
        parts["cpu, estimated"] = cpu * WATTS_PER_CORE / 3600
        parts["memory, estimated"] = seconds * (gb or 0.0) * WATTS_PER_GB / 3600
        methods.append(
            f"cpu and memory: CPU seconds x {WATTS_PER_CORE:g} W + seconds x GB held x {WATTS_PER_GB} W "
            "(Green Algorithms, Lannelongue et al. 2021)"
        )
    if "gpu" in missing:
        methods.append(f"the GPU ({device}) is not counted: it has no counter that can be read")
    total = sum(parts.values())
    return {
        "energy_wh": total,
        "kind": "estimated" if missing else "measured",
        "method": "; ".join(methods),
        "parts_wh": parts,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "memory_gb": gb,
        "co2_g": total / 1000 * GRAMS_PER_KWH,
        "co2_kind": "estimated",
        "co2_method": f"{GRAMS_PER_KWH:g} g/kWh, the world's average of 2023 (Ember 2024); your grid differs",
    }


SOURCES = {
    "cpu": "RAPL counters of the CPU packages, all programs included",
    "gpu": "NVML counters of the GPUs, all programs included",
}


@contextlib.contextmanager
def metered(run: Any, part: str, device: str) -> Iterator[None]:
    """Adds what the block takes to the run's energy.json, also where it is stopped."""
    with Meter(device) as meter:
        try:
            yield
        finally:
            add(run, part, meter.reading())


def add(run: Any, part: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Add the reading of `part` ("before", "training", ...) to the run's energy.json and return all of it.

    A part that was there already (a run that was stopped and went on) grows. The total is measured only if all of it
    is.
    """
    parts = (run.read_json("energy.json") or {}).get("parts", {})
    old = parts.get(part)
    parts[part] = dict(figures) if old is None else _sum([old, figures])
    whole = _sum(list(parts.values()))
    whole["parts"] = parts
    run.write_json("energy.json", whole)
    return whole


def fill_in(run: Any, part: str, seconds: float) -> None:
    """A kill loses the reading of the session it ended. Where `part` took `seconds` by the run's own log and its
    readings
    cover fewer, the rest is added at their mean power, and the part is an estimate.
    """
    known = ((run.read_json("energy.json") or {}).get("parts") or {}).get(part)
    lost = seconds - known["seconds"] if known else 0.0
    if lost <= 0.05 * seconds or not known["seconds"]:
        return
    scaled = {key: known[key] * lost / known["seconds"] for key in ("energy_wh", "seconds", "cpu_seconds", "co2_g")}
    note = "the time before a kill: at the mean power of the rest"
    parts = {"before a kill, estimated": scaled["energy_wh"]}
    add(run, part, {**known, **scaled, "parts_wh": parts, "kind": "estimated", "method": note})


def _sum(readings: list[Mapping[str, Any]]) -> dict[str, Any]:
    out = {key: readings[-1][key] for key in ("co2_kind", "co2_method")}
    out["memory_gb"] = max((r["memory_gb"] for r in readings if r["memory_gb"]), default=None)
    for key in ("energy_wh", "seconds", "cpu_seconds", "co2_g"):
        out[key] = sum(r[key] for r in readings)
    out["kind"] = "measured" if all(r["kind"] == "measured" for r in readings) else "estimated"
    out["method"] = " + ".join(dict.fromkeys(r["method"] for r in readings))
    names = dict.fromkeys(name for r in readings for name in r["parts_wh"])
    out["parts_wh"] = {name: sum(r["parts_wh"].get(name, 0.0) for r in readings) for name in names}
    return out


def label(figures: Mapping[str, Any] | None) -> str:
    """'0.41 Wh (estimated)': how every energy figure is shown."""
    if not figures or figures.get("energy_wh") is None:
        return "not known"
    wh = figures["energy_wh"]
    return (f"{wh / 1000:.2f} kWh" if wh >= 1000 else f"{wh:.3g} Wh") + f" ({figures['kind']})"


# -- what can be read -------------------------------------------------------------------------------------------------


def find_counters(device: str) -> dict[str, Counter]:
    """The counters of this machine that this process may read: "cpu" and, where a GPU computes, "gpu"."""
    found = {"cpu": rapl(POWERCAP), "gpu": nvml() if device == "cuda" else None}
    return {name: counter for name, counter in found.items() if counter is not None}


def rapl(root: Path) -> Counter | None:
    """Joules of all CPU packages, from powercap's energy_uj files; None where there are none or only root may read
    them.
    """
    zones: list[tuple[Path, float]] = []
    for zone in sorted(root.glob("intel-rapl:*")):
        if zone.name.count(":") != 1:  # intel-rapl:0:0 and the like are parts of a package
            continue
        try:
            (zone / "energy_uj").read_text()
            zones.append((zone / "energy_uj", float((zone / "max_energy_range_uj").read_text())))
        except OSError:
            return None
    if not zones:
        return None
    last = [float(path.read_text()) for path, _ in zones]
    total = 0.0
    lock = threading.Lock()

    def joules() -> float:
        nonlocal total
        with lock:
            for place, (path, size) in enumerate(zones):
                now = float(path.read_text())
                total += now - last[place] + (size if now < last[place] else 0.0)  # the counter ran over
                last[place] = now
            return total / 1e6

    return joules


def nvml() -> Counter | None:
    """Joules of all NVIDIA GPUs this process sees, since the driver was loaded; None where NVML or its counter is
    missing.
    """
    try:
        library = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
    except OSError:
        return None
    count = ctypes.c_uint()
    if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
        return None
    handles = []
    for index in range(count.value):
        handle = ctypes.c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)):
            return None
        handles.append(handle)

    def joules() -> float:
        total = 0
        for handle in handles:
            millijoules = ctypes.c_ulonglong()
            if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)):
                raise OSError("NVML gave no energy")
            total += millijoules.value
        return total / 1000

    try:
        joules()
    except OSError:  # boards before Volta have no counter
        return None
    return joules if handles else None


def cpu_seconds() -> float:
    """CPU time of this process and its ended children, user and system."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def peak_gb() -> float | None:
    """Most memory this process has held, in GB (10^9 bytes); None where the system does not tell."""
    if os.name == "nt":
        return None
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 1e9

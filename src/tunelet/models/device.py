"""Which device, dtype and number of threads to compute with, and why. Not for loading models; imports torch only when
it must look at a GPU.

bfloat16 is chosen on a CPU only where the CPU multiplies it in hardware (elsewhere it is emulated, and slower than
float32) and is measured to be faster, which takes a tenth of a second.
"""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tunelet.errors import TuneletError

MMAP_MAX = -4  # of mallopt: how many allocations may have pages of their own
FASTER = 1.2  # bfloat16 has to be this many times as fast as float32: it is less exact
BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")  # x86 twice, then arm's name in /proc/cpuinfo


@dataclass(frozen=True)
class Choice:
    """device: "cpu", "cuda" or "mps"; dtype: "float32" or "bfloat16"; reasons: why, one sentence for each field.

    matmul_precision: what `torch.set_float32_matmul_precision` gets ("highest", or "medium": oneDNN's kernels on a
    CPU). processes: how many train together (torchrun), each with so many threads.
    """

    device: str
    dtype: str
    threads: int
    reasons: dict[str, str] = field(default_factory=dict)
    matmul_precision: str = "highest"
    processes: int = 1


def choose(device: str = "auto", dtype: str = "auto", threads: int = 0) -> Choice:
    """Resolve "auto" and 0 for this machine. Raises TuneletError where the device asked for is not there."""
    reasons: dict[str, str] = {}
    device, reasons["device"] = _device(device)
    threads, reasons["threads"] = _threads(threads)
    dtype, reasons["dtype"] = _dtype(dtype, device, threads)
    precision = "highest"
    if device == "cpu" and dtype == "float32":
        precision, reasons["matmul_precision"] = _matmul_precision(threads)
    return Choice(device, dtype, threads, reasons, precision, int(os.environ.get("WORLD_SIZE", "1")))


def apply(choice: Choice) -> None:
    """Set torch up as chosen: threads, float32 kernels, and an allocator that keeps freed memory."""
    import torch

    keep_freed_memory()
    torch.set_num_threads(choice.threads)
    torch.set_float32_matmul_precision(choice.matmul_precision)


def _device(asked: str) -> tuple[str, str]:
    if asked == "cpu":
        return "cpu", "asked for"
    if asked == "auto" and not _gpu_possible():
        return "cpu", "no GPU was found"
    import torch

    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if asked == "auto":
        if found == "cpu":
            return "cpu", f"this build of torch ({torch.__version__}) reaches no GPU"
        return found, f"torch reaches {torch.cuda.get_device_name() if found == 'cuda' else 'the GPU of this Mac'}"
    if asked != found:
        built = f"torch {torch.__version__} reaches {'no GPU' if found == 'cpu' else found} here"
        raise TuneletError(
            f"The device {asked} cannot be used.",
            why=built,
            fix='Set model.device to "auto" or "cpu", or install a torch built for that GPU.',
        )
    return asked, "asked for"


def _gpu_possible() -> bool:
    """Without importing torch: could there be a GPU at all?"""
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    if os.name == "nt":
        return True
    return (
        Path("/proc/driver/nvidia").exists()
        or Path("/dev/nvidia0").exists()
        or Path("/dev/kfd").exists()
        or Path("/dev/dxg").exists()
    )


def _dtype(asked: str, device: str, threads: int) -> tuple[str, str]:
    if asked != "auto":
        return asked, "asked for"
    if device == "cuda":
        import torch

        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "this GPU multiplies bfloat16 in hardware"
        return "float32", "this GPU does not multiply bfloat16 in hardware"
    if device == "mps":
        return "float32", "float32 is the safe choice on this GPU; set model.dtype to bfloat16 to halve the memory"
    flag = cpu_bf16_flag()
    if flag:
        times = gemm_gflops("cpu", "bfloat16", threads) / gemm_gflops("cpu", "float32", threads)
        if times >= FASTER:
            return (
                "bfloat16",
                f"this CPU multiplies bfloat16 in hardware ({flag}), {times:.1f} times as fast",
            )
        return "float32", f"bfloat16 is only {times:.1f} times as fast here, though the CPU has it in hardware ({flag})"
    return "float32", "this CPU has no bfloat16 instructions (" + ", ".join(
        BF16_FLAGS[:2]
    ) + " or Arm bf16), and emulation is slower than float32"


@cache
def cpu_bf16_flag() -> str:
    """The CPU's flag for bfloat16 multiplication, "" where it has none or does not tell."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith(("flags", "features")):
                return next((flag for flag in BF16_FLAGS if flag in line.split()), "")
        return ""
    if sys.platform == "darwin":
        asked = subprocess.run(
            ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"], capture_output=True, text=True, check=False
        )
        return "FEAT_BF16" if asked.stdout.strip() == "1" else ""
    import torch

    probes = {"amx_bf16": "_is_amx_tile_supported", "avx512_bf16": "_is_avx512_bf16_supported"}
    return next((flag for flag, name in probes.items() if getattr(torch.cpu, name, bool)()), "")


def _threads(asked: int) -> tuple[int, str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if asked:
        return asked, "asked for"
    # torchrun sets OMP_NUM_THREADS to 1 where nobody has set it: not a wish of anybody's
    processes, said = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.environ.get("OMP_NUM_THREADS", "")
    if said.isdigit() and not (processes > 1 and said == "1"):
        return int(said), "OMP_NUM_THREADS says so"
    physical = max(1, usable // _threads_per_core())
    quota = _cpu_quota()
    if quota is not None and quota < physical:
        physical = max(1, int(quota))
        return max(1, physical // processes), f"this container may use {quota:g} cores' worth of time"
    if processes > 1:
        return max(1, physical // processes), f"{physical} physical cores shared by {processes} processes"
    return physical, f"{physical} physical cores may be used by this process"


def _cpu_quota() -> float | None:
    """Cores' worth of time that a container may use; None where there is no limit. More threads than that would wait
    for each other while all of them are stopped."""
    root = Path("/sys/fs/cgroup")
    try:
        if (root / "cpu.max").exists():
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # no such file, or "max"
        return None


def _threads_per_core() -> int:
    siblings = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")
    if siblings.exists():
        return len(siblings.read_text().replace("-", ",").split(","))
    return 1 if platform.machine() in ("arm64", "aarch64") else 2 if os.name == "nt" or sys.platform == "darwin" else 1


@cache
def _matmul_precision(threads: int) -> tuple[str, str]:
    """Measured, not assumed: on some CPUs torch's default float32 GEMM is half as fast as oneDNN's, which "medium"
    selects.

    By contract "medium" may compute in bfloat16: it is taken only where the result stays float32-exact.
    """
    import torch

    before, before_threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_num_threads(threads)
    x, y = torch.randn(384, 384), torch.randn(384, 384)
    exact = x.double() @ y.double()
    seconds, error = {}, {}
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            error[precision] = float(((x @ y).double() - exact).abs().max() / exact.abs().max())
            times = []
            for _ in range(7):
                start = time.perf_counter()
                x @ y
                times.append(time.perf_counter() - start)
            seconds[precision] = min(times)
    finally:
        torch.set_float32_matmul_precision(before)
        torch.set_num_threads(before_threads)
    ratio = seconds["highest"] / seconds["medium"]
    if error["medium"] > 1e-5:
        return "highest", f"oneDNN would round to bfloat16 here (error {error['medium']:.0e})"
    if ratio < 1.15:
        return "highest", f"oneDNN's float32 kernels are no faster here ({ratio:.2f}x)"
    return (
        "medium",
        f"oneDNN's float32 kernels are {ratio:.1f}x as fast here and as exact (error {error['medium']:.0e})",
    )


@cache
def keep_freed_memory() -> bool:
    """glibc: do not give freed tensors back to the system at once. Every step asks for the same memory again, and
    fetching fresh pages cost 13-20 % of a step (docs/notebook.md). True where it was set."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl and others
        return False
    trim_threshold, top_pad = -1, -2
    return all([mallopt(MMAP_MAX, 0), mallopt(trim_threshold, ctypes.c_int(2**31 - 1)), mallopt(top_pad, 64 * 2**20)])


@contextlib.contextmanager
def returning_memory() -> Iterator[None]:
    """Inside the block large tensors have pages of their own, which go back to the system with them, even after
    `keep_freed_memory`: for loading, where tensors that stay and tensors that pass alternate and the holes between them
    would remain in the heap (up to 1.4 GB for 1.7B parameters: docs/notebook.md)."""
    if not (keep_freed_memory.cache_info().currsize and keep_freed_memory()):
        yield
        return
    import ctypes

    mallopt = ctypes.CDLL("libc.so.6").mallopt
    mallopt(MMAP_MAX, 65536)
    try:
        yield
    finally:
        mallopt(MMAP_MAX, 0)


def release_freed() -> None:
    """glibc: give back to the system what was freed since, also under `keep_freed_memory`. For between two pieces of
    work: the next begins with what it needs only."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    with contextlib.suppress(OSError, AttributeError):  # musl and others
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def held_mb(device: str = "cpu") -> float:
    """What this process holds now, in MB (10^6 bytes): of the GPU where there is one."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated() / 1e6
    import psutil

    return psutil.Process().memory_info().rss / 1e6


@cache
def gemm_gflops(device: str, dtype: str, threads: int) -> float:
    """10^9 operations a second of a product of two 768 x 768 matrices, the best of a few: 40 ms on one core."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, y = (torch.randn(768, 768).to(device, getattr(torch, dtype)) for _ in range(2))
        x @ y
        best = float("inf")
        for _ in range(9):
            start, cpu = time.perf_counter(), time.process_time()
            float((x @ y)[0, 0])
            took = time.process_time() - cpu if (device, threads) == ("cpu", 1) else time.perf_counter() - start
            best = min(best, took)
    finally:
        torch.set_num_threads(before)
    return 2 * 768**3 / best / 1e9


def start_peak(device: str = "cpu") -> None:
    """From here on `peak_since_mb` counts. `peak_mb` still tells of the whole process."""
    global _earlier_mb
    release_freed()
    _earlier_mb = max(_earlier_mb, peak_mb(device) or 0.0)
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):  # a container may forbid it: then the peak is the process's
            Path("/proc/self/clear_refs").write_text("5")


_earlier_mb = 0.0


def peak_mb(device: str = "cpu") -> float | None:
    """Most memory this process has held, in MB (10^6 bytes): of the GPU where there is one. None where the system does
    not tell."""
    peak = peak_since_mb(device)
    return None if peak is None else max(peak, _earlier_mb)


def peak_since_mb(device: str = "cpu") -> float | None:
    """The same since `start_peak`, where the system can begin anew (Linux, CUDA)."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    if os.name == "nt":
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 1e6 if sys.platform == "darwin" else most * 1024 / 1e6

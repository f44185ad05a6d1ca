"""The choice of device, dtype and threads follows the hardware, and says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tunelet.errors import TuneletError
from tunelet.models import device


def speeds(monkeypatch, bfloat16):
    monkeypatch.setattr(
        device, "gemm_gflops", lambda on, dtype, threads: {"bfloat16": bfloat16, "float32": 100.0}[dtype]
    )


def test_the_dtype_follows_the_flags(monkeypatch):
    speeds(monkeypatch, 300.0)
    for flag, dtype in (("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("bf16", "bfloat16"), ("", "float32")):
        monkeypatch.setattr(device, "cpu_bf16_flag", lambda flag=flag: flag)
        choice = device.choose("cpu", threads=1)
        assert choice.dtype == dtype
        assert (flag or "no bfloat16") in choice.reasons["dtype"]
    assert device.choose("cpu", "float32").dtype == "float32"
    assert device.choose("cpu", "bfloat16").dtype == "bfloat16"


def test_a_flag_alone_is_not_enough(monkeypatch):
    monkeypatch.setattr(device, "cpu_bf16_flag", lambda: "avx512_bf16")
    for speed, dtype in ((300.0, "bfloat16"), (110.0, "float32"), (20.0, "float32")):
        speeds(monkeypatch, speed)
        choice = device.choose("cpu", threads=1)
        assert choice.dtype == dtype and f"{speed / 100:.1f} times" in choice.reasons["dtype"]
    assert device.choose("cpu", "bfloat16").dtype == "bfloat16"


def test_the_speed_of_products_is_measured():
    before = torch.get_num_threads()
    assert 0.01 < device.gemm_gflops.__wrapped__("cpu", "float32", 1) < 1e5
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_the_quota_of_a_container(files, quota, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(device, "Path", lambda name: tmp_path)
    assert device._cpu_quota() == quota


def test_threads_stay_within_the_quota(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(device, "_threads_per_core", lambda: 2)
    monkeypatch.setattr(device, "_cpu_quota", lambda: 2.5)
    choice = device.choose("cpu", "bfloat16")
    assert choice.threads == 2 and "2.5 cores" in choice.reasons["threads"]
    monkeypatch.setattr(device, "_cpu_quota", lambda: None)
    assert device.choose("cpu", "bfloat16").threads == 32


def test_the_peak_begins_anew_and_the_whole_is_remembered():
    if not sys.platform.startswith("linux"):
        pytest.skip("the system's counter cannot begin anew here")
    large = torch.ones(50_000_000)
    before = device.peak_mb()
    del large
    device.start_peak()
    if device.peak_since_mb() == before:
        pytest.skip("this container does not let the counter begin anew")
    assert device.peak_since_mb() < before - 100 and device.peak_mb() == before
    assert device.held_mb() <= device.peak_since_mb() + 1


@pytest.mark.parametrize(
    "text,flag",
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n", "avx512_bf16"),
        ("flags : fpu amx_bf16 avx512_bf16\n", "amx_bf16"),
        ("Features\t: fp asimd i8mm bf16 dgh\n", "bf16"),
        ("flags : fpu avx2 f16c\n", ""),
        ("Features : fp asimd\n", ""),
    ],
)
def test_flags_are_read_from_cpuinfo(text, flag, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor : 0\n" + text)
    monkeypatch.setattr(device, "Path", lambda name: tmp_path / "cpuinfo")
    assert device.cpu_bf16_flag.__wrapped__() == flag


def test_threads(monkeypatch):
    assert device.choose("cpu", "bfloat16", threads=3).threads == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    choice = device.choose("cpu", "bfloat16")
    assert choice.threads == 7 and "OMP_NUM_THREADS" in choice.reasons["threads"]
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert device.choose("cpu", "bfloat16").threads >= 1


def test_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(TuneletError, match="cuda"):
        device.choose("cuda")


def test_float32_kernels_are_chosen_by_measurement_and_only_where_exact(monkeypatch):
    choice = device.choose("cpu", "float32", threads=1)
    assert choice.matmul_precision in ("highest", "medium") and choice.reasons["matmul_precision"]
    before = torch.get_float32_matmul_precision()
    precision, reason = device._matmul_precision.__wrapped__(1)
    assert torch.get_float32_matmul_precision() == before
    assert ("as exact" in reason) == (precision == "medium")


def test_a_cpu_choice_imports_no_torch():
    code = "import sys; from tunelet.models import device; device._gpu_possible = lambda: False; "
    code += "device.choose('auto', 'bfloat16'); print('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(device.__file__).parents[2])}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_peak_memory_is_in_mb():
    assert 50 < device.peak_mb() < 1e6

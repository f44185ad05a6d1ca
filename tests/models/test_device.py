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


def test_the_dtype_follows_the_flags(monkeypatch):
    for flag, dtype in (("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("bf16", "bfloat16"), ("", "float32")):
        monkeypatch.setattr(device, "cpu_bf16_flag", lambda flag=flag: flag)
        choice = device.choose("cpu", threads=1)
        assert choice.dtype == dtype
        assert (flag or "no bfloat16") in choice.reasons["dtype"]
    assert device.choose("cpu", "float32").dtype == "float32"
    assert device.choose("cpu", "bfloat16").dtype == "bfloat16"


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

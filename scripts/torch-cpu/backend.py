"""A PEP 517 backend: `pip install -r requirements.txt` takes torch's CPU build on Linux without an NVIDIA GPU.

Why not `--extra-index-url` in requirements.txt: pip asks such an index for every package, and where it can't be reached
retries each for seconds to minutes. This asks once, through scripts/setup_env.py. Elsewhere it requires nothing.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import setup_env

NAME, VERSION = "tunelet_torch_cpu", "1"


def get_requires_for_build_wheel(config_settings: object = None) -> list[str]:
    return []


def build_wheel(wheel_directory: str, config_settings: object = None, metadata_directory: str | None = None) -> str:
    """Write a wheel that holds metadata only. Returns its file name."""
    requires = f"Requires-Dist: {setup_env.cpu_torch()[0]}\n" if setup_env.wants_cpu_build() else ""
    info = f"{NAME}-{VERSION}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {NAME.replace('_', '-')}\nVersion: {VERSION}\n{requires}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tunelet\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    wheel = f"{NAME}-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory) / wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel

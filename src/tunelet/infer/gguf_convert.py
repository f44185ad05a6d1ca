"""One GGUF file in a folder in the making, and what the gate says of it: of a model, a merged adapter, or a LoRA.

Not for when and where (gguf_export.py), the format (gguf_file.py, gguf_lora.py) or the gate itself (gguf_gate.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunelet.infer import export, gguf_file, gguf_gate, gguf_lora
from tunelet.infer.gguf_rows import Row
from tunelet.infer.gguf_source import Source
from tunelet.models import weights

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Made:
    """tensors: how many of each type; weights: fingerprint of what was converted (models/weights.py)."""

    file: Path
    tensors: dict[str, int]
    weights: str
    rows_from: str
    checked: gguf_gate.Checked


def make(
    of: Source,
    folder: Path,
    quant: str,
    *,
    lora: bool,
    rows: Sequence[Row],
    rows_from: str,
    progress: Progress | None,
) -> Made:
    """Write the file into `folder` and check it there. See gguf_export.export for what is raised."""
    file = folder / f"{of.name}-{quant}.gguf"
    model = of.base or of.folder
    merged = folder / "merged"
    if lora:
        return gguf_lora.make(of, folder, quant, rows=rows, rows_from=rows_from, progress=progress)
    if of.base is not None:
        # in float32, so that what the adapter adds is rounded once, by the file's own format
        ids = [row.ids for row in rows]
        export.merge(of.folder, merged, dtype="float32", rows=ids, rows_from=rows_from, progress=progress)
        model = merged
    found = gguf_file.write(model, file, quant, name=of.name)
    checked, told = gguf_gate.check(file, model, quant, rows=rows, rows_from=rows_from, progress=progress)
    made = Made(file, found["tensors"], weights.fingerprint(model), told, checked)
    shutil.rmtree(merged, ignore_errors=True)
    return made

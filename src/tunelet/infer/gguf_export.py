"""A run, a model folder or an adapter becomes a GGUF file, which appears once the gate has proved it.

Not for the format (gguf_file.py) and not for the proof (gguf_gate.py). An export is a folder: the file, and
`parity.json`, which says what it was made of, what was measured and under which bounds. It is made beside its place,
checked there from the disk, and renamed.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunelet.errors import GateError, TuneletError
from tunelet.infer import gguf_source
from tunelet.runs import environment, lock
from tunelet.runs.files import disk, finite, in_the_making, sha256, write_atomically

PARITY = "parity.json"
QUANTS = ("f32", "bf16", "f16", "q8_0", "q4_0")
LISTED = 6  # findings that an error names

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """file: the GGUF file; parity: what parity.json beside it says; fresh: whether it was made by this call."""

    file: Path
    parity: dict[str, Any]
    fresh: bool = True

    def add(self, **figures: Any) -> Exported:
        """With more figures in parity.json."""
        parity = {**self.parity, **figures}
        _write(self.file.parent / PARITY, parity)
        return Exported(self.file, parity, self.fresh)


def ready(
    path: str | Path, quant: str = "q8_0", *, lora: bool = False, progress: Progress | None = None, **how: Any
) -> Exported:
    """The proved GGUF file of a run or model (as `export` takes them), made where there is none or it is stale.

    It is kept in RUN/export/QUANT, of other folders in ~/.cache/tunelet/gguf (or $XDG_CACHE_HOME). `how`: see export.
    Where the file is there this takes milliseconds: no model is loaded, and it is known by its size and time.
    """
    if found := there(path, quant, lora=lora):
        return found
    of = gguf_source.source(path)
    with lock.held(of.home()):
        return export(path, _home(of, quant, lora), quant, lora=lora, progress=progress, replace=True, **how)


def there(path: str | Path, quant: str = "q8_0", *, lora: bool = False) -> Exported | None:
    """What `ready` would give without making it; None where it would have to."""
    check_quant(quant)
    of = gguf_source.source(path)
    return _there(_home(of, quant, lora), of)


def _home(of: gguf_source.Source, quant: str, lora: bool) -> Path:
    return of.home() / (f"lora-{quant}" if lora else quant)


def check_installed() -> None:
    """Raises TuneletError where the extra is missing that writes these files and reads them."""
    if missing := [name for name in ("gguf", "xllamacpp") if importlib.util.find_spec(name) is None]:
        raise TuneletError(
            "llama.cpp is not installed.",
            why=f"there is no package {' and no '.join(missing)}, which are an extra",
            fix='pip install "tunelet[serve]", or take the torch engine: --engine torch',
        )


def check_quant(quant: str) -> None:
    from tunelet.errors import did_you_mean

    if quant not in QUANTS:
        raise TuneletError(
            f"{quant}: there is no such quantisation.{did_you_mean(quant, QUANTS)}", fix=f"one of {', '.join(QUANTS)}"
        )


def _there(place: Path, of: gguf_source.Source) -> Exported | None:
    """The export at `place`; None where there is none, it was made of something else, or it was written to since."""
    try:
        parity = json.loads((place / PARITY).read_text(encoding="utf-8"))
        file = place / parity["file"]
        stat = file.stat()
        if parity["source"]["fingerprint"] != of.fingerprint or stat.st_size != parity["bytes"]:
            return None
        if stat.st_mtime_ns != parity["mtime_ns"] and sha256(file) != parity["sha256"]:
            return None
    except (OSError, KeyError, TypeError, ValueError):
        return None  # half a folder, or one of another version: made anew
    return Exported(file, parity, fresh=False)


def export(
    path: str | Path,
    out: str | Path,
    quant: str = "q8_0",
    *,
    lora: bool = False,
    rows: Sequence[Any] = (),
    rows_from: str = "",
    progress: Progress | None = None,
    replace: bool = False,
) -> Exported:
    """Make the folder `out` with the GGUF file of a run, a model folder, a hub id or an adapter, and prove it.

    quant: one of QUANTS. An adapter is merged into its base first, through the merge gate; with `lora` it becomes a
    LoRA file of its own, to be loaded beside the base's. rows: gguf_rows.Row to compare on, `rows_from` says what they
    are; too few are filled up with built-in ones. replace: whether `out` may be there. Memory: the model in float32.
    Raises TuneletError for bad input and what llama.cpp does not know, GateError where the file does not say what the
    model says: nothing is left at `out` then.
    """
    from tunelet.infer import gguf_convert

    check_quant(quant)
    check_installed()
    of, out = gguf_source.source(path), Path(out)
    if not replace:
        check_out(out)
    began = time.monotonic()
    with in_the_making(out) as folder:
        made = gguf_convert.make(of, folder, quant, lora=lora, rows=rows, rows_from=rows_from, progress=progress)
        if made.checked.findings:
            found = made.checked.findings
            more = [f"and {len(found) - LISTED} more"] if len(found) > LISTED else []
            raise GateError(
                f"The GGUF file does not say what the model says; nothing was written to {out}.",
                why="; ".join(found[:LISTED] + more),
                fix=made.checked.fix,
            )
        stat = made.file.stat()
        parity = {
            "file": made.file.name,
            "quant": quant,
            "kind": "lora" if lora else "model",
            "bytes": stat.st_size,
            "sha256": sha256(made.file),
            "mtime_ns": stat.st_mtime_ns,
            "tensors": made.tensors,
            "source": {
                "path": str(path),
                "folder": str(of.folder),
                "base": None if of.base is None else str(of.base),
                "run": None if of.run is None else str(of.run),
                "fingerprint": of.fingerprint,
                "weights": made.weights,
            },
            "rows_from": made.rows_from,
            "stop_ids": list(made.checked.stop_ids),
            "figures": made.checked.figures,
            "bounds": made.checked.bounds,
            "seconds": round(time.monotonic() - began, 1),
            "versions": environment.environment()["packages"] | made.checked.versions,
        }
        _write(folder / PARITY, parity)
    return Exported(out / parity["file"], parity)


def check_out(out: Path) -> None:
    """Raises TuneletError where something is at `out`."""
    with disk(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise TuneletError(
                f"--out {out} is there already.", why="nothing is written over", fix="Choose another --out."
            )


def _write(file: Path, parity: dict[str, Any]) -> None:
    with disk(file):
        write_atomically(file, json.dumps(finite(parity), ensure_ascii=False, indent=2) + "\n")

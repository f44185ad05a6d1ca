"""What is exported: which folders a name means, what the file is called, and a fingerprint of all that goes into it.

Not for making the file (gguf_export.py). Nothing heavy is imported where a name is a folder or a run: a server asks
here, each time it starts, whether its file is still the model's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tunelet.models import weights
from tunelet.runs import history, record

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# What of a model's folder, beside its weights, goes into a GGUF file.
BESIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    ADAPTER_CONFIG,
)
FORMAT = 1  # of what is written: counted up where a change of the converter makes files of before stale


@dataclass(frozen=True)
class Source:
    """name: what files are called after; folder: of the model or adapter; base: an adapter's base; run: whose it is."""

    name: str
    folder: Path
    base: Path | None = None
    run: Path | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of the weights (see weights.fingerprint; an adapter's whole) and of all that is beside them."""
        found = hashlib.sha256(f"format {FORMAT}".encode())
        for folder in (self.folder, self.base):
            if folder is None:
                continue
            adapter = folder / ADAPTER
            is_adapter = (folder / ADAPTER_CONFIG).is_file()
            found.update(adapter.read_bytes() if is_adapter else weights.fingerprint(folder).encode())
            for name in BESIDE:
                if (folder / name).is_file():
                    found.update(name.encode() + b"\0" + (folder / name).read_bytes())
        return found.hexdigest()[:32]

    def home(self) -> Path:
        """Where exports are kept that were given no place: in the run, else in tunelet's cache."""
        return self.run / "export" if self.run else history.cache() / "gguf" / self.fingerprint


def source(path: str | Path) -> Source:
    """What `path` means: starter, a run, a folder of a model or an adapter, or a hub id.

    Raises TuneletError where there is no such model, or an adapter's base is not here.
    """
    folder, run = _folder(str(path))
    name = run.resolve().name if run else "starter" if str(path) == "starter" else folder.resolve().name
    if not (folder / ADAPTER_CONFIG).is_file():
        return Source(name, folder, None, run)
    told = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    base = Path(told or "")
    if not (told and (base / "config.json").is_file()):
        from tunelet.models import load

        base = load.base_of(folder)
    return Source(name, folder, base, run)


def _folder(path: str) -> tuple[Path, Path | None]:
    """(the model's or adapter's folder, the run it is of)."""
    place = Path(path)
    if path == "starter":
        from tunelet import starter

        place = Path(starter.BASE)
    run = place if record.is_run(place) else None
    found = record.Run(place).model_folder() if run else place
    if found is None or not any((found / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        from tunelet.models import load  # a hub id, or the error that says what is wrong

        found = load.resolve(path)
    return found, run

"""A model folder's weight files: what their headers say (format, completeness, dtype, number of parameters), and their
tensors, read one at a time.

Not for making a model of them (models/load.py).
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# safetensors' other names for dtypes that are read as they are
OTHER_DTYPES = {
    "F64": "float64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
SAMPLE_BYTES = 2**12  # of a tensor, at each of three places
BLOCK_ELEMENTS = 2**18  # numbers converted or looked at together: what a copy of them takes is nothing


def files(folder: Path) -> list[Path]:
    """The folder's weight files in safetensors. Raises TuneletError where there are none, only pickles, or a shard is
    missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError, AttributeError) as error:
            raise TuneletError(
                f"{index} cannot be read.", why=str(error), fix="Get the model's folder again."
            ) from error
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise TuneletError(
                f"The model in {folder} is incomplete.",
                why=f"{index.name} names {', '.join(absent[:3])}: not there",
                fix="Get the missing files.",
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickles = sorted(
        path.name for path in folder.iterdir() if path.suffix in PICKLES and path.name != "training_args.bin"
    )
    if pickles:
        raise TuneletError(
            f"The weights in {folder} are a pickle ({pickles[0]}).",
            why="opening a pickle can run any code that its author put there",
            fix="Use a copy in safetensors (most models have one), or convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
        )
    raise TuneletError(
        f"The folder {folder} holds no weights.",
        why="there is no model.safetensors in it",
        fix="Get the model's weights as model.safetensors.",
    )


def header(path: Path) -> dict[str, Any]:
    """name -> {"dtype", "shape", "data_offsets"} of a safetensors file. Raises TuneletError where the file is cut short
    or no such file."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > size - 8:
                raise ValueError(f"its header would take {length} bytes, the file has {size}")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TuneletError(
            f"{path} is not a safetensors file.",
            why=str(error),
            fix="Get the file again; an incomplete download or a git-lfs pointer looks like this.",
        ) from error
    if size != 8 + length + end:
        raise TuneletError(
            f"{path} is damaged.",
            why=f"it has {size} bytes where its header says {8 + length + end}: the download was cut short",
            fix="Get the file again.",
        )
    return entries


def check_file(path: Path) -> None:
    """Raises TuneletError where a safetensors file is damaged."""
    header(path)


def check(folder: Path) -> None:
    """Raises TuneletError where the folder's weights are missing, pickles, incomplete or damaged."""
    for path in files(folder):
        check_file(path)


def stored_dtype(folder: Path) -> str:
    """The dtype that most of the stored numbers have: "float32", "bfloat16" or "float16"."""
    amounts: Counter[str] = Counter()
    for path in files(folder):
        for entry in header(path).values():
            amounts[entry["dtype"]] += prod(entry["shape"])
    return DTYPES.get(amounts.most_common(1)[0][0], "float32") if amounts else "float32"


def count_parameters(folder: Path) -> int:
    """Numbers stored in the folder's weight files. An adapter's folder counts its own."""
    paths = [folder / "adapter_model.safetensors"] if (folder / "adapter_config.json").is_file() else files(folder)
    return sum(prod(entry["shape"]) for path in paths for entry in header(path).values())


def fingerprint(folder: Path) -> str:
    """A hash by which a model's weights are known again, however they are cut into files: of all names, shapes and
    dtypes, and of the first, middle and last bytes of each tensor. Training changes nearly every number, so that there
    is no need to read them all."""
    found = hashlib.sha256()
    there = [(name, entry, path) for path in files(folder) for name, entry in header(path).items()]
    for name, entry, path in sorted(there, key=lambda of: of[0]):
        found.update(f"{name} {entry['shape']} {entry['dtype']}".encode())
        start, end = entry["data_offsets"]
        with path.open("rb", buffering=0) as file:
            first = 8 + struct.unpack("<Q", file.read(8))[0]
            for at in (start, (start + end) // 2, max(start, end - SAMPLE_BYTES)):
                file.seek(first + at)
                found.update(file.read(min(SAMPLE_BYTES, end - at)))
    return found.hexdigest()[:32]


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file. `stored[...]` reads it into memory of its own.

    Wider floats come out as `dtype` at once, a block at a time, so that the two copies never stand side by side;
    `dtype` None: as it is stored. (Narrower ones are left to transformers, which keeps some tensors wide.)
    """

    path: Path
    start: int
    shape: tuple[int, ...]
    stored: str
    dtype: str | None

    def __getitem__(self, _: Any) -> Any:
        import torch

        there = getattr(torch, (DTYPES | OTHER_DTYPES)[self.stored])
        wanted = there if self.dtype is None else getattr(torch, self.dtype)
        widen = there.is_floating_point and there.itemsize < wanted.itemsize
        flat = torch.empty(prod(self.shape), dtype=wanted if widen else there)
        block = torch.empty(min(BLOCK_ELEMENTS, len(flat)), dtype=there) if widen else flat
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            for done in range(0, len(flat), max(1, len(block))):
                part = block[: len(flat) - done]
                _fill(file, part)
                if widen:
                    flat[done : done + len(part)] = part
        return flat.view(self.shape)


def _fill(file: Any, tensor: Any) -> None:
    import torch

    memory = memoryview(tensor.view(torch.uint8).numpy())
    while memory:
        got = file.readinto(memory)
        if not got:
            raise OSError(f"{file.name} ended {len(memory)} bytes too early")
        memory = memory[got:]


def tensors(folder: Path, dtype: str, *, mapped: bool) -> dict[str, Any]:
    """name -> a tensor to read with `[...]`, of every weight file of the folder.

    mapped: what is stored in `dtype` becomes a view of the file: no copy, one for all processes of this machine. Else,
    and on Windows (where a mapping counts as memory), everything is read.
    """
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for path in files(folder):
        entries = header(path)
        with path.open("rb") as file:
            first = 8 + struct.unpack("<Q", file.read(8))[0]
        views = safe_open(path, framework="pt") if mapped and sys.platform != "win32" else None
        for name, entry in entries.items():
            if entry["dtype"] not in DTYPES | OTHER_DTYPES:
                raise TuneletError(
                    f"{path} cannot be read.",
                    why=f"{name} is stored as {entry['dtype']}",
                    fix="Get the model in float32, float16 or bfloat16.",
                )
            if views is not None and DTYPES.get(entry["dtype"]) == dtype:
                found[name] = views.get_slice(name)
            else:
                start = first + entry["data_offsets"][0]
                found[name] = Stored(path, start, tuple(entry["shape"]), entry["dtype"], dtype if mapped else None)
    return found


def check_finite(model: Any, folder: Path) -> None:
    """Raises TuneletError where a weight is NaN or infinite."""
    import torch

    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not all(
            torch.isfinite(part.sum(dtype=torch.float32)) or torch.isfinite(part).all()  # a sum may be too large
            for part in tensor.flatten().split(BLOCK_ELEMENTS)
        ):
            raise TuneletError(
                f"The weights in {folder} are damaged.",
                why=f"{name} holds numbers that are not finite (NaN or infinity)",
                fix="Use another checkpoint: this one was saved after its training had failed.",
            )

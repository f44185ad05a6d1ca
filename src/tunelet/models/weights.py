"""What a model folder's weight files say before they are loaded: format, completeness, dtype, number of parameters.

Reads safetensors headers only (the first kilobytes); not for loading models (models/load.py).
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


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


def check_finite(model: Any, folder: Path) -> None:
    """Raises TuneletError where a weight is NaN or infinite."""
    import torch

    for name, tensor in model.state_dict().items():
        if (
            tensor.is_floating_point()
            and not torch.isfinite(tensor.sum(dtype=torch.float32))
            and not torch.isfinite(tensor).all()
        ):
            raise TuneletError(
                f"The weights in {folder} are damaged.",
                why=f"{name} holds numbers that are not finite (NaN or infinity)",
                fix="Use another checkpoint: this one was saved after its training had failed.",
            )

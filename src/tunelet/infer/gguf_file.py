"""A model folder becomes one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) run.

Not for the proof that it says the same (gguf_gate.py). Tensors are read, rounded and written one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunelet.infer import gguf_model, gguf_tokenizer
from tunelet.models import weights

QUANTS = ("f32", "bf16", "f16", "q8_0", "q4_0")
BLOCK = 32  # values that Q8_0 and Q4_0 round together: rows whose width is no multiple stay f16

Progress = Callable[[int, int], None]


def write(folder: Path, out: Path, quant: str, *, name: str = "", progress: Progress | None = None) -> dict[str, Any]:
    """Write `out` from the transformers model in `folder`, and say what it holds: tensors by type, bytes.

    quant: one of QUANTS; embeddings and head of q4_0 are kept in q8_0. Norms stay f32. The tokenizer, its chat template
    and its stop tokens travel inside. Raises TuneletError for what llama.cpp does not compute as transformers does, and
    for weights that are missing or pickles.
    """
    import gguf

    from tunelet.data.tokenizer import load_tokenizer
    from tunelet.infer import merge_files

    config = text_config(folder)
    shape = gguf_model.shape_of(config)
    tokenizer = load_tokenizer(folder)
    writer = gguf.GGUFWriter(out, shape.name)
    try:
        gguf_model.describe(writer, config, name or folder.name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(gguf.LlamaFileType[_file_type(quant)])
        gguf_tokenizer.describe(writer, tokenizer, config.vocab_size, tuple(merge_files.stop_ids(tokenizer, folder)))
        counts: dict[str, int] = {}
        found = list(gguf_model.tensors(config, weights_of(folder)))
        kinds = [_kind(tensor.place, tensor.shape, quant) for tensor in found]
        for tensor, kind in zip(found, kinds, strict=True):
            counts[kind.name] = counts.get(kind.name, 0) + 1
            shape_in_bytes = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            size = math.prod(shape_in_bytes)
            writer.add_tensor_info(tensor.place, shape_in_bytes, np.dtype(np.uint8), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (tensor, kind) in enumerate(zip(found, kinds, strict=True), 1):
            writer.write_tensor_data(gguf.quants.quantize(tensor.read(), kind))
            if progress:
                progress(done, len(found))
    finally:
        writer.close()
    return {"tensors": counts, "bytes": out.stat().st_size}


def text_config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()


def _file_type(quant: str) -> str:
    return {"f32": "ALL_F32", "bf16": "MOSTLY_BF16"}.get(quant, f"MOSTLY_{quant.upper()}")


def _kind(place: str, shape: Sequence[int], quant: str) -> Any:
    """The type a tensor is stored in: vectors whole, rows that blocks don't divide in f16."""
    from gguf import GGMLQuantizationType as Type

    if len(shape) == 1:
        return Type.F32
    if quant == "q4_0" and place in ("token_embd.weight", "output.weight"):
        quant = "q8_0"
    if quant.startswith("q") and shape[-1] % BLOCK:
        quant = "f16"
    return Type[quant.upper()]


def weights_of(folder: Path) -> dict[str, tuple[tuple[int, ...], Callable[[], NDArray[Any]]]]:
    """transformers' name -> shape, and how to read it as float32."""
    from safetensors import safe_open

    found: dict[str, tuple[tuple[int, ...], Callable[[], NDArray[Any]]]] = {}
    for file in weights.files(folder):
        opened = safe_open(file, framework="pt")
        for key in opened.keys():  # noqa: SIM118 - it is no mapping
            shape = tuple(opened.get_slice(key).get_shape())
            found[key] = (shape, lambda opened=opened, key=key: opened.get_tensor(key).float().numpy())
    return found

"""A LoRA adapter as a GGUF file of its own, which llama.cpp puts on the base's at run time.

Not for merged adapters (gguf_convert.py). Only what is a pair of small matrices beside a layer's weights can be such a
file. Its numbers stay float32; the quantisation is the base's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunelet.errors import TuneletError
from tunelet.infer import gguf_file, gguf_gate, gguf_model
from tunelet.infer.gguf_rows import Row
from tunelet.infer.gguf_source import ADAPTER, Source
from tunelet.models import weights

if TYPE_CHECKING:
    from tunelet.infer.gguf_convert import Made

EXACT = 1e-6  # that products of float32 matrices differ by
PAIR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def make(
    of: Source,
    folder: Path,
    quant: str,
    *,
    rows: Sequence[Row],
    rows_from: str,
    progress: Callable[[int, int], None] | None,
) -> Made:
    """Write the LoRA's file into `folder`, and check it on the base's proved file, which is made where it is missing.

    Raises TuneletError for what is no LoRA that llama.cpp knows.
    """
    from tunelet.infer import gguf_convert, gguf_export

    if of.base is None:
        raise TuneletError(
            f"{of.folder} is a whole model, not an adapter.",
            fix="export it without --lora: tunelet export RUN --to gguf",
        )
    file = folder / f"{of.name}-lora.gguf"
    count = write(of.folder, of.base, file)
    base = gguf_export.ready(of.base, quant, progress=progress)
    checked, told = gguf_gate.check(
        base.file, of.base, quant, adapter=(of.folder, file), rows=rows, rows_from=rows_from, progress=progress
    )
    checked.figures["base"] = str(base.file)
    checked = replace(checked, findings=[*findings(file, of.folder, gguf_file.text_config(of.base)), *checked.findings])
    return gguf_convert.Made(file, {"F32": count}, weights.fingerprint(of.base), told, checked)


def write(adapter: Path, base: Path, out: Path) -> int:
    """Write `out` from the adapter's folder; the number of its tensors.

    llama.cpp adds alpha / rank * B A to a weight. peft's scale of each layer (rsLoRA's, patterns of ranks and alphas)
    is multiplied into B, for an alpha of 1.
    """
    import gguf

    config = gguf_file.text_config(base)
    found = list(_tensors(adapter, config))
    writer = gguf.GGUFWriter(out, gguf_model.shape_of(config).name)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 1.0)
        for place, values in found:
            writer.add_tensor(place, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return len(found)


def findings(file: Path, adapter: Path, config: Any) -> Iterator[str]:
    """What is wrong with a LoRA's file: what it adds to each weight is not what peft adds, with the adapter in the
    folder `adapter` on its base. config: the base's."""
    from gguf import GGUFReader, get_tensor_name_map

    from tunelet.models import adapters, load
    from tunelet.models.device import Choice

    reader = GGUFReader(file)
    there = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    alpha = reader.get_field("adapter.lora.alpha").contents()
    places = get_tensor_name_map(_arch(config), config.num_hidden_layers)
    wrong, layers = [], adapters.lora_layers(load.load_model(adapter, Choice("cpu", "float32", 1)))
    for name, layer in layers:
        module = name.removeprefix("base_model.model.")
        place = places.get_name(f"{module}.weight", try_suffixes=(".weight",))
        a, b = (there.get(f"{place}.lora_{half}") for half in "ab")
        [kind] = layer.active_adapters
        right = gguf_model.laid_out(config, f"{module}.weight", layer.get_delta_weight(kind).detach().float().numpy())
        if a is None or b is None or not np.allclose(alpha / len(a) * b @ a, right, rtol=1e-3, atol=EXACT):
            wrong.append(module)
    if wrong:
        yield f"to {len(wrong)} of {len(layers)} weights it adds something else than peft does: {', '.join(wrong[:3])}"
    if len(there) != 2 * len(layers):
        yield f"it has {len(there)} tensors, for {len(layers)} layers"


def _arch(config: Any) -> Any:
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES

    return next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == gguf_model.shape_of(config).name)


def _tensors(adapter: Path, config: Any) -> Iterator[tuple[str, Any]]:
    from gguf import get_tensor_name_map
    from safetensors.numpy import load_file

    told = _config(adapter)
    places = get_tensor_name_map(_arch(config), config.num_hidden_layers)
    for name, values in sorted(load_file(adapter / ADAPTER).items()):
        match = PAIR.fullmatch(name)
        place = match and places.get_name(f"{match[1]}.weight", try_suffixes=(".weight",))
        if not match or place is None or place == "token_embd.weight":
            raise unsupported(f"it has {name}, which is not beside the weights of a layer")
        if place == "output.weight" and config.tie_word_embeddings:
            raise unsupported("it changes the head, which in the base's file is the embeddings")
        values = values.astype(np.float32)
        if match[2] == "B":
            rank = values.shape[1]
            values = values * np.float32(_scale(told, match[1], rank) * rank)
            values = gguf_model.laid_out(config, f"{match[1]}.weight", values)
        yield f"{place}.lora_{match[2].lower()}", np.ascontiguousarray(values)


def _config(adapter: Path) -> Any:
    from tunelet.models import load

    told = load.peft_config(adapter)
    kind = str(getattr(told.peft_type, "value", told.peft_type))
    if kind != "LORA" or told.use_dora or getattr(told, "use_bdlora", None):
        raise unsupported("it is no LoRA or rsLoRA" if kind != "LORA" else "DoRA scales whole weights too")
    if told.bias != "none" or told.modules_to_save or getattr(told, "trainable_token_indices", None):
        raise unsupported("it trains weights of the base too")
    if told.fan_in_fan_out:
        raise unsupported("its base keeps weights the other way round")
    return told


def _scale(told: Any, module: str, rank: int) -> float:
    """peft's factor of B A in one module: alpha / rank, of rsLoRA alpha / sqrt(rank)."""
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(told.alpha_pattern.keys(), module)
    alpha = told.alpha_pattern.get(key, told.lora_alpha)
    return alpha / (math.sqrt(rank) if told.use_rslora else rank)


def unsupported(why: str) -> TuneletError:
    return TuneletError(
        "This adapter can't become a LoRA file of llama.cpp's.",
        why=why,
        fix="export it without --lora: it is merged into its base",
    )

"""What stands in a GGUF file, read back from the disk: settings, special tokens, and every weight.

Not for what llama.cpp computes with it (gguf_gate.py) or makes of texts (gguf_text.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunelet.infer import gguf_file, gguf_model

NAMED = 3  # tensors that a finding names


def findings(file: Path, folder: Path, quant: str, stop_ids: Sequence[int], figures: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the file that was made of the model in `folder`. stop_ids: where its answers end.

    Writes into `figures` how many tensors were compared.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    config = gguf_file.text_config(folder)
    yield from _settings(reader, config)
    yield from _special(reader, folder, stop_ids)
    yield from _tensors(reader, folder, config, quant, figures)


def value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _settings(reader: Any, config: Any) -> Iterator[str]:
    arch, rope = gguf_model.shape_of(config).name, gguf_model.rope_of(config)
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wanted = {
        "general.architecture": arch,
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": heads,
        f"{arch}.attention.value_length": heads,
        f"{arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{arch}.rope.freq_base": rope["rope_theta"],
        f"{arch}.vocab_size": config.vocab_size,
    }
    for key, right in wanted.items():
        found = value(reader, key)
        same = found == right if isinstance(right, str) or found is None else math.isclose(found, right, rel_tol=1e-6)
        if not same:
            yield f"it says {key} = {found}, the model's config.json {right}"


def _special(reader: Any, folder: Path, stop_ids: Sequence[int]) -> Iterator[str]:
    from tunelet.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokens = value(reader, "tokenizer.ggml.tokens")
    for name, word in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        found, right = value(reader, f"tokenizer.ggml.{word}_token_id"), getattr(tokenizer, f"{name}_token_id")
        if found != right:
            yield f"its {name} token is {found}, the tokenizer's {right}"
    ends = {value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
    if stop_ids and stop_ids[0] not in ends:
        yield f"answers end at token {stop_ids[0]} ({tokens[stop_ids[0]]}), which it does not name as an end"


def _tensors(reader: Any, folder: Path, config: Any, quant: str, figures: dict[str, Any]) -> Iterator[str]:
    from gguf import dequantize

    there = {tensor.name: tensor for tensor in reader.tensors}
    wanted = {tensor.place: tensor for tensor in gguf_model.tensors(config, gguf_file.weights_of(folder))}
    for words, names in (("lacks", wanted.keys() - there), ("has", there.keys() - wanted)):
        if names:
            yield f"it {words} {len(names)} tensors{' too many' * (words == 'has')}: {_listed(names)}"
    wrong = []
    for name in sorted(wanted.keys() & there.keys()):
        tensor = there[name]
        if tuple(int(n) for n in reversed(tensor.shape)) != wanted[name].shape:
            wrong.append(name)
            continue
        right = wanted[name].read()
        stored = dequantize(tensor.data, tensor.tensor_type).reshape(right.shape)
        if not bool((np.abs(stored - right) <= last_digit(right, tensor.tensor_type.name)).all()):  # NaN too
            wrong.append(name)
    figures["tensors"] = len(wanted)
    if wrong:
        yield f"{len(wrong)} tensors are not the model's, beyond what {quant} rounds: {_listed(wrong)}"


def last_digit(values: Any, kind: str) -> Any:
    """What rounding may change of each of `values`: half a step of the format, of a block's format as its largest value
    gives it (ggml's block_q8_0 and block_q4_0, whose steps are stored as float16 themselves; q4_0 has one step less on
    one side)."""
    if kind == "F32":
        return np.float32(0)
    if kind in ("F16", "BF16"):
        return np.abs(values) * (2.0**-10 if kind == "F16" else 2.0**-8) + 2.0**-24
    steps = {"Q8_0": 127 / 0.6, "Q4_0": 8 / 1.1}[kind]
    blocks = np.abs(values).reshape(*values.shape[:-1], -1, gguf_file.BLOCK)
    most = np.repeat(blocks.max(-1) / steps, gguf_file.BLOCK, axis=-1)
    return most + 2.0**-20


def _listed(names: Any) -> str:
    found = sorted(names)
    return ", ".join(found[:NAMED]) + (" ..." if len(found) > NAMED else "")

"""What a GGUF file says of a model's architecture, and how its tensors are named and laid out there.

Not for the tokenizer (gguf_tokenizer.py) and not for writing and rounding (gguf_file.py). Facts of the format are
llama.cpp's: its loaders for these architectures read exactly these keys. What is not listed is refused: a key that is
left out gives a model that answers, and answers differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunelet.errors import TuneletError

Array = NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """An architecture of transformers as llama.cpp knows it.

    name: llama.cpp's; permuted: whether its rotary embedding turns neighbours, not halves, so that the rows of q and k
    change places; norm_plus_one: whether norms are stored as w - 1.
    """

    name: str
    permuted: bool = False
    norm_plus_one: bool = False
    more: Callable[[Any, Any], None] | None = None


def _gemma3(writer: Any, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    pattern = [kind == "sliding_attention" for kind in config.layer_types]
    # llama.cpp counts every sixth layer as a full one, whatever a file says
    wanted = [bool((layer + 1) % 6) for layer in range(len(pattern))]
    if pattern != wanted:
        raise unsupported("its full-attention layers are not every sixth, as llama.cpp's gemma3 has them")
    if config.query_pre_attn_scalar != _head_dim(config):
        raise unsupported(f"query_pre_attn_scalar {config.query_pre_attn_scalar} is not its head_dim")
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
        raise unsupported("its logits are soft-capped, which llama.cpp's gemma3 does not do")


SHAPES: dict[str, Shape] = {
    "llama": Shape("llama", permuted=True),
    "qwen2": Shape("qwen2"),
    "qwen3": Shape("qwen3"),
    "gemma3_text": Shape("gemma3", norm_plus_one=True, more=_gemma3),
}


def unsupported(why: str) -> TuneletError:
    return TuneletError(
        "This model can't become a GGUF file.",
        why=why,
        fix=f"Architectures that can: {', '.join(SHAPES)}. Others run with the torch engine, or --to safetensors.",
    )


def shape_of(config: Any) -> Shape:
    """Raises TuneletError for an architecture that llama.cpp has, or tunelet knows, otherwise or not at all."""
    found = SHAPES.get(config.model_type)
    if found is None:
        raise unsupported(f"its architecture is {config.model_type!r}")
    if config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        raise unsupported("its layers have biases, which llama.cpp's llama has not")
    if getattr(config, "use_sliding_window", False):
        raise unsupported("it reads through a sliding window, which llama.cpp's graph of it does not have")
    wanted = "gelu_pytorch_tanh" if config.model_type.startswith("gemma") else "silu"
    act = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if act != wanted:
        raise unsupported(f"its activation is {act}, llama.cpp's {found.name} computes {wanted}")
    return found


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: Any) -> dict[str, Any]:
    """The settings of rotary positions, wherever a config keeps them: rope_theta and those of scaling."""
    found = dict(getattr(config, "rope_parameters", None) or {})
    if "full_attention" in found:  # one set for each kind of layer
        found = {**found["full_attention"], "local": found.get("sliding_attention", {}).get("rope_theta")}
    found |= {key: value for key, value in (getattr(config, "rope_scaling", None) or {}).items() if key not in found}
    found.setdefault("rope_theta", getattr(config, "rope_theta", None) or 10000.0)
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def describe(writer: Any, config: Any, name: str) -> None:
    """Write the keys of the architecture. writer: a GGUFWriter; config: the text configuration of transformers."""
    shape = shape_of(config)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_vocab_size(config.vocab_size)
    if shape.permuted:
        writer.add_rope_dimension_count(_head_dim(config))
    rope = rope_of(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope.get("local"):
        writer.add_rope_freq_base_swa(float(rope["local"]))
    if rope["rope_type"] == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope["rope_type"] not in ("default", "llama3"):
        raise unsupported(f"its positions are scaled in the way {rope['rope_type']!r}")
    if shape.more:
        shape.more(writer, config)


@dataclass(frozen=True)
class Tensor:
    """place: its name in GGUF; read: its float32 values, as llama.cpp lays them out."""

    place: str
    shape: tuple[int, ...]
    read: Callable[[], Array]


def tensors(config: Any, weights: Mapping[str, tuple[tuple[int, ...], Callable[[], Array]]]) -> Iterator[Tensor]:
    """Every tensor of the file. weights: transformers' names -> shape, and how to read the values.

    Raises TuneletError for a tensor that llama.cpp has no place for.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    shape = shape_of(config)
    arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == shape.name)
    places = get_tensor_name_map(arch, config.num_hidden_layers)
    if factors := _llama3_factors(config):
        yield Tensor("rope_freqs.weight", (len(factors),), lambda: np.asarray(factors, dtype=np.float32))
    for name in sorted(weights):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # the same numbers as the embeddings, which llama.cpp takes for the head where there is none
        place = places.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            raise unsupported(f"llama.cpp's {shape.name} has no place for {name}")
        shape_of_it, read = weights[name]
        yield Tensor(place, shape_of_it, lambda name=name, read=read: laid_out(config, name, read()))


def laid_out(config: Any, name: str, values: Array) -> Array:
    """`values` of transformers' weight `name` as llama.cpp has them: rows [out, ...] of q and k change places where
    rotary positions turn neighbours, norms that are w - 1 become w."""
    shape = shape_of(config)
    if shape.permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        rows, columns = values.shape
        values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
    if shape.norm_plus_one and name.endswith("norm.weight"):
        values = values + 1
    return np.ascontiguousarray(values)


def _llama3_factors(config: Any) -> list[float]:
    """What llama.cpp divides each frequency by, for Llama 3's scaling of positions; [] without it.

    The formula is that of Llama 3.1's reference code: long waves are stretched by `factor`, short ones kept, in between
    interpolated.
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return []
    dim, base = _head_dim(config), rope["rope_theta"]
    old = rope["original_max_position_embeddings"]
    low, high = old / rope["low_freq_factor"], old / rope["high_freq_factor"]
    out = []
    for i in range(0, dim, 2):
        wave = 2 * np.pi * base ** (i / dim)
        if wave < high:
            out.append(1.0)
        elif wave > low:
            out.append(float(rope["factor"]))
        else:
            smooth = (old / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            out.append(float(1 / ((1 - smooth) / rope["factor"] + smooth)))
    return out

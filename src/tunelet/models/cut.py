"""A model's architecture with fewer layers and made-up weights: what a plan measures in place of the whole model.

Not for training anything: its numbers mean nothing. No weight file is read; what an architecture of this size costs
depends on shapes only.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from tunelet.models import load

TILE = 2**16  # made-up weights repeat after so many: drawing 235M normal numbers takes 5 s, repeating them 0.4 s


def config_of(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model's folder; of an adapter's folder, that of its base. Raises TuneletError where
    the base is not there."""
    from peft import PeftConfig
    from transformers import AutoConfig

    if (folder / "adapter_config.json").is_file():
        folder = load.resolve(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise load.cannot_load(folder, error) from error


def period(config: Any) -> int:
    """The smallest number of layers that the architecture repeats: 1 where all are alike, 6 in Gemma 3 (five local
    layers, one global). Where nothing repeats exactly, the length whose repetition differs in the fewest layers."""
    text = config.get_text_config()
    count = text.num_hidden_layers
    kinds = list(zip(*_per_layer(text, count).values(), strict=True))
    if not kinds:
        return 1
    different = {
        length: sum(kinds[i] != kinds[i % length] for i in range(count)) for length in range(1, max(2, count // 2 + 1))
    }
    return min(different, key=lambda length: (different[length], length))


def _per_layer(text: Any, count: int) -> dict[str, list[Any]]:
    """The config's lists that have an entry for each layer."""
    return {
        name: [repr(item) for item in value]
        for name, value in vars(text).items()
        if isinstance(value, list | tuple) and len(value) == count and count > 1
    }


def cut(config: Any, layers: int) -> Any:
    """A copy of the config with its first `layers` layers only."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    for name in _per_layer(text, text.num_hidden_layers):
        setattr(text, name, getattr(text, name)[:layers])
    text.num_hidden_layers = layers
    return made


def build(config: Any, layers: int, device: str, dtype: str, trust_remote_code: bool = False) -> Any:
    """The cut architecture on `device`, with weights that repeat a few random numbers (finite, and small). Raises
    TuneletError where the config is not one of a causal language model."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    wanted = getattr(torch, dtype)
    try:
        with no_init_weights():
            model = load.with_attention(
                lambda implementation: AutoModelForCausalLM.from_config(
                    cut(config, layers),
                    attn_implementation=implementation,
                    dtype=wanted,
                    trust_remote_code=trust_remote_code,
                )
            )
    except (ValueError, KeyError, ImportError) as error:
        raise load.cannot_load(Path(config.name_or_path), error) from error
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    tile = torch.randn(TILE, generator=generator).mul_(0.02).to(wanted)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                flat = p.view(-1)
                whole = len(flat) // TILE * TILE
                flat[:whole].view(-1, TILE).copy_(tile)
                flat[whole:].copy_(tile[: len(flat) - whole])
            else:  # norms are ones or zeros by now, biases memory that nobody has written to
                p.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1.0, 1.0)
    return model.to(device).eval()


def quantize(model: Any, kind: str) -> None:
    """Hold the linear layers in 8 or 4 bits, in place, as loading them so does."""
    from tunelet.models import quantize as quantized

    for name, module in quantized.layers(model).items():
        stand_in = quantized.STAND_INS[type(module)](module.weight, module.bias, quantized.BITS[kind])
        model.set_submodule(name, stand_in)

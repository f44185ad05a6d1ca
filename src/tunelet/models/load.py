"""Models in: a folder, a run, a cached hub id or random weights become a transformers model with tunelet's attention.

Not for tokenizers (data/render.py) and never over the network. Only safetensors: a pickle can run code when it is opened.
"""

from __future__ import annotations

from typing import Any

from tunelet.errors import TuneletError
from tunelet.models import attention
from tunelet.models.device import Choice


def new_model(architecture: dict[str, Any], vocab_size: int, special_ids: dict[str, int | None], seed: int, choice: Choice) -> Any:
    """A model of random weights. `architecture`: a transformers config as a dict with "model_type"; `special_ids`: bos, eos, pad."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = {"tie_word_embeddings": True, **architecture}
    kind = values.pop("model_type", "llama")
    if kind not in CONFIG_MAPPING:
        raise TuneletError(f"model.architecture: there is no model_type '{kind}'.", fix='Use one that transformers knows, for example "llama".')
    try:
        config = CONFIG_MAPPING[kind](**values, vocab_size=vocab_size, **{f"{name}_token_id": i for name, i in special_ids.items()})
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register(), dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise TuneletError("model.architecture does not describe a model.", why=str(error), fix="Compare it with the config.json of a model of that type.") from error
    return model.to(device=choice.device, dtype=getattr(torch, choice.dtype))

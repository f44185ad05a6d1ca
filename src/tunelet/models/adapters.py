"""Adapters: peft's own layers in peft's own format, so that any tool loads what is trained here. Not for merging
(infer/export.py).

LoRA: Hu et al., arXiv:2106.09685. The adapter computes in the model's dtype like everything else; its weights are kept
in float32 by the optimizer (train/optimizer.py) and are saved in float32.
"""

from __future__ import annotations

from typing import Any

from tunelet.errors import TuneletError
from tunelet.recipe import AdapterSection


def add(model: Any, section: AdapterSection, seed: int = 0) -> Any:
    """`model` with new LoRA layers, all else frozen: a PeftModel. Raises TuneletError where target_modules fit no
    layer."""
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        bias="none",
        task_type=TaskType.CAUSAL_LM,
        target_modules=list(section.target_modules) or "all-linear",
    )
    torch.manual_seed(seed)  # the initial A matrices are a function of the seed
    try:
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    except ValueError as error:
        if "target module" not in str(error).lower():
            raise
        linear = sorted(
            {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        )
        raise TuneletError(
            f"adapter.target_modules = {section.target_modules} fits no layer of this model.",
            why=f"its linear layers are {', '.join(linear)}",
            fix="Name some of these, or leave it empty for all.",
        ) from error


def train_on(model: Any, section: AdapterSection, name: str) -> None:
    """Check that the adapter a PeftModel came with is the one the recipe describes: training goes on with the adapter
    as it is."""
    config = next(iter(model.peft_config.values()))
    if section.kind == "none":
        raise TuneletError(
            f"'{name}' is an adapter.",
            why="full training needs a whole model",
            fix="Add --adapter lora to train the adapter on, or merge it into its base first.",
        )
    there = {"rank": config.r, "alpha": float(config.lora_alpha), "dropout": float(config.lora_dropout)}
    asked = {key: getattr(section, key) for key in there}
    if asked != there or section.target_modules:
        told = ", ".join(f"adapter.{key} = {value}" for key, value in there.items())
        raise TuneletError(
            f"The recipe's adapter is not the one in '{name}'.",
            why=f"that one has {told} and its own target_modules",
            fix=f"Set {told}, and leave adapter.target_modules empty.",
        )

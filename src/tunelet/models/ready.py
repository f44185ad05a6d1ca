"""A loaded model made ready to train in less memory or faster, without changing what it computes.

Not for loading (models/load.py) or adapters. Checkpointing is Chen et al., "Training Deep Nets with Sublinear Memory
Cost" (arXiv:1604.06174): a layer keeps its input only, and is computed again in the backward.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

from tunelet.errors import TuneletError
from tunelet.models import layers


def make_ready(model: Any, *, checkpointing: bool = False, compiled: bool = False) -> Any:
    """`model`, with its adapter, changed in place. Raises TuneletError where its code does not allow checkpointing, or
    there is nothing to compile with."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if compiled:
        _compile_layers(base)  # fuses what the faster forms of layers.py do by hand
    else:
        layers.speed_up(model, mlps=not checkpointing)
    if checkpointing:
        if not base.supports_gradient_checkpointing:
            raise TuneletError(
                f"train.gradient_checkpointing cannot be on for {type(base).__name__}.",
                why="its code in transformers does not allow it",
                fix="--set train.gradient_checkpointing=off, and a smaller train.tokens_per_batch to save memory.",
            )
        # The newer name came with transformers 5.22; the older one goes with 6.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def _compile_layers(base: Any) -> None:
    """torch.compile of each decoder layer but its attention, whose plan is Python; one compilation serves all."""
    import torch
    from torch import nn
    from transformers import AttentionInterface

    from tunelet.models import attention

    compiler = os.environ.get("CXX", "g++")
    if base.device.type == "cpu" and not (shutil.which(compiler) or shutil.which("clang++")):
        raise TuneletError(
            "train.compile needs a C++ compiler.",
            why=f"there is no {compiler} on this machine",
            fix="--set train.compile=false, or install one (Debian: apt install g++).",
        )
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.attend))
    blocks = max(
        (module for module in base.modules() if isinstance(module, nn.ModuleList)), key=len, default=nn.ModuleList()
    )
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=True)

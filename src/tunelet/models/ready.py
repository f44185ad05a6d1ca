"""A loaded model made ready to train in less memory or faster, without changing what it computes.

Not for loading (models/load.py) or adapters. Checkpointing is Chen et al., "Training Deep Nets with Sublinear Memory
Cost" (arXiv:1604.06174): a layer keeps its input only, and is computed again in the backward.
"""

from __future__ import annotations

from typing import Any

from tunelet.errors import TuneletError
from tunelet.models import layers


def make_ready(model: Any, *, checkpointing: bool = False) -> Any:
    """`model`, with its adapter, changed in place. Raises TuneletError where its code does not allow checkpointing."""
    layers.speed_up(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
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

"""Pure loss functions, one file a method. `LOSSES` is the extension point: name -> loss(model, batch,
targets_in_step)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def losses() -> dict[str, Callable[..., Any]]:
    """name of the method -> its loss(model, batch, targets_in_step). Imports torch."""
    from tunelet.methods import pretrain, sft

    return {"pretrain": pretrain.loss, "sft": sft.loss}

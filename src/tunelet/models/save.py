"""A trained model to a folder that plain transformers (or plain peft) loads. Not for checkpoints of a run (train/checkpoint.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save(model: Any, tokenizer: Any, folder: Path, dtype: str | None = None) -> None:
    """Write weights (safetensors), configuration, generation settings, tokenizer and chat template into `folder`.

    dtype: "float32", "bfloat16" or "float16", what the weights are stored in (None: as they are). An adapter is written in peft's own
    format, in float32. Ids that end a turn are the tokenizer's and the model's generation settings': both travel along.
    """
    import torch

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        model.save_pretrained(folder, safe_serialization=True)
    else:
        if dtype is not None:
            model = model.to(getattr(torch, dtype))
        model.save_pretrained(folder, safe_serialization=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)

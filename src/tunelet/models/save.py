"""A trained model to a folder that plain transformers (or plain peft) loads. Not for checkpoints of a run
(train/checkpoint.py)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError


def save(model: Any, tokenizer: Any, folder: Path, dtype: str | None = None, *, stop_ids: Sequence[int] = ()) -> None:
    """Write weights (safetensors), configuration, generation settings, tokenizer and chat template into `folder`.

    dtype: "float32", "bfloat16" or "float16", what the weights are stored in; None: as they are. Converts the model in
    place. An adapter is written in peft's own format. `stop_ids`: the tokens that end an answer in the chat template it
    was tuned on; they go to generation_config.json, so that transformers' own `generate` stops there too. Raises
    OSError where the disk fails, TuneletError for a quantised model (its adapter alone can be saved).
    """
    import torch
    from safetensors import SafetensorError
    from transformers.utils import logging

    from tunelet.models import adapters

    if hasattr(model, "hf_quantizer") and not hasattr(model, "peft_config"):
        raise TuneletError(
            "A quantised model is not saved.",
            why="it is an approximation to train an adapter over, in a form that nothing else reads",
            fix="Save the adapter, or load the model without quantisation.",
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if dtype is not None and not hasattr(model, "peft_config"):
        model = model.to(getattr(torch, dtype))
    settings = getattr(model, "generation_config", None)
    if stop_ids and settings is not None:
        settings.eos_token_id = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    if settings is not None and not settings.do_sample and _samples(settings):
        settings.do_sample = True  # some makers give a temperature and not the switch, and transformers refuses to save
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        if hasattr(model, "peft_config"):
            adapters.finish(model, folder)
    except SafetensorError as error:
        raise disk_error(error) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    # safetensors leaves its files readable by their owner alone; they get the mode of the files beside them
    mode = next(folder.glob("*config.json")).stat().st_mode
    for weights in folder.glob("*.safetensors"):
        weights.chmod(mode)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        kept = json.loads(path.read_text(encoding="utf-8"))
        for how_it_was_loaded in ("is_local", "local_files_only"):
            kept.pop(how_it_was_loaded, None)
        path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card


def _samples(settings: Any) -> bool:
    """Whether generation settings say how to sample."""
    plain = {"temperature": 1.0, "top_p": 1.0, "typical_p": 1.0}
    return any(getattr(settings, key, None) not in (None, value) for key, value in plain.items())


def dtype_of(model: Any, path: str, working: str) -> str | None:
    """What a model that was trained from `path` is stored in: the dtype it came in, or, from random weights, the one it
    was trained in (`working`); None for an adapter: as it is."""
    from tunelet.models import load, weights

    if hasattr(model, "peft_config"):
        return None
    return weights.stored_dtype(load.resolve(path)) if path else working


def disk_error(error: Exception) -> Exception:
    """safetensors hides the number that says what is wrong with the disk in its text: the OSError it stands for, or the
    error itself."""
    number = re.search(r"os error (\d+)", str(error))
    return error if number is None else OSError(int(number[1]), os.strerror(int(number[1])))

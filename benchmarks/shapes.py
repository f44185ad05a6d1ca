"""Shapes of models to measure with, their checkpoints of random weights, and how many FLOPs a step of them needs.

Not for real weights: speed and memory depend on shapes only, so nothing is fetched. torch and transformers are imported
only where a checkpoint is written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The published config.json of SmolLM2 (HuggingFaceTB/SmolLM2-135M, -360M, -1.7B); "tiny" is for tests.
_SMOLLM2 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_SMOLLM2,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "135M": {
        **_SMOLLM2,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "360M": {
        **_SMOLLM2,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "1.7B": {
        **_SMOLLM2,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 130000.0},
    },
}


def linear_layers(shape: str) -> list[tuple[int, int]]:
    """(in, out) of every linear layer of the body, layer by layer; the head is not among them."""
    c = SHAPES[shape]
    d, f, q = c["hidden_size"], c["intermediate_size"], c["num_attention_heads"] * c["head_dim"]
    kv = c["num_key_value_heads"] * c["head_dim"]
    return [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)] * c["num_hidden_layers"]


def parameters(shape: str) -> dict[str, int]:
    """{"body": weights of the linear layers, "head": of the (tied) embedding, "total": both and the norms}."""
    c = SHAPES[shape]
    body = sum(i * o for i, o in linear_layers(shape))
    head = c["vocab_size"] * c["hidden_size"]
    return {"body": body, "head": head, "total": body + head + (2 * c["num_hidden_layers"] + 1) * c["hidden_size"]}


def lora_parameters(shape: str, rank: int) -> int:
    """Weights of LoRA matrices of this rank on every linear layer of the body: rank x (in + out) each."""
    return sum(rank * (i + o) for i, o in linear_layers(shape))


def flops(
    shape: str, lengths: Sequence[int], targets: int, rank: int = 0, twice: int = 0, reference: bool = False
) -> dict[str, float]:
    """Matrix-product FLOPs that training once on rows of these lengths *needs*, whoever does the work.

    A product with a weight matrix of N entries takes 2N FLOPs a token in the forward pass, and in the backward pass 2N
    for the gradient of its input and 2N for that of the weight (Kaplan et al. 2020, arXiv:2001.08361, section 2.1):

        body       6 x body weights x tokens;            frozen under LoRA: 4 x body weights x tokens
        adapters   0;                                    LoRA: 6 x adapter weights x tokens
        head       6 x vocabulary x hidden x targets;    frozen: 4 x; only positions that predict a trained token count
        attention  3 x layers x 2 x heads x head_dim x sum of length^2: two products (q k, p v) of 2 x length^2 / 2 x
                   width each (the causal half), backward twice the forward

    Of preferences `lengths` are of prompt and answer, twice for each prompt: `twice` tokens of prompts are needed once
    only. `reference`: a forward pass under the reference comes on top, a third again (half of LoRA's).

    Recomputed activations, padding, the upper half of the attention matrix and logits nobody asked for are no needed
    work: who does them reaches a lower fraction of the peak. Returns FLOPs by part, and their "total".
    """
    c, size, tokens = SHAPES[shape], parameters(shape), sum(lengths) - twice
    per_weight = 4 if rank else 6
    width = c["num_attention_heads"] * c["head_dim"]
    parts = {
        "body": float(per_weight * size["body"] * tokens),
        "adapters": float(6 * lora_parameters(shape, rank) * tokens) if rank else 0.0,
        "head": float(per_weight * size["head"] * targets),
        "attention": float(3 * c["num_hidden_layers"] * 2 * width * sum(n * n for n in lengths)),
    }
    if reference:
        parts["reference"] = sum(parts.values()) / (2 if rank else 3)
    return {**parts, "total": sum(parts.values())}


def written(shape: str, scratch: Path) -> Path | None:
    """The folder of the checkpoint that `write` made in `scratch`, None where it has not."""
    folder = scratch / f"smollm2-{shape}"
    try:
        there = json.loads((folder / "shape.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return folder if there == SHAPES[shape] else None


def write(shape: str, scratch: Path) -> Path:
    """A folder in `scratch` with config.json and random bf16 weights of `shape`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, making = scratch / f"smollm2-{shape}", scratch / f"smollm2-{shape}.making-{os.getpid()}"
    torch.manual_seed(0)
    values = {key: value for key, value in SHAPES[shape].items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **values), dtype=torch.bfloat16)
    model.save_pretrained(making)
    (making / "shape.json").write_text(json.dumps(SHAPES[shape]), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    return folder

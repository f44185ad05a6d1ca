"""The learning rate where the recipe leaves it to us (train.learning_rate = 0), with the source of each figure. Not the
schedule.

Full fine-tuning and first training: alignment-handbook's smollm and smollm2 SFT recipes use 1e-3 for 135M and 360M and
3e-4 for 1.7B with 128 rows a step; SmolLM2's report (arXiv:2502.02737) trains 135M and 360M at 3e-3 and 1.7B at 5e-4.
Ours are lower where steps have 8 rows instead of 128 (square-root scaling). Under 50M: trials on the starter
(docs/notebook.md). LoRA: about ten times the rate of full tuning (Schulman et al., "LoRA Without Regret", 2025), with a
ceiling of 2e-3. Methods that compare answers: see `PREFERENCE_RATES` and train/guard.py.
"""

from __future__ import annotations

from tunelet.recipe import LORA

# (parameters below, rate)
FULL = ((50e6, 1e-3), (500e6, 3e-4), (float("inf"), 5e-5))
FROM_RANDOM = ((50e6, 2e-3), (500e6, 1e-3), (float("inf"), 5e-4))
LORA_FACTOR, LORA_CEILING = 10, 2e-3
# Adapters with few weights, (parameters below, rate). IA3 of large models: 3e-3 in its paper (arXiv:2205.05638). All
# others: trials on the starter, docs/notebook.md.
FEW = {
    "prompt": ((float("inf"), 3e-2),),
    "prefix": ((50e6, 3e-2), (float("inf"), 1e-2)),
    "ia3": ((50e6, 1e-1), (float("inf"), 3e-3)),
}
PREFERENCE_TIMES = 0.1
# alignment-handbook tunes SmolLM2-135M to 1.7B with DPO at 1e-6; zephyr-7b-orpo at 5e-6, 135M to 360M take more. Under
# 50M: trials on the starter (docs/notebook.md). ORPO is also the supervised tuning, so that it takes more than DPO.
PREFERENCE_RATES = {
    "dpo": ((50e6, 3e-5), (float("inf"), 1e-6)),
    "kto": ((50e6, 3e-5), (float("inf"), 1e-6)),
    "simpo": ((50e6, 1e-5), (float("inf"), 1e-6)),
    "orpo": ((50e6, 1e-3), (500e6, 5e-5), (float("inf"), 8e-6)),
}
# Where train/guard.py has its sources
BETAS = {"dpo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}
LOSS_BETAS = {"sigmoid_norm": 5.0}


def learning_rate(method: str, adapter: str, parameters: int, from_random: bool) -> tuple[float, str]:
    """(peak learning rate, where it comes from)."""
    table = FROM_RANDOM if from_random else PREFERENCE_RATES.get(method, FULL)
    rate = _of(table, parameters)
    if adapter in LORA:
        rate = min(LORA_CEILING, LORA_FACTOR * rate)
    elif adapter != "none":
        rate = _of(FEW[adapter], parameters) * (1 if method not in PREFERENCE_RATES else PREFERENCE_TIMES)
    kind = "from random weights" if from_random else "full" if adapter == "none" else adapter
    return rate, f"default for {method}, {kind}, {parameters / 1e6:.3g}M parameters"


def _of(table: tuple[tuple[float, float], ...], parameters: int) -> float:
    return next(rate for below, rate in table if parameters < below)


def beta(method: str, loss_type: str) -> float | None:
    """method.beta where the recipe leaves it to us; None for a method without one."""
    return LOSS_BETAS.get(loss_type, BETAS["dpo"]) if method == "dpo" else BETAS.get(method)

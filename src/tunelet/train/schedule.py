"""The learning rate of a step: warm-up, then cosine, linear, constant or WSD. Pure functions; not the default peaks
(those are in defaults.py)."""

from __future__ import annotations

import math

# Share of the steps that WSD spends on its final decay (Hu et al., "MiniCPM", arXiv:2404.06395, section 4: about 10 %
# suffice).
WSD_DECAY = 0.1


def warmup_steps(warmup: float, total: int) -> int:
    """`warmup` < 1 is a share of the `total` steps, >= 1 a number of steps."""
    return min(total, round(warmup * total) if warmup < 1 else int(warmup))


def learning_rate(step: int, total: int, *, peak: float, schedule: str, warmup: float, min_ratio: float) -> float:
    """The rate of optimizer step `step` (0-based) of `total`. The first step is not zero, the last one is `min_ratio *
    peak`."""
    warm = warmup_steps(warmup, total)
    if step < warm:
        return peak * (step + 1) / warm
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        warm = max(warm, total - max(1, round(WSD_DECAY * total)))
        if step < warm:
            return peak
    done = min(1.0, (step - warm + 1) / max(1, total - warm))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (min_ratio + (1 - min_ratio) * shape)

"""Kahneman-Tversky optimisation: single answers with a verdict, no pairs.

With r = log pi(y|x) - log pi_ref(y|x) and z the reference point (Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7, 8):
    good answers  weight * (1 - s(beta (r - z)))        bad answers  weight * (1 - s(beta (z - r)))
z = max(0, mean of log pi - log pi_ref over answers of *other* rows to these prompts), an estimate of KL(pi || pi_ref)
without a gradient. It is taken over the whole optimizer step, so that the step does not depend on how its rows are cut.
"""

from __future__ import annotations

from typing import Any

import torch

from tunelet.data.examples import Batch
from tunelet.methods import Totals
from tunelet.models import sequences
from tunelet.recipe import MethodSection


def losses(rewards: torch.Tensor, good: torch.Tensor, kl: float, method: MethodSection) -> torch.Tensor:
    """[rows], from r (not yet times beta) and the verdicts."""
    right = 1 - torch.sigmoid(method.beta * (rewards - kl))
    wrong = 1 - torch.sigmoid(method.beta * (kl - rewards))
    return torch.where(good, method.desirable_weight * right, method.undesirable_weight * wrong)


def loss(model: Any, batch: Batch, totals: Totals, method: MethodSection) -> tuple[torch.Tensor, dict[str, float]]:
    """This batch's share of the step's mean over rows. fp32 scalar."""
    sums, counts = sequences.logprobs(model, batch)
    rewards = sums - batch.reference
    out = losses(rewards, batch.labels, totals.kl, method).sum() / totals.rows
    with torch.no_grad():
        good, scaled, mean = batch.labels.float(), method.beta * rewards, sums / counts.clamp(min=1)
        told = {
            "rewards/chosen": float((scaled * good).sum()),
            "rewards/rejected": float((scaled * (1 - good)).sum()),
            "logps/chosen": float((mean * good).sum()),
            "logps/rejected": float((mean * (1 - good)).sum()),
            "labels/chosen": float(good.sum()),
            "kl": totals.kl * len(sums),
        }
    return out, told

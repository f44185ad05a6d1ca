"""Simple preference optimisation: the better answer's mean log-probability has to win by a margin, without a reference.

L = -log s(beta (log pi(chosen)/|y| - log pi(rejected)/|y|) - gamma), Meng et al. 2024 (arXiv:2405.14734), eq. 6.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tunelet.data.examples import Batch
from tunelet.methods import Totals, pairs
from tunelet.recipe import MethodSection


def losses(chosen: torch.Tensor, rejected: torch.Tensor, method: MethodSection) -> torch.Tensor:
    """[pairs], from mean log-probabilities per token."""
    return -F.logsigmoid(method.beta * (chosen - rejected) - method.simpo_gamma)


def loss(model: Any, batch: Batch, totals: Totals, method: MethodSection) -> tuple[torch.Tensor, dict[str, float]]:
    """This batch's share of the step's mean over pairs. fp32 scalar."""
    of = pairs.of(model, batch, referenced=False)
    out = losses(of.chosen_mean, of.rejected_mean, method).sum() / totals.rows
    return out, pairs.told(of, method.beta * of.chosen_mean, method.beta * of.rejected_mean)

"""First or continued training on plain text: the mean negative log-likelihood of every next token. Data choices are not
made here.

L = -1/N sum_t log p(x_t | x_<t), Bengio et al., "A Neural Probabilistic Language Model" (JMLR 2003).
"""

from __future__ import annotations

from typing import Any

import torch

from tunelet.data.examples import Batch
from tunelet.methods import Totals
from tunelet.models import head
from tunelet.recipe import MethodSection


def loss(model: Any, batch: Batch, totals: Totals, method: MethodSection) -> tuple[torch.Tensor, dict[str, float]]:
    """This batch's share of the step's loss: sum of its negative log-likelihoods / targets of the whole optimizer step.
    fp32 scalar."""
    return head.nll_sum(model, batch, 1.0 / totals.targets), {}

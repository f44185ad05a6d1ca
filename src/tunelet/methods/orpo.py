"""Odds ratio preference optimisation: supervised tuning on the better answers and a preference in one stage, without a
reference.

With p = exp(log pi(y|x) / |y|) and odds = p / (1 - p), Hong et al. 2024 (arXiv:2403.07691), eq. 4 to 7:
    L = NLL - beta * mean over pairs of log s(log odds_chosen - log odds_rejected)
beta is the paper's lambda, NLL the mean negative log-likelihood of the chosen answers' tokens: that of SFT. TRL and the
authors' code count the prompt's tokens in as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tunelet.data.examples import Batch
from tunelet.methods import Totals, pairs
from tunelet.recipe import MethodSection


def log_odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """log odds(chosen) - log odds(rejected), from mean log-probabilities per token, all [pairs]."""

    def log_not(logp: torch.Tensor) -> torch.Tensor:
        """log(1 - exp(logp)), exact near 0 and for very negative numbers."""
        logp = logp.clamp(max=-1e-7)  # a certain answer has infinite odds
        return torch.log(-torch.expm1(logp))

    return (chosen - rejected) - (log_not(chosen) - log_not(rejected))


def loss(model: Any, batch: Batch, totals: Totals, method: MethodSection) -> tuple[torch.Tensor, dict[str, float]]:
    """This batch's share of the step's loss. fp32 scalar."""
    of = pairs.of(model, batch, referenced=False)
    nll = -of.chosen.sum() / totals.chosen
    ratio = log_odds_ratio(of.chosen_mean, of.rejected_mean)
    odds = -F.logsigmoid(ratio).sum() / totals.rows
    told = pairs.told(of, method.beta * of.chosen_mean, method.beta * of.rejected_mean)
    # sums over rows, so that the step's division by rows gives each part's share
    told |= {"nll_loss": float(nll.detach()) * totals.rows, "odds_loss": float(odds.detach()) * totals.rows}
    return nll + method.beta * odds, told | {"log_odds_chosen": float(ratio.detach().sum())}

"""Direct preference optimisation: the better answer gains probability against the worse one, measured from where the
model started.

With r = log pi(y|x) - log pi_ref(y|x) summed over the answer's tokens, d = r_chosen - r_rejected, |y| tokens:
    sigmoid       -log s(beta d)
    hinge         max(0, 1 - beta d)
    ipo           (r_chosen/|y| - r_rejected/|y| - 1/(2 beta))^2
    cdpo          -(1-e) log s(beta d) - e log s(-beta d)
    robust        (-(1-e) log s(beta d) + e log s(-beta d)) / (1-2e)
    sigmoid_norm  -log s(beta (r_chosen/|y| - r_rejected/|y|))
in turn from Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; Zhao et al., SLiC-HF, 2023 (arXiv:2305.10425); Azar et al.
2023 (arXiv:2310.12036), eq. 17, taken by the token; Mitchell 2023, "A note on DPO with noisy preferences"; Chowdhury et
al. 2024 (arXiv:2403.00409); Lambert et al., Tulu 3, 2024 (arXiv:2411.15124), length-normalised.
rpo_alpha adds the chosen answers' own mean negative log-likelihood: Pang et al. 2024 (arXiv:2404.19733), eq. 2.
A larger beta holds the model closer to the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from tunelet.data.examples import Batch
from tunelet.methods import Totals, pairs
from tunelet.recipe import MethodSection


def losses(of: pairs.Pairs, method: MethodSection) -> torch.Tensor:
    """[pairs]: the loss of each pair, without the term of rpo_alpha."""
    chosen, rejected = of.chosen - of.reference_chosen, of.rejected - of.reference_rejected
    beta, e = method.beta, method.label_smoothing
    by_token = chosen / of.chosen_tokens.clamp(min=1) - rejected / of.rejected_tokens.clamp(min=1)
    if method.loss_type == "ipo":
        return (by_token - 1 / (2 * beta)) ** 2
    d = beta * (by_token if method.loss_type == "sigmoid_norm" else chosen - rejected)
    if method.loss_type == "hinge":
        return torch.relu(1 - d)
    if method.loss_type == "cdpo":
        return -(1 - e) * F.logsigmoid(d) - e * F.logsigmoid(-d)
    if method.loss_type == "robust":
        return (-(1 - e) * F.logsigmoid(d) + e * F.logsigmoid(-d)) / (1 - 2 * e)
    return -F.logsigmoid(d)


def loss(model: Any, batch: Batch, totals: Totals, method: MethodSection) -> tuple[torch.Tensor, dict[str, float]]:
    """This batch's share of the step's mean over pairs. fp32 scalar."""
    of = pairs.of(model, batch, referenced=True)
    out = losses(of, method).sum() / totals.rows
    if method.rpo_alpha:
        out = out - method.rpo_alpha * of.chosen.sum() / totals.chosen
    rewards = (method.beta * (of.chosen - of.reference_chosen), method.beta * (of.rejected - of.reference_rejected))
    return out, pairs.told(of, *rewards)

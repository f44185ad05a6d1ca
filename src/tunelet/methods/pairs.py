"""What the methods on pairs of answers have in common: log-probabilities of both answers, and what the log shows.

Names are those of TRL's logs (rewards/chosen, rewards/accuracies, ...), so that curves can be laid side by side; but
logps/* are means per token here and sums there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tunelet.data.examples import Batch
from tunelet.models import sequences


@dataclass(frozen=True)
class Pairs:
    """[pairs] fp32 each: sums of log-probabilities of the chosen and the rejected answers, with a gradient; under the
    reference (zeros where a method has none); numbers of their targets."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def chosen_mean(self) -> torch.Tensor:
        return self.chosen / self.chosen_tokens.clamp(min=1)

    @property
    def rejected_mean(self) -> torch.Tensor:
        return self.rejected / self.rejected_tokens.clamp(min=1)


def of(model: Any, batch: Batch, referenced: bool) -> Pairs:
    """Raises ValueError where a row is no pair, or its reference is wanted and not known."""
    if batch.sequences != 2 * len(batch.branches):
        raise ValueError("every row needs two branches: a chosen and a rejected answer")
    if referenced and len(batch.reference) != batch.sequences:
        raise ValueError("the reference's log-probabilities are not there: see train/reference.py")
    sums, counts = sequences.logprobs(model, batch)
    reference = batch.reference if referenced else torch.zeros_like(sums)
    return Pairs(sums[0::2], sums[1::2], reference[0::2], reference[1::2], counts[0::2], counts[1::2])


def told(pairs: Pairs, chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> dict[str, float]:
    """Sums over the pairs of what the log shows. rewards/*: as the method defines them; logps/*: per token."""
    with torch.no_grad():
        figures = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "logps/chosen": pairs.chosen_mean,
            "logps/rejected": pairs.rejected_mean,
        }
        names, sums = list(figures), torch.stack([value.detach().sum() for value in figures.values()])
    return dict(zip(names, sums.tolist(), strict=True))

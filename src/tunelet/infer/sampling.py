"""Choosing the next token from logits: greedy, temperature, top-k, top-p, repetition penalty; deterministic per prompt.

Not for running the model (engine.py). The order of the filters is transformers': penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunelet.errors import TuneletError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0: greedy (the most likely token). top_k 0 and top_p 1: no cut. repetition_penalty 1: none (Keskar
    et al. 2019).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            (self.temperature < 0, "temperature", self.temperature, "0 (greedy) or more"),
            (not 0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1"),
            (self.top_k < 0, "top_k", self.top_k, "0 (all tokens) or more"),
            (self.repetition_penalty <= 0, "repetition_penalty", self.repetition_penalty, "above 0; 1 is none"),
        ]
        for bad, name, value, allowed in wrong:
            if bad:
                raise TuneletError(
                    f"{name} is {value}.", why=f"it has to be {allowed}", fix=f"Give a {name} that is {allowed}."
                )


class Sampler:
    """Picks a token per row. Every row draws from its own generator, seeded with (seed, the prompt's index): the
    batch does not matter.
    """

    def __init__(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]], indices: Sequence[int], device: torch.device
    ):
        import numpy

        self.sampling = sampling
        self.generators = (
            [numpy.random.default_rng([sampling.seed, index]) for index in indices] if sampling.temperature else []
        )
        self.device = device
        self.used: torch.Tensor | None = None  # [rows, vocabulary] bool, only where a penalty asks for it
        self.prompts = prompts

    def keep(self, rows: torch.Tensor) -> None:
        """Only these rows (int64 places) go on."""
        if self.generators:
            self.generators = [self.generators[row] for row in rows.tolist()]
        if self.used is not None:
            self.used = self.used[rows.to(self.used.device)]

    def pick(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] fp32 logits -> [rows] int64 tokens."""
        import torch

        s = self.sampling
        if s.repetition_penalty != 1:
            if self.used is None:
                self.used = torch.zeros_like(logits, dtype=torch.bool)
                for row, prompt in enumerate(self.prompts):
                    self.used[row, torch.tensor(list(prompt), device=logits.device)] = True
            penalised = torch.where(logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty)
            logits = torch.where(self.used, penalised, logits)
        tokens = self._draw(logits) if s.temperature else logits.argmax(-1)
        if self.used is not None:
            self.used[torch.arange(len(tokens), device=tokens.device), tokens] = True
        return tokens

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        import torch

        s = self.sampling
        logits = logits / s.temperature
        if 0 < s.top_k < logits.shape[-1]:
            lowest = logits.topk(s.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -torch.inf)
        probabilities, tokens = logits.softmax(-1).sort(descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        if s.top_p < 1:  # the token that crosses top_p stays: at least one always does
            probabilities = probabilities.masked_fill(before >= s.top_p, 0)
        total = probabilities.cumsum(-1, dtype=torch.float64)
        drawn = torch.tensor(
            [generator.random() for generator in self.generators], dtype=torch.float64, device=logits.device
        )
        place = torch.searchsorted(total, (drawn * total[:, -1])[:, None], right=True)
        last = (probabilities > 0).sum(
            -1, keepdim=True
        ) - 1  # rounding must not lead past the last token that is allowed
        return tokens.gather(-1, torch.minimum(place, last))[:, 0]

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


NARROW = 256  # tokens among which a draw is looked for first


@dataclass(frozen=True, slots=True)
class Sampling:
    """temperature 0: greedy (the most likely token). top_k 0 and top_p 1: no cut. repetition_penalty 1: none (Keskar
    et al. 2019). presence_penalty, frequency_penalty: taken from the logit of a token that the answer has, once and for
    each time (OpenAI's API).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

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
        self.counts: torch.Tensor | None = None  # [rows, vocabulary] fp32: how often the answers have each token
        self.prompts = prompts

    def keep(self, rows: torch.Tensor) -> None:
        """Only these rows (int64 places) go on."""
        if self.generators:
            self.generators = [self.generators[row] for row in rows.tolist()]
        if self.used is not None:
            self.used = self.used[rows.to(self.used.device)]
        if self.counts is not None:
            self.counts = self.counts[rows.to(self.counts.device)]

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
        if s.presence_penalty or s.frequency_penalty:
            if self.counts is None:
                self.counts = torch.zeros_like(logits)
            logits = logits - s.presence_penalty * (self.counts > 0) - s.frequency_penalty * self.counts
        tokens = self._draw(logits) if s.temperature else logits.argmax(-1)
        rows = torch.arange(len(tokens), device=tokens.device)
        if self.used is not None:
            self.used[rows, tokens] = True
        if self.counts is not None:
            self.counts[rows, tokens] += 1
        return tokens

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        import torch

        s = self.sampling
        logits = logits / s.temperature
        if 0 < s.top_k < logits.shape[-1]:
            lowest = logits.topk(s.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, -torch.inf)
        probabilities = logits.softmax(-1)
        drawn = torch.tensor(
            [generator.random() for generator in self.generators], dtype=torch.float64, device=logits.device
        )
        # sorting a whole vocabulary takes as long as a small model's step, and the draw is nearly always at the top
        found = self._likeliest(probabilities, drawn, NARROW) if logits.shape[-1] > NARROW else None
        return self._likeliest(probabilities, drawn, logits.shape[-1]) if found is None else found

    def _likeliest(self, probabilities: torch.Tensor, drawn: torch.Tensor, width: int) -> torch.Tensor | None:
        """The tokens [rows] at `drawn` [rows] (0 to 1) of the allowed ones' probability, likeliest first; None where
        `width` of them are too few to tell."""
        import torch

        whole, top_p = width == probabilities.shape[-1], self.sampling.top_p
        ordered = probabilities.sort(descending=True, stable=True) if whole else probabilities.topk(width)
        kept, tokens = ordered
        if top_p < 1:  # the token that crosses top_p stays: at least one always does
            before = kept.cumsum(-1) - kept
            if not whole and (before[:, -1] < top_p).any():
                return None
            kept = kept.masked_fill(before >= top_p, 0)
        total = kept.cumsum(-1, dtype=torch.float64)
        mass = total[:, -1] if whole or top_p < 1 else probabilities.sum(-1, dtype=torch.float64)
        place = torch.searchsorted(total, (drawn * mass)[:, None], right=True)
        if not whole and top_p == 1 and (place >= width).any():
            return None
        last = (kept > 0).sum(-1, keepdim=True) - 1  # rounding must not lead past the last token that is allowed
        return tokens.gather(-1, torch.minimum(place, last))[:, 0]

"""Watches a model while answers are compared: how far it has moved from its start, and what it answers now.

Not the verdict on these figures (train/guard.py). A few held-out prompts are answered by the model as it is at the
start; how probable these answers still are later estimates the KL divergence from the start without a second model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tunelet.data import pack
from tunelet.data.examples import Tokens
from tunelet.models import sequences
from tunelet.recipe import PREFERENCE, Recipe
from tunelet.train import guard
from tunelet.train.guard import Remark

PROMPTS = 16  # held-out prompts that are answered
MOST_TOKENS = 64  # of an answer
PERIOD, TIMES = 8, 4  # an answer whose end is up to 8 tokens long, 4 times over, repeats itself


@dataclass
class Watch:
    """prompts: of held-out rows; answers: rows of prompt and what the start model sampled; start: their mean
    log-probability per token then. first: what the first evaluation said."""

    recipe: Recipe
    engine: Any
    prompts: list[list[int]]
    new_tokens: int
    answers: list[Tokens]
    parameters: int
    start: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, recipe: Recipe, model: Any, tokenizer: Any, eval_rows: Sequence[Tokens]) -> Watch | None:
        """None where the method compares no answers, the guard is off, or no held-out prompt leaves room to answer."""
        if recipe.method.name not in PREFERENCE or recipe.method.guard == "off" or not eval_rows:
            return None
        from tunelet.data.render import Renderer
        from tunelet.infer.engine import TorchEngine

        engine = TorchEngine(model, tokenizer, Renderer(tokenizer))
        fit = [row for row in eval_rows if not engine.max_length or row.branches[0] < engine.max_length]
        if not fit:
            return None
        some = fit[:: max(1, len(fit) // PROMPTS)][:PROMPTS]
        prompts = [list(row.ids[: row.branches[0]]) for row in some]
        longest = max(row.only(0).trained for row in some)
        room = engine.max_length - max(map(len, prompts)) if engine.max_length else MOST_TOKENS
        new = max(1, min(MOST_TOKENS, max(8, 2 * longest), room))
        watch = cls(recipe, engine, prompts, new, [], sum(p.numel() for p in model.parameters()))
        sampled = engine.generate(prompts, max_new_tokens=new, temperature=1.0, seed=recipe.train.seed)
        for prompt, answer, row in zip(prompts, sampled, some, strict=True):
            ids = (*prompt, *answer.ids)
            mask = (False,) * len(prompt) + (True,) * len(answer.ids)
            if answer.ids:
                watch.answers.append(Tokens(ids, mask, ((0, len(ids), "text"),), row.origin))
        watch.start = watch._probability(model)[0]
        return watch

    def _probability(self, model: Any) -> tuple[float, float]:
        """(mean log-probability per token of the start model's answers, mean entropy of the predictions there)."""
        if not self.answers:
            return 0.0, 0.0
        batch = pack.make_batch(self.answers).to(next(model.parameters()).device)
        return sequences.mean_and_entropy(model, batch)

    @torch.no_grad()
    def look(self, model: Any) -> dict[str, float]:
        """watch/kl, watch/entropy: nats a token; watch/stop_rate, watch/loops: shares of greedy answers; watch/length:
        their mean number of tokens."""
        mean, entropy = self._probability(model)
        answers = self.engine.generate(self.prompts, max_new_tokens=self.new_tokens)
        count = len(answers)
        return {
            "watch/kl": self.start - mean,
            "watch/entropy": entropy,
            "watch/stop_rate": sum(answer.stopped for answer in answers) / count,
            "watch/loops": sum(loops(answer.ids) for answer in answers) / count,
            "watch/length": sum(len(answer.ids) for answer in answers) / count,
        }

    def judge(self, step: int, told: Mapping[str, float]) -> list[Remark]:
        """What is new to say at this step; the first call sets what later ones are held against."""
        if not self.first:
            self.first = dict(told)
            return []
        found = guard.judge(self.recipe, self.parameters, self.first, told)
        if self.recipe.method.guard == "warn":
            found = [guard.Remark(one.kind, "warn", one.text, one.fix) for one in found]
        new = [one for one in found if one.severity == "stop" or one.kind not in self.said]
        self.said |= {one.kind for one in found}
        return new

    def go_on(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Take up what the log of a run that goes on has of evaluations up to `step`."""
        for row in rows:
            if row.get("step", 0) <= step and "watch/kl" in row:
                self.first = self.first or {
                    name: value for name, value in row.items() if isinstance(value, float | int)
                }
                self.said |= {remark["kind"] for remark in row.get("remarks", [])}


def loops(ids: Sequence[int]) -> bool:
    """Whether an answer ends in repetitions."""
    return any(
        len(ids) >= TIMES * period and all(ids[-1 - i] == ids[-1 - i - period] for i in range((TIMES - 1) * period))
        for period in range(1, PERIOD + 1)
    )

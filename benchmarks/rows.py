"""Rows of synthetic token ids to train on, the same for every contestant: a function of (kind, count, seed,
vocabulary).

Not text: what a step costs depends on lengths and masks, not on which tokens they are.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Lengths are log-normal, cut to [least, most]. trained: share of a row's tokens that are targets, uniform in
# [mean - 0.15, mean + 0.15]; they are the last ones, the answer.
#   long:  instruction data with long prompts: 157-579 tokens, mean about 270, 65 % trained
#   prompt: of preferences, long prompts and short answers: about 500 and 125 tokens
#   short: questions and commands: 20-120 tokens, mean about 55, 65 % trained
KINDS: dict[str, dict[str, Any]] = {
    "long": {"median": 255, "sigma": 0.35, "least": 157, "most": 579, "trained": 0.65},
    "prompt": {"median": 625, "sigma": 0.1, "least": 500, "most": 750, "trained": 0.2, "spread": 0.04},
    "short": {"median": 50, "sigma": 0.45, "least": 20, "most": 120, "trained": 0.65},
}


@dataclass(frozen=True)
class Row:
    """ids: tokens of one conversation; the first `prompt` of them are not trained. rejected: of a preference, the other
    answer to the same prompt."""

    ids: tuple[int, ...]
    prompt: int
    rejected: tuple[int, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence that is scored: prompt and answer, and of a preference prompt and rejected answer."""
        return [len(self.ids), *([self.prompt + len(self.rejected)] if self.rejected else [])]


def make(kind: str, count: int, seed: int, vocabulary: int, preferences: bool = False) -> list[Row]:
    """`count` rows, in random order. kind: of KINDS, or a number of tokens that every row has ("512").

    preferences: with a rejected answer as long as the chosen one, give or take a fifth.
    """
    spec, rng, rows = KINDS.get(kind) or _of_length(int(kind)), random.Random(f"{kind}-{seed}"), []
    for _ in range(count):
        length = 0
        while not spec["least"] <= length <= spec["most"]:
            length = round(spec["median"] * rng.lognormvariate(0.0, spec["sigma"]))
        spread = spec.get("spread", 0.15)
        trained = rng.uniform(spec["trained"] - spread, spec["trained"] + spread)
        ids = tuple(rng.randrange(3, vocabulary) for _ in range(length))
        prompt = max(1, length - round(trained * length))
        other = round((length - prompt) * rng.uniform(0.8, 1.2)) if preferences else 0
        rows.append(Row(ids, prompt, tuple(rng.randrange(3, vocabulary) for _ in range(other))))
    return rows


def _of_length(tokens: int) -> dict[str, Any]:
    return {"median": tokens, "sigma": 0.0, "least": tokens, "most": tokens, "trained": 0.65}


def by_length(rows: Sequence[Row], batch_size: int, seed: int) -> list[Row]:
    """The same rows, ordered so that each run of `batch_size` is of similar length; the runs in random order."""
    ordered = sorted(rows, key=lambda row: len(row.ids))
    runs = [ordered[at : at + batch_size] for at in range(0, len(ordered), batch_size)]
    random.Random(seed).shuffle(runs)
    return [row for run in runs for row in run]


def count(rows: Sequence[Row]) -> dict[str, Any]:
    """What is said of rows in results: how many, tokens, targets, lengths, and a digest to tell that they are equal."""
    lengths = [length for row in rows for length in row.lengths]
    content = json.dumps(sorted((row.ids, row.prompt, row.rejected) for row in rows)).encode()
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "targets": sum(length - row.prompt for row in rows for length in row.lengths),
        "shortest": min(lengths),
        "longest": max(lengths),
        "mean_length": sum(lengths) / len(lengths),
        "digest": hashlib.sha256(content).hexdigest()[:16],
    }

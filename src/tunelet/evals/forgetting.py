"""What a model could do before it was tuned, and can it still? Loss of general texts and multiple choice by likelihood,
before and after, item by item.

Ours alone, in English and Korean (data/general_*.jsonl); where the starter is tuned, pages of its home and the times
its texts tell, which its small model has read. Not for what tuning is meant to teach (held_out.py, starter.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tunelet.evals import likelihood, stats

DATA = Path(__file__).parent / "data"
PAGES, TIMES = 40, 100  # of the starter
TITLES = {"general": "general English and Korean", "home": "the starter's home"}
ALPHA = 0.05
CHANCE = 0.25  # of four choices

Rows = Sequence[Mapping[str, Any]]


def material(*, home: bool) -> Iterator[dict[str, Any]]:
    """{"of", "kind": "text" or "choice", "text"} or {..., "question", "choices", "answer"}, always the same ones."""
    for kind in ("text", "choice"):
        for line in (DATA / f"general_{kind}.jsonl").read_text(encoding="utf-8").splitlines():
            yield {"of": "general", "kind": kind, **json.loads(line)}
    if home:
        from tunelet import starter

        for kind, of, number in (("text", "text", PAGES), ("choice", "times", TIMES)):
            for row in islice(starter.rows(of, "test", n=number), number):
                yield {"of": "home", "kind": kind, **row}


def measure(model: Any, tokenizer: Any, max_length: int, *, home: bool) -> list[dict[str, Any]]:
    """For each of `material` {"item", "of", "kind"} and, of a text, {"nll", "tokens", "guess"}: nats, and what guessing
    among all tokens would cost; of a choice {"right"}: whether the right one is the most probable by the byte."""
    from tunelet.data.examples import Origin, Tokens
    from tunelet.data.pack import text_mask
    from tunelet.evals import held_out

    rows = list(material(home=home))
    out = [{"item": f"{row['of']}/{row['kind']}/{number}", "of": row["of"], "kind": row["kind"]}
           for number, row in enumerate(rows)]  # fmt: skip

    def encoded(text: str) -> list[int]:
        return tokenizer(text, verbose=False)["input_ids"]

    texts = [place for place, row in enumerate(rows) if row["kind"] == "text"]
    made = []
    for place in texts:
        ids = np.array(encoded(rows[place]["text"])[: max_length or None], dtype=np.int32)
        made.append(Tokens(ids, text_mask(len(ids)), ((0, len(ids), "text"),), Origin("general", place + 1)))
    for place, (nll, tokens) in zip(texts, held_out.losses(model, made), strict=True):
        out[place] |= {"nll": nll, "tokens": tokens, "guess": tokens * math.log(len(tokenizer))}
    requests, owners = [], []
    for place, row in enumerate(rows):
        if row["kind"] != "choice":
            continue
        before = encoded(row["question"])
        for choice in row["choices"]:
            whole = encoded(f"{row['question']} {choice}")
            same = likelihood.common(np.array(before), np.array(whole))
            requests.append(likelihood.Request(np.array(whole, dtype=np.int32), len(whole) - min(same, len(whole) - 1)))
            owners.append((place, len(choice.encode())))
    scores: dict[int, list[float]] = {}
    for (place, size), found in zip(owners, likelihood.score(model, requests), strict=True):
        scores.setdefault(place, []).append(found.logprob / size)
    for place, of in scores.items():
        out[place]["right"] = of.index(max(of)) == rows[place]["answer"]
    return out


def compare(before: Rows, after: Rows) -> dict[str, Any]:
    """{"worse": whether any figure is, significantly, "figures": [...]}: each with kind, of, title, n, before, after,
    difference (after - before: nats per token, or share) with its interval, verdict "worse", "better", "noise", or
    "unknown" where the model was no better than a guess before: what it never knew it cannot forget."""
    later = {row["item"]: row for row in after}
    pairs = [(row, later[row["item"]]) for row in before if row["item"] in later]
    figures = []
    for of in dict.fromkeys(row["of"] for row, _ in pairs):
        for kind, figure in (("text", _text), ("choice", _choice)):
            mine = [(a, b) for a, b in pairs if (a["of"], a["kind"]) == (of, kind)]
            if mine:
                figures.append({"kind": kind, "of": of, "title": TITLES.get(of, of), "n": len(mine), **figure(mine)})
    return {"worse": any(one["verdict"] == "worse" for one in figures) if figures else None, "figures": figures}


def _text(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    tokens = [float(a["tokens"]) for a, _ in pairs]
    change = stats.bootstrap_ratio([b["nll"] - a["nll"] for a, b in pairs], tokens)
    before, after = (sum(pair[side]["nll"] for pair in pairs) / sum(tokens) for side in (0, 1))
    verdict = "worse" if change.low > 0 else "better" if change.high < 0 else "noise"
    if sum(a["nll"] for a, _ in pairs) >= sum(a["guess"] for a, _ in pairs):
        verdict = "unknown"
    return {
        "before": before,
        "after": after,
        "perplexity": [math.exp(min(before, 700)), math.exp(min(after, 700))],
        "difference": change.as_dict(),
        "p": None,
        "verdict": verdict,
    }


def _choice(pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    was, now = ([bool(pair[side]["right"]) for pair in pairs] for side in (0, 1))
    lost, gained = (sum(x and not y for x, y in zip(*two, strict=True)) for two in ((was, now), (now, was)))
    change = stats.bounded_mean([float(b) - float(a) for a, b in zip(was, now, strict=True)], -1.0, 1.0)
    p = stats.mcnemar(lost, gained)
    verdict = "noise" if p >= ALPHA else "worse" if lost > gained else "better"
    if stats.wilson(sum(was), len(was)).low <= CHANCE and verdict != "better":
        verdict = "unknown"
    return {
        "before": sum(was) / len(was),
        "after": sum(now) / len(now),
        "difference": change.as_dict(),
        "p": p,
        "verdict": verdict,
    }

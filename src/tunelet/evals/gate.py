"""Was it worth tuning? The tuned model against prompts of the model it started from, item by item, in words too.

Pure functions of what was measured: not the asking (prompted.py) and not what was forgotten (forgetting.py), which is
only put into words here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tunelet.evals import paired, stats

NAMES = {"zero_shot": "zero-shot prompt", "few_shot": "few-shot prompt"}
RIGHT, EXACT, LOSS = "right", "exact", "answer_loss"
TITLES = {
    RIGHT: "held-out requests answered right",
    EXACT: "held-out answers exact",
    LOSS: "nats per token of held-out answers",
    "executed_match_en": "English commands",
    "executed_match_ko": "Korean commands",
    "refusal_right": "refusals",
    "refusal_false": "needless refusals",
    "other_match": "other requests",
    "invented_rate": "invented confirmations",
    "stop_rate": "answers that end",
}

Rows = Sequence[Mapping[str, Any]]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A model's answers (rows of eval/*.jsonl) and of each held-out answer {"item", "nll" in nats, "tokens"}."""

    rows: Rows = ()
    losses: Rows = ()
    told: Mapping[str, Any] = field(default_factory=dict)


def judge(baselines: Mapping[str, Measured], tuned: Measured, *, short: bool) -> Figures:
    """beats_prompting: None where nothing could be compared. short: whether the data's answers are so short that being
    exact means something. metric: what decided; best_baseline: the better of the prompts by it; difference: by how much
    tuning is better (points of a share, or nats less), with its 95 % interval and p.

    Graded requests decide, all kinds together; else exact answers, where they are short and anybody got one; else how
    probable the held-out answers are.
    """
    out: Figures = {"beats_prompting": None, "metric": None, "best_baseline": None, "difference": None, "figures": []}
    compared = {name: _figures(one, tuned, short) for name, one in baselines.items()}
    metric = next((m for m in (RIGHT, EXACT, LOSS) if any(_says(of, m) for of in compared.values())), None)
    if metric is None:
        return out
    having = {name: of[metric] for name, of in compared.items() if metric in of}
    best = max(having, key=lambda name: having[name]["baseline"] * (-1 if metric == LOSS else 1))
    found = having[best]
    return out | {
        "beats_prompting": found["difference"]["low"] > 0,
        "metric": metric,
        "best_baseline": best,
        "shots": baselines[best].told.get("number", 0),
        "baseline": found["baseline"],
        "tuned": found["tuned"],
        "difference": found["difference"],
        "figures": [{"baseline_name": name, **figure} for name, of in compared.items() for figure in of.values()],
    }


def _says(figures: Mapping[str, Figures], metric: str) -> bool:
    return metric in figures and (metric != EXACT or figures[metric]["baseline"] > 0 or figures[metric]["tuned"] > 0)


def _figures(baseline: Measured, tuned: Measured, short: bool) -> dict[str, Figures]:
    """metric -> {"metric", "n", "baseline", "tuned", "difference"}, over the items that both have."""
    first, second = (_outcomes(one.rows, short) for one in (baseline, tuned))
    out = {}
    for test in paired.compare(first, second):
        sign = -1 if test.metric in paired.LESS_IS_BETTER else 1
        change = test.difference
        low, high = sorted((sign * change.low, sign * change.high))
        difference = {"value": sign * change.value, "low": low, "high": high, "n": test.n, "p": test.p}
        out[test.metric] = {"metric": test.metric, "n": test.n, "baseline": test.first, "tuned": test.second,
                            "difference": difference}  # fmt: skip
    if figure := _loss(baseline.losses, tuned.losses):
        out[LOSS] = figure
    return out


def _outcomes(rows: Rows, short: bool) -> paired.Outcomes:
    """metric -> item -> did it count."""
    out = {RIGHT: {_key(row): bool(row["executed"]) for row in rows if "executed" in row}}
    if not out[RIGHT] and short:
        held = [row for row in rows if row["type"] == "held_out"]
        out[EXACT] = {_key(row): row["answer"].split() == row["expected"].split() for row in held}
    # fixed prompts are asked of the tuned model alone, and then shared by none
    others = {name: items for name, items in paired.outcomes(rows).items() if not name.startswith("exact_match")}
    return {name: items for name, items in out.items() if items} | others


def _key(row: Mapping[str, Any]) -> str:
    return repr((row["item"], row["expected"]))


def _loss(first: Rows, second: Rows) -> Figures | None:
    known = {row["item"]: row for row in first}
    pairs = [(known[row["item"]], row) for row in second if row["item"] in known and row["tokens"]]
    if not pairs:
        return None
    # per token of the tuned model's reading: a prompt may part the first word otherwise
    tokens = [float(b["tokens"]) for _, b in pairs]
    nats = [[pair[side]["nll"] for pair in pairs] for side in (0, 1)]
    gains = stats.bootstrap_ratio([a - b for a, b in zip(*nats, strict=True)], tokens)
    difference = {**gains.as_dict(), "p": stats.swapped(*nats, tokens, tokens)}
    before, after = (sum(of) / sum(tokens) for of in nats)
    return {"metric": LOSS, "n": len(pairs), "baseline": before, "tuned": after, "difference": difference}


# -- in words ---------------------------------------------------------------------------------------------------------


def figure(metric: str, value: float) -> str:
    return f"{value:.3f}" if metric == LOSS else f"{100 * value:.1f} %"


def points(metric: str, of: Mapping[str, float]) -> str:
    """'+38.8 points (34.1 to 43.2)', or nats."""
    value, low, high = ((x if metric == LOSS else 100 * x) + 0.0 for x in (of["value"], of["low"], of["high"]))
    digits = 3 if metric == LOSS else 1
    told = f"{value:+.{digits}f}{'' if metric == LOSS else ' points'} ({low:.{digits}f} to {high:.{digits}f})"
    return told.replace("-", "−")


def prompt_name(gate: Mapping[str, Any]) -> str:
    name = NAMES[gate["best_baseline"]]
    return f"{name} of {gate['shots']} examples" if gate.get("shots") else name


def said(gate: Mapping[str, Any]) -> str:
    """The verdict in a line."""
    if gate["beats_prompting"] is None:
        return f"Not held against prompting: {'; '.join(gate['remarks']) or 'nothing to compare'}."
    metric, of = gate["metric"], gate["difference"]
    two = f"{figure(metric, gate['tuned'])} against {figure(metric, gate['baseline'])}"
    gain = f"{'fewer by ' if metric == LOSS else 'difference '}{points(metric, of)}"
    text = f"{two} ({TITLES[metric]}, n = {of['n']:,}), {gain}."
    if gate["beats_prompting"]:
        return f"Tuning beat a {prompt_name(gate)}: {text}{as_good(gate)}"
    more = ", or more items (eval.baseline_items)" if of["value"] > 0 else ""
    return f"Tuning did not beat a {prompt_name(gate)}: {text} Try prompting first, or more data{more}."


def as_good(gate: Mapping[str, Any]) -> str:
    """Where prompting does as well, although tuning is better over all; '' where that is nowhere."""
    names = [
        TITLES.get(one["metric"], one["metric"])
        for one in gate["figures"]
        if one["baseline_name"] == gate["best_baseline"] and one["difference"]["low"] <= 0
    ]
    return f" The prompt does as well in: {', '.join(names)}." if names else ""


def forgotten(of: Mapping[str, Any]) -> str:
    """What was forgotten, in a line."""
    if of["worse"] is None:
        return ""
    worse = [one for one in of["figures"] if one["verdict"] == "worse"]
    if worse:
        return (
            f"Forgotten: {'; '.join(map(change, worse))}. Fewer steps, a lower learning rate or an adapter forget less."
        )
    known = [one for one in of["figures"] if one["verdict"] != "unknown"]
    if not known:
        return "Forgetting cannot be told: the model knew nothing of the general texts and questions before."
    return f"Nothing measurably forgotten: {'; '.join(map(change, known))}."


def change(one: Mapping[str, Any]) -> str:
    of = one["difference"]
    if one["kind"] == "text":
        factors = [100 * (np.exp(min(of[key], 50.0)) - 1) + 0.0 for key in ("value", "low", "high")]
        more = "{:+.1f} % ({:.1f} to {:.1f})".format(*factors).replace("-", "−")
        before, after = one["perplexity"]
        return f"text of {one['title']}, perplexity {before:.4g} to {after:.4g}, {more}"
    two = f"{100 * one['before']:.1f} % to {100 * one['after']:.1f} %"
    return f"questions on {one['title']}, {two}, {points(RIGHT, of)}"

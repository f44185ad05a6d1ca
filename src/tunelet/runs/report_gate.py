"""Whether it was worth tuning, as the page shows it: the tuned model against prompts of its start, and what it forgot.

Not for judging (evals/gate.py): all that is said here stands in the run's summary.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunelet.runs.record import Run
from tunelet.runs.report_sides import LESS, TITLES
from tunelet.runs.report_words import percent

NAMES = {"zero_shot": "zero-shot prompt", "few_shot": "few-shot prompt"}
OWN = {
    "right": "Held-out requests answered right, all kinds",
    "exact": "Held-out answers that are exact",
    "answer_loss": f"Held-out answers, nats per token{LESS}",
}
SIGNS = {True: ("good", "\u2714", "Tuning beat prompting"), False: ("red", "\u2718", "Tuning did not beat prompting"),
         None: ("open", "?", "Not held against prompting")}  # fmt: skip
VERDICTS = {"worse": "\u26a0 worse", "better": "better", "noise": "within chance", "unknown": "not known before either"}

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """cells: the prompts' figures and the tuned model's; difference: in words; low, value, high: of its interval, in
    per cent of a picture's width, whose middle is 0; sure: it lies on one side of 0."""

    title: str
    n: int
    cells: list[str]
    difference: str
    low: float
    value: float
    high: float
    kind: str
    decides: bool = False


@dataclass(frozen=True)
class Gate:
    kind: str
    sign: str
    title: str
    text: str
    columns: list[str]
    rows: list[Row]
    asked: list[tuple[str, str]]  # (name of the prompt, how it was made)
    remarks: list[str]
    forgetting: Figures | None


def gate(run: Run, first: Run) -> Gate | None:
    """None where the run has no verdict. first: the stage that prompts were asked in, which may be the run itself."""
    of = run.read_json("summary.json", {}).get("gate")
    if not of:
        return None
    kind, sign, title = SIGNS[of["beats_prompting"]]
    names = [name for name in NAMES if any(one["baseline_name"] == name for one in of["figures"])]
    asked = [(NAMES[name], _how(first.read_json(f"eval/{name}.json", {}))) for name in names]
    columns = [*(NAMES[name] for name in names), "tuned"]
    remarks = [_sentence(remark) for remark in of["remarks"]] if of["beats_prompting"] is not None else []
    return Gate(kind, sign, title, of["text"], columns, _rows(of, names), asked, remarks, _forgetting(of["forgetting"]))


def _rows(of: Figures, names: Sequence[str]) -> list[Row]:
    """That which decided first, then the others; differences are those to the better prompt."""
    metrics = [*OWN, *TITLES, *(one["metric"] for one in of["figures"])]
    figures = {(one["baseline_name"], one["metric"]): one for one in of["figures"]}
    best, out = of["best_baseline"], []
    for metric in sorted(dict.fromkeys(metrics), key=lambda metric: metric != of["metric"]):
        main = figures.get((best, metric))
        if main is None:
            continue
        found = [figures.get((name, metric)) for name in names]
        cells = [_figure(metric, one["baseline"]) if one else "-" for one in found]
        row = _difference(metric, main["difference"])
        title = OWN.get(metric) or TITLES.get(metric, metric.replace("_", " "))
        cells.append(_figure(metric, main["tuned"]))
        out.append(Row(title, main["n"], cells, *row, decides=metric == of["metric"]))
    return out


def _figure(metric: str, value: float) -> str:
    return f"{value:.3f}" if metric == "answer_loss" else percent(value)


def _difference(metric: str, of: Figures) -> tuple[str, float, float, float, str]:
    """(words, low, value, high, kind): how much better the tuned model is. A nat is as wide as a whole share."""
    value, low, high = (of[key] + 0.0 for key in ("value", "low", "high"))
    times, digits = (1, 3) if metric == "answer_loss" else (100, 1)
    words = f"{times * value:+.{digits}f} ({times * low:.{digits}f} to {times * high:.{digits}f})".replace(
        "-", "\u2212"
    )
    places = [50 + 50 * max(-1.0, min(1.0, x)) for x in (low, value, high)]
    return words, *places, "good" if low > 0 else "red" if high < 0 else "open"


def _how(told: Figures) -> str:
    """'as Q and A, 5 examples: the starter, rows 3, 17 ...'"""
    layout = told.get("layout", "")
    parts = ["through the chat template" if layout == "chat template" else f"as text ({layout})"]
    if told.get("instruction"):
        parts.append(f"instruction: \u201c{told['instruction']}\u201d")
    if shots := told.get("shots"):
        where = "; ".join(", ".join(f"{key} {value}" if key != "file" else str(value) for key, value in one.items())
                          for one in shots)  # fmt: skip
        parts.append(f"{len(shots)} training rows as examples ({where})")
    return "; ".join(parts)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _forgetting(of: Figures) -> Figures | None:
    if not of["figures"]:
        return None
    rows = []
    for one in of["figures"]:
        text = one["kind"] == "text"
        title = f"{'Text' if text else 'Questions'}: {one['title']}"
        cells = [f"{x:.4g}" for x in one["perplexity"]] if text else [percent(one["before"]), percent(one["after"])]
        change = _difference("answer_loss" if text else "right", one["difference"])[0]
        rows.append(
            {"title": title, "unit": "perplexity (less is better); change in nats per token" if text else
             "share right; change in points", "n": one["n"], "cells": cells, "change": change,
             "verdict": VERDICTS[one["verdict"]], "worse": one["verdict"] == "worse"}
        )  # fmt: skip
    return {"worse": bool(of["worse"]), "text": of["text"], "rows": rows}

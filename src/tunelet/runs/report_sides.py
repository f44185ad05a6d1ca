"""The states of the model that a report holds against each other: before and after, or, where earlier stages lie in the
run's folder, at the start, after these, and after the last one. Their metrics as cards and rows, their answers.

Not for measuring (evals/) and not for layout (report.html.j2).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunelet.recipe import PREFERENCE
from tunelet.runs import charts
from tunelet.runs.record import STAGES, Run, is_run
from tunelet.runs.report_words import figure, named

SHOWN = 12  # answers side by side
WRONG = 6  # answers that are still wrong
LESS = " (less is better)"

TITLES = {
    "executed_match_en": "Commands that do what was asked, English",
    "executed_match_ko": "Commands that do what was asked, Korean",
    "exact_match_en": "Commands right letter by letter, English",
    "exact_match_ko": "Commands right letter by letter, Korean",
    "other_match": "Other requests answered as expected",
    "refusal_right": "Unsupported requests turned down",
    "refusal_false": f"Supported requests turned down{LESS}",
    "invented_rate": f"Confirmations invented or rambling{LESS}",
    "preference_accuracy": "Better answer found more probable than the worse one",
    "preference_accuracy_per_token": "Better answer found more probable, per token",
    "stop_rate": "Answers that end by themselves",
    "held_out_loss": f"Held-out loss, nats per token{LESS}",
}
CARDS = ("executed_match_en", "executed_match_ko", "held_out_loss", "stop_rate", "refusal_right")
PREFERENCE_CARDS = (
    "preference_accuracy_per_token",
    "invented_rate",
    "executed_match_en",
    "stop_rate",
    "preference_accuracy",
    "held_out_loss",
)


def earlier(run: Run) -> list[Run]:
    """The stages that this run goes on from, made by the same call, in their order."""
    folders = [path for path in (run.folder / STAGES).glob("*-*") if path.name.partition("-")[0].isdigit()]
    return [Run(path) for path in sorted(folders, key=lambda path: int(path.name.partition("-")[0])) if is_run(path)]


def link(run: Run, stage: Run) -> str:
    """From the run's page to that of an earlier stage."""
    return f"{stage.folder.relative_to(run.folder).as_posix()}/report.html"


@dataclass(frozen=True)
class Side:
    """The model at one time. key: "before", "between" or "after", its colour; title: what the page calls it. metrics:
    name -> {"value", "low", "high", "n"}; answers: item -> row."""

    key: str
    title: str
    metrics: Mapping[str, Any]
    answers: Mapping[str, Any]


def sides(run: Run, stages: Sequence[Run]) -> list[Side]:
    """Those of which something is known; at most three."""
    found = [_side("before", "before", run, "before"), _side("after", "after", run, "after")]
    if stages:
        found = [
            _side("before", "at the start", stages[0], "before"),
            _side("between", f"after {named(stages[-1])}", run, "before"),
            _side("after", f"after {named(run)}", run, "after"),
        ]
    return [side for side in found if side.metrics or side.answers]


def _side(key: str, title: str, run: Run, name: str) -> Side:
    path = run.folder / "eval" / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    rows = [json.loads(line) for line in lines if line]
    metrics = run.read_json(f"eval/{name}.json", {}).get("metrics", {})
    return Side(key, title, metrics, {row["item"]: row for row in rows})


# -- metrics ----------------------------------------------------------------------------------------------------------


def cards(of: Sequence[Side], method: str) -> list[dict[str, Any]]:
    """The four figures that say most."""
    names = PREFERENCE_CARDS if method in PREFERENCE else CARDS
    return [_card(name, of) for name in names if any(name in side.metrics for side in of)][:4]


def _card(name: str, of: Sequence[Side]) -> dict[str, Any]:
    *others, now = [side for side in of if name in side.metrics]
    was = [f"{side.title}: {figure(name, side.metrics[name]['value'])}" for side in others]
    if now.key == "between":  # the run's own result is not measured yet
        was.append(f"shown: {now.title}")
    return {
        "title": TITLES[name].removesuffix(LESS),
        "value": figure(name, now.metrics[name]["value"]),
        "interval": f"{_interval(name, now.metrics[name])}, n = {now.metrics[name]['n']:,}",
        "was": was,
    }


def metrics(of: Sequence[Side]) -> list[dict[str, Any]]:
    """A row for each metric that any side has."""
    there = {name for side in of for name in side.metrics}
    out = []
    for name in [*(name for name in TITLES if name in there), *sorted(there - set(TITLES))]:
        title, known = TITLES.get(name, name.replace("_", " ")), [side for side in of if name in side.metrics]
        rows = [(side.key, side.title, side.metrics.get(name)) for side in of]
        figures = [
            {"key": side.key, "value": figure(name, found["value"]), "interval": _interval(name, found)}
            for side in known
            for found in [side.metrics[name]]
        ]
        svg = None if name.endswith("loss") else charts.whiskers(title, rows)
        out.append({"name": name, "title": title, "n": known[0].metrics[name]["n"], "svg": svg, "sides": figures})
    return out


def _interval(name: str, of: Mapping[str, Any]) -> str:
    return f"{figure(name, of['low'])} to {figure(name, of['high'])}"


# -- answers ----------------------------------------------------------------------------------------------------------


def answers(of: Sequence[Side]) -> dict[str, Any]:
    """Answers of all sides to the same prompts, and those that are still wrong."""
    of = [side for side in of if side.answers]
    last = of[-1].answers if of else {}
    after = last if of and of[-1].key == "after" else {}
    wrong = [item for item, row in after.items() if row.get("executed") is False]
    return {
        "titles": [side.title for side in of],
        "pairs": [_pair(item, of) for item in _mixed(last)],
        "graded": any("executed" in row for row in last.values()),
        "wrong": [_pair(item, of) for item in wrong[:WRONG]],
        "wrong_count": len(wrong),
        "graded_count": sum("executed" in row for row in after.values()),
    }


def _mixed(rows: Mapping[str, Any]) -> list[str]:
    """Some of each kind: fixed prompts all, then by turns one of each type and language, in the items' order."""
    groups: dict[tuple[str, str], list[str]] = {}
    for item, row in rows.items():
        groups.setdefault((row["type"], row.get("language", "")), []).append(item)
    chosen = [item for (kind, _), group in groups.items() if kind == "prompt" for item in group]
    rest = [group for (kind, _), group in groups.items() if kind != "prompt"]
    for place in range(SHOWN):
        chosen += [group[place] for group in rest if place < len(group) and len(chosen) < SHOWN]
    return chosen[: max(SHOWN, sum(kind == "prompt" for kind, _ in groups))]


def _pair(item: str, of: Sequence[Side]) -> dict[str, Any]:
    found = [(side, side.answers[item]) for side in of if item in side.answers]
    row = found[-1][1]
    return {
        "item": item,
        "kind": " ".join(part for part in (row["type"].replace("_", " "), row.get("language", "")) if part),
        "messages": row["messages"],
        "expected": row.get("expected"),
        "sides": [
            {
                "key": side.key,
                "title": side.title,
                "answer": answer["answer"],
                "stopped": answer["stopped"],
                "tokens": answer["tokens"],
                "right": answer.get("executed"),
                "problem": answer.get("problem", ""),
            }
            for side, answer in found
        ],
    }

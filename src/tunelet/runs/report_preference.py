"""What happened to the model: remarks made before and in the training with commands to try next; of one that compared
answers also the figures from the first evaluation to that of the saved weights, and their charts.

Not for judging the figures (train/guard.py): all that is said there stands in the run's log.jsonl and guard.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunelet.recipe import PREFERENCE, WANTS, Recipe
from tunelet.runs import charts
from tunelet.runs.charts import Curve
from tunelet.runs.record import Run
from tunelet.runs.report_words import again, command, percent

Row = Mapping[str, Any]

KINDS = {
    "learning_rate": "A learning rate outside the known-good range",
    "beta": "A beta outside the known-good range",
    "chosen_falls": "The better answers are being unlearned too",
    "drift": "The model has drifted from its start",
    "entropy": "The model has become certain of nearly everything",
    "stops": "Fewer answers end by themselves",
    "loops": "Answers repeat themselves without end",
    "length": "Answers get longer and longer",
}
TITLES = KINDS | {  # and what is said of other methods
    "end_token": "The token that ends answers was never trained",
    "still": "The virtual tokens hardly train",
}

NOTES = {
    "dpo": "Accuracy counts rewards, which are gains since the start: the first figure only says that none was made.",
    "orpo": "ORPO is the supervised tuning too, so that it is meant to go far from its start.",
}


@dataclass(frozen=True)
class Told:
    """A remark as the page shows it. when: "before the training" or "step 6"; tries: (note, command); others: what to
    try where no command does it."""

    when: str
    severity: str
    title: str
    text: str
    tries: list[tuple[str, str]]
    others: list[str]


@dataclass(frozen=True)
class Happened:
    """stopped: at which step the guard stopped the training, else None. figures: a sentence, note: how to read it."""

    stopped: int | None
    verdict: str
    figures: str
    note: str
    remarks: list[Told]
    charts: list[charts.Chart]


def happened(run: Run, recipe: Recipe) -> Happened | None:
    """None where the method compares no answers and nothing was remarked on."""
    rows = [row for row in run.log_rows() if "step" in row]
    evaluated = [row for row in rows if "held_out_loss" in row]
    said = [(None, remark) for remark in run.read_json("guard.json", [])]
    said += [(row["step"], remark) for row in rows for remark in row.get("remarks", [])]
    if recipe.method.name not in PREFERENCE:
        text = f"{_count(said)} The training was not stopped." if said else ""
        return Happened(None, text, "", "", _remarks(run, recipe, said), []) if said else None
    stopped = next((step for step, remark in said if remark["severity"] == "stop"), None)
    kept = _kept(run, evaluated)
    figures = _figures(run, recipe, evaluated[0], kept) if kept and kept["step"] else ""
    return Happened(
        stopped,
        _verdict(run, recipe, evaluated, said, stopped, kept),
        figures,
        NOTES.get(recipe.method.name, "") if figures else "",
        _remarks(run, recipe, said),
        _charts(recipe, rows, evaluated),
    )


def _kept(run: Run, evaluated: Sequence[Row]) -> Row | None:
    """The evaluation of the weights that were saved: not the last one where the guard or early stopping went back."""
    loss = run.read_json("DONE", {}).get("held_out_loss")
    same = [row for row in evaluated if row["held_out_loss"] == loss] or evaluated
    return same[-1] if same else None


# -- in words ---------------------------------------------------------------------------------------------------------


def _verdict(
    run: Run,
    recipe: Recipe,
    evaluated: Sequence[Row],
    said: Sequence[tuple[int | None, Row]],
    stopped: int | None,
    kept: Row | None,
) -> str:
    if stopped is not None:
        kinds = [KINDS.get(of["kind"], of["kind"]) for step, of in said if step == stopped and of["severity"] == "stop"]
        total = f" of {recipe.train.max_steps:,}" if recipe.train.max_steps else ""
        text = f"The guard stopped the training at step {stopped:,}{total}. {'. '.join(kinds)}."
        if run.status != "finished" or kept is None:
            return text
        if kept["step"] == 0:
            return f"{text} The saved model is the one it started from: no later one was sound."
        return f"{text} The saved model is that of step {kept['step']:,}, the last evaluation before."
    if not evaluated:
        if run.status == "finished":
            return "No rows were held out, so that nothing could be looked at (data.eval, data.eval_fraction)."
        return "Nothing has been evaluated yet."
    if len(evaluated) == 1:
        begun = "Nothing has been evaluated since the start."
        return f"{begun} {_count(said)}" if said else begun
    if recipe.method.guard == "off":
        return "The guard was off (method.guard), so that nobody looked whether the model was being damaged."
    if not said:
        return "Nothing that the guard looks for went wrong."
    return f"{_count(said)} The training was not stopped."


def _count(said: Sequence[Any]) -> str:
    return f"The guard had {len(said)} warning{'s' if len(said) > 1 else ''}."


def _figures(run: Run, recipe: Recipe, first: Row, kept: Row) -> str:
    """'From the start to step 60: preference accuracy on 200 held-out pairs from 3.0 % to 99.5 %; ...'"""
    better, worse = _names(recipe)
    held = run.read_json("data.json", {}).get("eval", {}).get("rows")
    pairs = f"{held:,} held-out pairs" if held else "held-out pairs"

    def change(what: str, key: str, text: Callable[[float], str]) -> list[str]:
        if first.get(key) is None or kept.get(key) is None:
            return []
        return [f"{what} from {text(first[key])} to {text(kept[key])}"]

    parts = change(f"preference accuracy on {pairs}", "held_out/rewards/accuracies", percent)
    parts += change(f"log-probability per token of the {better} answers", "held_out/logps/chosen", _nats)
    parts += change(f"of the {worse} ones", "held_out/logps/rejected", _nats)
    if kept.get("watch/kl") is not None:
        parts.append(f"distance from the start {_nats(kept['watch/kl'])} nats per token")
    parts += change("answers that stop by themselves", "watch/stop_rate", percent)
    return f"From the start to step {kept['step']:,}: {'; '.join(parts)}." if parts else ""


def _nats(value: float) -> str:
    return f"{value:.3f}"


def _names(recipe: Recipe) -> tuple[str, str]:
    return ("good", "bad") if recipe.method.name == "kto" else ("chosen", "rejected")


def _remarks(run: Run, recipe: Recipe, said: Sequence[tuple[int | None, Row]]) -> list[Told]:
    """In their order. A command that an earlier remark has is not repeated."""
    shown: set[str] = set()
    out = []
    for step, remark in said:
        tries, others = _tries(run, recipe, remark["fix"])
        new = [(note, line) for note, line in tries if line not in shown]
        repeated = ["as above"] if len(new) < len(tries) else []
        shown |= {line for _, line in tries}
        when = "before the training" if step is None else f"step {step:,}"
        title = TITLES.get(remark["kind"], remark["kind"])
        out.append(Told(when, remark["severity"], title, _upper(remark["text"]), new, repeated + others))
    return out


def _upper(text: str) -> str:
    """With a capital at its start, where that is a word and not a key."""
    return text[:1].upper() + text[1:] if text.partition(" ")[0].isalpha() else text


def _tries(run: Run, recipe: Recipe, fix: str) -> tuple[list[tuple[str, str]], list[str]]:
    """The remedies of a remark ("--set a=1 (why), or fewer steps; look at ...") as commands, and the others."""
    tries, others = [], []
    for part in re.split("; |, or ", fix):
        settings = re.findall(r"--set (\S+)", part)
        note = re.sub(r"--set \S+", "", part).strip()
        if settings:
            tries.append((note.strip("()"), again(run, *settings)))
        elif "tunelet data doctor" in part:
            wanted = ("--want", WANTS[recipe.method.name])
            line = command("tunelet", "data", "doctor", *recipe.data.train, *wanted)
            tries.append((re.sub(r" *\(.*", "", note), line))
        else:
            others.append(note)
    return tries, others


# -- in charts --------------------------------------------------------------------------------------------------------


def _charts(recipe: Recipe, rows: Sequence[Row], evaluated: Sequence[Row]) -> list[charts.Chart]:
    """Those that have data. Steps at which a remark was made are marked where the figures are evaluations."""
    better, worse = _names(recipe)
    marks = [_mark(row) for row in evaluated if row.get("remarks")]

    def points(key: str, times: float = 1) -> list[charts.Point]:
        return [(row["step"], times * row[key]) for row in rows if row.get(key) is not None]

    def held(name: str, key: str) -> Curve:
        """Of held-out rows; where there are none, of the rows in training."""
        found = points(f"held_out/{key}")
        return Curve(name, found, True) if found else Curve(name, points(key))

    where = "held-out answers" if evaluated else "in training"
    pair = [held(better, "logps/chosen"), held(worse, "logps/rejected")]
    rewards = [held(better, "rewards/chosen"), held(worse, "rewards/rejected"), held("margin", "rewards/margins")]
    accuracies = "rewards/accuracies"
    drawn = [
        charts.curves(f"Log-probability per token, {where}", pair, marks=marks),
        charts.curves(f"Rewards, {where}", rewards, marks=marks),
        charts.curves(
            "Preference accuracy, %",
            [
                Curve("training", points(accuracies, 100)),
                Curve("held out", points(f"held_out/{accuracies}", 100), True),
            ],
            from_zero=True,
            marks=marks,
        ),
        charts.curves(
            "Distance from the start, nats per token (KL, estimated)",
            [Curve("distance", points("watch/kl"), True)],
            from_zero=True,
            marks=marks,
        ),
        charts.curves(
            f"The loss's parts, {where} (odds: before the weight of {recipe.method.beta:g})",
            [held("NLL", "nll_loss"), held("odds", "odds_loss")],
            from_zero=True,
        ),
        charts.curves("KTO's reference point, nats per answer", [Curve("kl", points("kl"))], from_zero=True),
    ]
    return [chart for chart in drawn if chart is not None]


def _mark(row: Row) -> charts.Mark:
    kinds = [KINDS.get(remark["kind"], remark["kind"]) for remark in row["remarks"]]
    stop = any(remark["severity"] == "stop" for remark in row["remarks"])
    return charts.Mark(row["step"], "stop" if stop else "warn", "; ".join(kinds))

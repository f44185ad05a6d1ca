"""What finished cells of a sweep took and reached, which is best, and what their figures cannot say.

Not for running them (sweep.py) and not for showing it (commands/sweep.py, runs/sweep_page.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunelet.align import METRICS, SUMMARY
from tunelet.runs import compare
from tunelet.runs.record import STAGES, Run, is_run

# What is held against each other: the first group whose first metric was measured, and the held-out loss. A right
# command that is not followed by an end counts as wrong: stop_rate beside it shows which of the two is missing.
QUALITY = (
    ("executed_match_en", "executed_match_ko", "stop_rate"),
    ("preference_accuracy", "stop_rate"),
    ("stop_rate",),
)
LOWER = ("held_out_loss",)  # where less is better
STARVED = 0.75  # of the cores that another cell got

# Measured on the starter: cells of 751 and 896 MB alone took 972 and 1,178 MB after others (LoRA and DoRA of rank 2).
MEMORY = (
    "Memory: the cells share one process, which keeps some of what earlier ones took, so later cells show more than "
    "they need alone: do not hold it against each other."
)

Told = dict[str, Any]


def figures(folder: Path, predicted: Told) -> Told:
    """What a finished cell took and reached. trained: numbers in what was saved; size_mb: of its weights, 10^6 bytes;
    training_seconds, cores (of the processor that it got) and peak_mb: of all its stages' trainings; seconds: with
    evaluations."""
    run = Run.open(folder)
    own = [*map(Run.open, filter(is_run, sorted((folder / STAGES).glob("*")))), run]
    actual = [one.read_json("plan.json", {}).get("actual") or {} for one in own]
    peaks = [of["peak_mb"] for of in actual if of.get("peak_mb")]
    facts, summary, saved = compare.facts(run), run.read_json(SUMMARY), run.model_folder()
    trained = facts["parameters_trained"]
    return {
        "trained": trained,
        "share": min(1.0, trained / max(predicted["parameters"], trained)) if trained else None,
        "adapter": saved is not None and saved.name == "adapter",
        "size_mb": sum(path.stat().st_size for path in saved.glob("*.safetensors")) / 1e6 if saved else None,
        "training_seconds": sum(of.get("seconds") or 0.0 for of in actual),
        "cores": cores_of(own),
        "seconds": summary["seconds"],
        "peak_mb": max(peaks) if peaks else None,
        "energy_wh": summary["energy_wh"],
        "energy_kind": summary["energy_kind"],
        "learning_rate": facts["learning_rate"],
        "stopped": facts["stopped"],
        "held_out_data": facts["held_out_data"],
        "metrics": summary["after"],
        "before": summary["before"],
    }


def metrics(told: Told) -> dict[str, str]:
    """Name -> title of what the cells are held against each other by, the first one above all."""
    present = {name for one in told["cells"] if one["figures"] for name in one["figures"]["metrics"]}
    group = next((group for group in QUALITY if group[0] in present), ())
    return {name: METRICS[name] for name in (*group, *LOWER) if name in present}


def best(told: Told, name: str) -> list[str]:
    """Names of the cell with the best figure of a metric (of equal ones that with the fewest trained parameters), and
    after it of those whose interval overlaps its interval, in the order of the metric."""
    sign = 1 if name in LOWER else -1
    found = [one for one in told["cells"] if one["figures"] and name in one["figures"]["metrics"]]
    if not found:
        return []
    cells = {one["name"]: one["figures"]["metrics"][name] for one in found}
    found.sort(key=lambda one: (sign * cells[one["name"]]["value"], one["figures"]["trained"] or 0))
    first, names = cells[found[0]["name"]], [one["name"] for one in found]
    return [of for of in names if cells[of]["low"] <= first["high"] and cells[of]["high"] >= first["low"]]


def verdicts(told: Told) -> list[Mapping[str, Any]]:
    """One sentence for each metric: {"metric", "best", "tied", "text"}. Nothing where there is only one finished cell,
    or held-out data that is not the same."""
    cells = {one["name"]: one["figures"] for one in told["cells"] if one["figures"]}
    if len(cells) < 2:
        return []
    data = [of["held_out_data"] for of in cells.values()]
    out: list[Mapping[str, Any]] = []
    names = metrics(told)
    graded = ("executed_match_en", "executed_match_ko") if "executed_match_en" in names else ()
    for name, title in names.items():
        title = title[:1].upper() + title[1:]
        same = name in graded or (name == "stop_rate" and graded)  # of the starter's items, not of held-out rows
        if not same and any(of != data[0] for of in data):
            text = f"{title}: the cells' held-out rows differ, so these figures say nothing against each other."
            out.append({"metric": name, "best": None, "tied": [], "text": text})
            continue
        values = [of["metrics"][name]["value"] for of in cells.values() if name in of["metrics"]]
        if len(values) > 1 and len(set(values)) == 1:
            text = f"{title}: the same in all cells."
            out.append({"metric": name, "best": None, "tied": [], "text": text})
            continue
        first, *tied = best(told, name)
        if not tied:
            text = f"{title}: {first} is best, and its interval overlaps no other."
            out.append({"metric": name, "best": first, "tied": [], "text": text})
            continue
        sizes = {of: cells[of]["trained"] or 0 for of in (first, *tied)}
        least = min(sizes, key=lambda of: sizes[of])
        among = "all cells" if len(tied) + 1 == len(cells) else ", ".join(tied)
        text = f"{title}: {first} is highest" if name not in LOWER else f"{title}: {first} is lowest"
        text += f", but the intervals of {among} overlap: these items do not tell them apart"
        text += f"; of these, {least} trains the fewest parameters." if least != first else "."
        out.append({"metric": name, "best": first, "tied": tied, "text": text})
    out.append({"metric": "peak_mb", "best": None, "tied": [], "text": MEMORY})
    if slow := slowed(told):
        text = (
            f"Time: {', '.join(slow)} got less of the processor than other cells, as where other programs are at work: "
        )
        text += "do not hold the times against each other."
        out.append({"metric": "training_seconds", "best": None, "tied": [], "text": text})
    return out


def slowed(told: Told) -> list[str]:
    """Names of the finished cells that got less than STARVED times the processor cores of the best served cell.

    Their time is that of a busy machine. Where all cells are served alike, busy or not, times can be compared.
    """
    cores = {
        one["name"]: one["figures"]["cores"] for one in told["cells"] if one["figures"] and one["figures"]["cores"]
    }
    most = max(cores.values(), default=0.0)
    return [name for name, of in cores.items() if of < STARVED * most]


def cores_of(runs: Sequence[Run]) -> float | None:
    """CPU seconds per second of the clock over all logged steps; None on a GPU, where the processor's share says
    nothing, and where nothing was logged."""
    clock = processor = 0.0
    for run in runs:
        if (run.read_json("env.json", {}).get("choice") or {}).get("device") != "cpu":
            return None
        before = 0
        for row in run.log_rows():
            if row.get("tokens_per_second") and row.get("tokens_per_cpu_second"):
                clock += (row["tokens"] - before) / row["tokens_per_second"]
                processor += (row["tokens"] - before) / row["tokens_per_cpu_second"]
                before = row["tokens"]
    return processor / clock if clock > 0 else None

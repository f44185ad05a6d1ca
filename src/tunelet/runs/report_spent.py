"""What a run took: time, memory, energy, predicted and actual, over all stages of an alignment.

Not for measuring them (train/energy.py, train/plan.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunelet.runs.record import Run
from tunelet.runs.report_sides import link
from tunelet.runs.report_words import duration, named


def spent(run: Run, stages: Sequence[Run]) -> dict[str, Any]:
    plan, energy = run.read_json("plan.json", {}), run.read_json("energy.json")
    predicted, actual = plan.get("predicted") or {}, plan.get("actual") or {}
    kind = (energy or {}).get("kind", "")
    energy_title = f"Energy ({kind}) of the training" if kind else "Energy of the training"
    rows = [
        ("Time of the training", "seconds", duration),
        ("Most memory held", "peak_mb", lambda mb: f"{mb:,.0f} MB"),
        ("Disk", "disk_mb", lambda mb: f"{mb:,.1f} MB"),
        (energy_title, "energy_wh", lambda wh: f"{wh:.3g} Wh"),
    ]
    table = []
    for title, key, text in rows:
        if actual.get(key) is None and predicted.get(key) is None:
            continue
        cells = [text(side[key]) if side.get(key) is not None else "-" for side in (predicted, actual)]
        off = ""
        if predicted.get(key) and actual.get(key) is not None:
            off = f"{predicted[key] / actual[key] - 1:+.0%}".replace("%", " %") if actual[key] else ""
        table.append({"title": title, "predicted": cells[0], "actual": cells[1], "off": off})
    parts = [
        {"name": name, "time": duration(part["seconds"]), "energy": f"{part['energy_wh']:.3g} Wh", "kind": part["kind"]}
        for name, part in (energy or {}).get("parts", {}).items()
    ]
    return {
        "table": table,
        "predicted": bool(predicted),
        "reason": plan.get("reason", ""),
        "energy": energy,
        "whole": duration(energy["seconds"]) if energy else "",
        "parts": parts,
        "stages": _stages(run, stages) if stages else None,
        "this": named(run),
    }


def _stages(run: Run, stages: Sequence[Run]) -> list[dict[str, Any]]:
    """A line for each stage, this run the last of them, and one for all: sums, and the most memory."""
    rows, told = [], []
    for number, one in enumerate((*stages, run), 1):
        done, energy = one.read_json("DONE", {}), one.read_json("energy.json", {})
        told.append({"steps": done.get("steps"), "peak_mb": done.get("peak_mb"), **energy})
        page = link(run, one) if one is not run else ""
        rows.append({"name": f"{number}. {named(one)}", "link": page, **_cells(told[-1])})
    total: dict[str, Any] = {key: sum(one.get(key) or 0 for one in told) for key in ("steps", "seconds", "energy_wh")}
    total["peak_mb"] = max((one["peak_mb"] for one in told if one["peak_mb"]), default=None)
    measured = all(one.get("kind", "measured") == "measured" for one in told)
    total["kind"] = "measured" if measured else "estimated"
    return [*rows, {"name": "all of it", "link": "", **_cells(total)}]


def _cells(of: dict[str, Any]) -> dict[str, str]:
    return {
        "steps": f"{of['steps']:,}" if of.get("steps") is not None else "-",
        "time": duration(of["seconds"]) if of.get("seconds") else "-",
        "memory": f"{of['peak_mb']:,.0f} MB" if of.get("peak_mb") else "-",
        "energy": f"{of['energy_wh']:.3g} Wh ({of['kind']})" if of.get("energy_wh") else "-",
    }

"""report.html: one file that shows what a run did, without network and without script. Reads the run folder, writes
the page.

Not for measuring (evals/) and not for drawing (charts.py; the layout is report.html.j2). Any run has a page, also a
failed or
unfinished one: what is missing is left out, or said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tunelet import __version__
from tunelet.recipe import Recipe
from tunelet.recipe_io import values
from tunelet.recipe_text import inline
from tunelet.runs import charts
from tunelet.runs.record import Run

NAME = "report.html"
SHOWN = 12  # answers side by side
WRONG = 6  # answers that are still wrong

TITLES = {
    "executed_match_en": "Commands that do what was asked, English",
    "executed_match_ko": "Commands that do what was asked, Korean",
    "exact_match_en": "Commands right letter by letter, English",
    "exact_match_ko": "Commands right letter by letter, Korean",
    "other_match": "Other requests answered as expected",
    "refusal_right": "Unsupported requests turned down",
    "refusal_false": "Supported requests turned down (less is better)",
    "stop_rate": "Answers that end by themselves",
    "held_out_loss": "Held-out loss, nats per token (less is better)",
}
CARDS = ("executed_match_en", "executed_match_ko", "held_out_loss", "stop_rate", "refusal_right")


def write(run: Run) -> Path:
    """Write the run's report.html (again) and return its path."""
    return run.write_text(NAME, html(run))


def html(run: Run) -> str:
    """The page as text."""
    before, after = (run.read_json(f"eval/{name}.json", {}).get("metrics", {}) for name in ("before", "after"))
    recipe = run.recipe()
    return _template().render(
        run=run,
        name=recipe.name,
        status=run.status,
        version=__version__,
        said=_sentence(run, recipe),
        failed=run.read_json("FAILED.json"),
        cards=[_card(name, before.get(name), after.get(name)) for name in CARDS if name in after or name in before][:4],
        metrics=_metrics(before, after),
        charts=_charts(run),
        answers=_answers(run),
        masks=_masks(run),
        data=_data(run),
        spent=_spent(run),
        recipe=_recipe(run, recipe),
        environment=_environment(run),
        next=_next(run, recipe, after),
        number=charts.number,
    )


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tunelet.runs", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html.j2")


# -- what stands on the page ------------------------------------------------------------------------------------------


def figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if name.endswith("loss") else f"{value:.1%}".replace("%", " %")


def _interval(name: str, of: Mapping[str, Any]) -> str:
    return f"{figure(name, of['low'])} to {figure(name, of['high'])}"


def _card(name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, str]:
    now = after or before or {}
    return {
        "title": TITLES[name].replace(" (less is better)", ""),
        "value": figure(name, now["value"]),
        "interval": f"{_interval(name, now)}, n = {now['n']:,}",
        "before": f"before: {figure(name, before['value'])}" if before and after else "",
    }


def _metrics(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in TITLES if name in before or name in after]
    names += sorted((set(before) | set(after)) - set(TITLES))
    out = []
    for name in names:
        sides = {"before": before.get(name), "after": after.get(name)}
        known = [side for side in sides.values() if side]
        out.append(
            {
                "name": name,
                "title": TITLES.get(name, name.replace("_", " ")),
                "n": known[0]["n"],
                "svg": None if name.endswith("loss") else charts.whiskers(TITLES.get(name, name), **sides),
                "sides": [
                    {"side": side, "value": figure(name, of["value"]), "interval": _interval(name, of)}
                    for side, of in sides.items()
                    if of
                ],
            }
        )
    return out


def _charts(run: Run) -> list[charts.Chart]:
    rows = run.log_rows()

    def of(key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in rows if row.get(key) is not None and "step" in row]

    drawn = [
        charts.curves(
            "Loss", [charts.Curve("training", of("loss")), charts.Curve("held out", of("held_out_loss"), True)]
        ),
        charts.curves("Learning rate", [charts.Curve("learning rate", of("learning_rate"))], from_zero=True),
        charts.curves(
            "Tokens per second", [charts.Curve("tokens per second", of("tokens_per_second"))], from_zero=True
        ),
    ]
    return [chart for chart in drawn if chart is not None]


def _answers(run: Run) -> dict[str, Any]:
    """Answers before and after side by side, and those that are still wrong."""
    before, after = (
        {row["item"]: row for row in _jsonl(run.folder / "eval" / f"{side}.jsonl")} for side in ("before", "after")
    )
    items = list(after or before)
    pairs = [_pair(item, before.get(item), after.get(item)) for item in _mixed(items, after or before)]
    wrong = [item for item in after if after[item].get("executed") is False]
    return {
        "pairs": pairs,
        "graded": any("executed" in row for row in (after or before).values()),
        "wrong": [_pair(item, before.get(item), after[item]) for item in wrong[:WRONG]],
        "wrong_count": len(wrong),
        "graded_count": sum("executed" in row for row in after.values()),
    }


def _mixed(items: list[str], rows: Mapping[str, Any]) -> list[str]:
    """Some of each kind: fixed prompts all, then by turns one of each type and language, in the items' order."""
    groups: dict[tuple[str, str], list[str]] = {}
    for item in items:
        groups.setdefault((rows[item]["type"], rows[item].get("language", "")), []).append(item)
    chosen = [item for (kind, _), group in groups.items() if kind == "prompt" for item in group]
    rest = [group for (kind, _), group in groups.items() if kind != "prompt"]
    for place in range(SHOWN):
        chosen += [group[place] for group in rest if place < len(group) and len(chosen) < SHOWN]
    return chosen[: max(SHOWN, sum(kind == "prompt" for kind, _ in groups))]


def _pair(item: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, Any]:
    row = after or before or {}
    return {
        "item": item,
        "kind": " ".join(part for part in (row["type"].replace("_", " "), row.get("language", "")) if part),
        "messages": row["messages"],
        "expected": row.get("expected"),
        "sides": [
            {
                "side": side,
                "answer": of["answer"],
                "stopped": of["stopped"],
                "tokens": of["tokens"],
                "right": of.get("executed"),
                "problem": of.get("problem", ""),
            }
            for side, of in (("before", before), ("after", after))
            if of is not None
        ],
    }


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []


def _masks(run: Run) -> dict[str, Any] | None:
    """The rows of masks.html with their style, to stand inside this page."""
    from markupsafe import Markup

    path = run.folder / "masks.html"
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    rows = re.search(r'<div class="tl-head">.*</div>', text, re.S)
    if rows is None:
        return None
    own = "".join(re.findall(r"(?:@media[^{]*\{(?:\.tl-[^{}]*\{[^{}]*\})+\}|\.tl-[^{}]*\{[^{}]*\})", style))
    return {"style": Markup(own), "rows": Markup(rows[0])}


def _data(run: Run) -> dict[str, Any] | None:
    """Rows in = used + held out + dropped, with the reasons; None before the data was read."""
    told = run.read_json("data.json")
    if not told:
        return None
    side = told["train"]
    dropped = side.get("dropped", {})
    held = side.get("held_out", 0)
    used = side["rows_in"] - held - sum(dropped.values())
    return {
        "sources": side["sources"],
        "rows_in": side["rows_in"],
        "used": used,
        "held_out": held,
        "dropped": dropped,
        "dropped_count": sum(dropped.values()),
        "rows": side.get("rows", used),
        "tokens": side.get("tokens"),
        "trained_tokens": side.get("trained_tokens"),
        "formats": side.get("formats", {}),
        "sha256": side.get("sha256", {}),
        "eval_rows": told.get("eval", {}).get("rows", 0),
        "eval_how": told.get("eval", {}).get("how", ""),
        "max_length": told.get("max_length"),
        "findings": told.get("findings", {}),
        "first_findings": told.get("first_findings", []),
    }


def _spent(run: Run) -> dict[str, Any]:
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
    }


def _recipe(run: Run, recipe: Recipe) -> dict[str, list[dict[str, str]]]:
    origins = run.origins()
    rows = [
        {"key": key, "value": inline(value), "origin": origins.get(key, "default")}
        for key, value in values(recipe).items()
    ]
    return {
        "chosen": [row for row in rows if row["origin"] != "default"],
        "defaults": [row for row in rows if row["origin"] == "default"],
    }


def _environment(run: Run) -> list[tuple[str, str]]:
    env = run.read_json("env.json", {})
    choice = env.get("choice") or {}
    reasons = choice.get("reasons", {})
    rows = [
        (key, f"{choice[key]} ({reasons[key]})" if reasons.get(key) else str(choice[key]))
        for key in ("device", "dtype", "threads")
        if key in choice
    ]
    place, cores = env.get("platform", {}), env.get("cores", {})
    rows += [
        ("processor", f"{env.get('cpu', '?')}, {cores.get('usable', '?')} of {cores.get('logical', '?')} cores usable"),
        ("memory", f"{env['memory_mb'] / 1000:.1f} GB" if env.get("memory_mb") else "not known"),
        ("system", " ".join(str(place.get(key, "")) for key in ("system", "release", "machine"))),
        ("python", env.get("python", "?")),
    ]
    return rows + sorted(env.get("packages", {}).items())


def _sentence(run: Run, recipe: Recipe) -> str:
    data, plan = run.read_json("data.json"), (run.read_json("plan.json", {}).get("actual") or {})
    steps = max((row["step"] for row in run.log_rows() if "step" in row), default=0)
    how = {"sft": "Supervised fine-tuning", "pretrain": "First training"}.get(recipe.method.name, recipe.method.name)
    adapter = (
        "" if recipe.adapter.kind == "none" else f" with {recipe.adapter.kind.upper()} of rank {recipe.adapter.rank}"
    )
    said = f"{how}{adapter} of {recipe.model.path or 'a model from random weights'}"
    if data:
        said += f" on {data['train'].get('rows', 0):,} rows of {', '.join(data['train']['sources'])}"
    said += f": {steps:,} steps"
    if plan.get("seconds"):
        said += f" in {duration(plan['seconds'])}"
    return said + "."


def _next(run: Run, recipe: Recipe, after: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(why, command) that fit what was done."""
    folder = str(run.folder)
    if run.status != "finished" and run.model_folder() is None:
        return [("Go on where it stopped", f"tunelet train --resume {folder}")]
    own = [source for source in recipe.data.train if source != "starter"]
    out = [("Talk with it", f"tunelet chat {folder}")]
    if not own:
        out.append(
            (
                "Do the same with your own model and data",
                "tunelet recipe init --data my-chats.jsonl --out my.toml\ntunelet align my.toml",
            )
        )
    else:
        out.append(
            (
                "See which tokens of a row were trained",
                f"tunelet data mask {own[0]} --model {recipe.model.path or folder} --row 3",
            )
        )
    if not after and recipe.method.name != "pretrain":
        out.append(("Measure it", f"tunelet eval {folder} --task held_out --data HELD_OUT.jsonl"))
    rate = after.get("stop_rate")
    if rate and rate["value"] < 0.99:
        out.append(
            (
                "Some answers do not end: train longer",
                f"tunelet align {folder}/recipe.toml --set train.max_steps={_steps(run) * 2} --out OTHER",
            )
        )
    losses = [row["held_out_loss"] for row in run.log_rows() if row.get("held_out_loss") is not None]
    if len(losses) > 2 and losses[-1] > 1.02 * min(losses):
        out.append(
            (
                "The held-out loss rose again: stop earlier",
                f"tunelet align {folder}/recipe.toml --set train.early_stopping=2 --out OTHER",
            )
        )
    out.append(("Answer a file of prompts", f"tunelet generate {folder} --prompts prompts.txt --out answers.jsonl"))
    return out


def _steps(run: Run) -> int:
    return max((row["step"] for row in run.log_rows() if "step" in row), default=1)


def duration(seconds: float) -> str:
    """3 h 04 min, 4 min 05 s, or 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"

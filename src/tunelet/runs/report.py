"""report.html: one file that shows what a run did, without network and without script. Reads the run folder, writes
the page.

Not for measuring (evals/) and not for drawing (charts.py; the layout is report.html.j2). Any run has a page, also a
failed or unfinished one: what is missing is left out, or said. Its parts: report_words.py, report_sides.py (metrics and
answers), report_gate.py, report_preference.py,
report_spent.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunelet import __version__
from tunelet.recipe import WANTS, Recipe
from tunelet.recipe_io import values
from tunelet.recipe_text import inline
from tunelet.runs import charts, report_gate, report_preference, report_sides, report_spent, report_words
from tunelet.runs.record import STAGES, Run
from tunelet.runs.templates import template

NAME = "report.html"


def write(run: Run) -> Path:
    """Write the run's report.html (again) and return its path."""
    return run.write_text(NAME, html(run))


def html(run: Run) -> str:
    """The page as text."""
    recipe, stages = run.recipe(), report_sides.earlier(run)
    sides = report_sides.sides(run, stages)
    after = next((side.metrics for side in sides if side.key == "after"), {})
    return template("report.html.j2").render(
        run=run,
        name=recipe.name,
        status=run.status,
        version=__version__,
        said=report_words.sentence(run, recipe, stages),
        stages=_stages(run, stages),
        failed=run.read_json("FAILED.json"),
        cards=report_sides.cards(sides, recipe.method.name),
        sides=sides,
        metrics=report_sides.metrics(sides),
        gate=report_gate.gate(run, stages[0] if stages else run),
        happened=report_preference.happened(run, recipe),
        charts=_charts(run),
        answers=report_sides.answers(sides),
        masks=_masks(run),
        paired=WANTS[recipe.method.name] == "preference",
        data=_data(run),
        spent=report_spent.spent(run, stages),
        recipe=_recipe(run, recipe),
        environment=_environment(run),
        next=report_words.following(run, recipe, stages, after),
        number=charts.number,
    )


# -- what stands on the page ------------------------------------------------------------------------------------------


def _stages(run: Run, stages: Sequence[Run]) -> list[tuple[str, str]]:
    """(name, link) of the pages of earlier stages, or of the whole that this run is a stage of."""
    if run.folder.resolve().parent.name == STAGES:
        return [("the whole alignment, of which this is a stage", f"../../{NAME}")]
    names = [f"stage {number}: {report_words.named(one)}" for number, one in enumerate(stages, 1)]
    return [(name, report_sides.link(run, one)) for name, one in zip(names, stages, strict=True)]


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

"""sweep.html: the cells of a sweep as a table and as a plot of quality against size and time; one file, no network, no
script. Also the table's words for the terminal.

Not for running cells or judging them (sweep.py). Reads only what sweep.json holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from tunelet import __version__
from tunelet.recipe_text import inline
from tunelet.runs import charts
from tunelet.runs.files import disk, write_atomically
from tunelet.runs.report_words import duration
from tunelet.runs.templates import template

NAME = "sweep.html"
HEIGHT = 240  # px, of a panel
WIDTHS = (250, 400)  # px, of a panel on a phone and on a desk: labels are placed so that they are free in both
APART = 11  # px between dots that would lie on each other
COLOURS = 6
LETTER, LINE = 7, 13  # px, at most: of a letter and of a line of a label
LONGEST = 14  # letters of a label; longer ones become the number of the table's row

Told = Mapping[str, Any]


def write(told: Told, folder: Path) -> Path:
    """Write the page of a sweep into its folder, and return its path."""
    path = folder / NAME
    with disk(path):
        write_atomically(path, html(told, folder.resolve().name))
    return path


def html(told: Told, name: str) -> str:
    """The page as text. told: what sweep.json holds."""
    columns, rows = table(told)
    done = sum(one["state"] == "finished" for one in told["cells"])
    return template("sweep.html.j2").render(
        name=name,
        version=__version__,
        cells=len(told["cells"]),
        done=done,
        dimensions={key: ", ".join(of) for key, of in told["dimensions"].items()},
        columns=columns,
        rows=rows,
        links=[f"{one['folder']}/report.html" if one["state"] == "finished" else "" for one in told["cells"]],
        why=[one["why"] for one in told["cells"]],
        states=[one["state"] for one in told["cells"]],
        marks=[mark.kind for mark in _marks(told)],
        plots=[plot for plot in (_plot(told, metric, title) for metric, title in told["metrics"].items()) if plot],
        verdicts=told["verdicts"],
        notes=told["notes"],
    )


# -- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """title; number: whether its cells stand right."""

    title: str
    number: bool = True


def table(told: Told) -> tuple[list[Column], list[list[tuple[str, str]]]]:
    """(columns, rows): every cell of a row is its text and "best", "tied" or ""."""
    metrics, keys = told.get("metrics", {}), list(told["dimensions"])
    marks = {(of["metric"], name): mark for of in told.get("verdicts", []) if of["best"]
             for mark, names in (("best", [of["best"]]), ("tied", of["tied"])) for name in names}  # fmt: skip
    columns = [Column("cell", False), *(Column(key.partition(".")[2] or key, False) for key in keys)]
    columns += [Column(title) for title in metrics.values()]
    columns += [Column(title) for title in ("trained", "size", "training", "memory")]
    rows = []
    for one in told["cells"]:
        row = [(one["name"], ""), *((said(one["varied"].get(key, "-")), "") for key in keys)]
        figures = one["figures"]
        if figures is None:
            state = one["state"]
            row += [(state if not place else "", "") for place in range(len(metrics) + 4)]
            rows.append(row)
            continue
        for metric in metrics:
            figure = figures["metrics"].get(metric)
            row.append((shown(metric, figure), marks.get((metric, one["name"]), "")))
        row += [
            (f"{figures['trained']:,} ({100 * figures['share']:.3g} %)" if figures["trained"] else "-", ""),
            (size(figures["size_mb"]), ""),
            (duration(figures["training_seconds"]), ""),
            (f"{figures['peak_mb']:,.0f} MB" if figures["peak_mb"] else "-", ""),
        ]
        rows.append(row)
    return columns, rows


def said(value: Any) -> str:
    """A varied value as people read it."""
    if isinstance(value, list):
        return ", ".join(map(said, value)) or "(default)"
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else inline(value)


def shown(metric: str, figure: Mapping[str, Any] | None) -> str:
    """A figure with its 95 % interval."""
    if figure is None:
        return "-"
    parts = [number(metric, figure[key]) for key in ("value", "low", "high")]
    return f"{parts[0]} ({parts[1].rstrip(' %')}–{parts[2].rstrip(' %')})"


def number(metric: str, value: float) -> str:
    return f"{value:.3f}" if metric.endswith("loss") else f"{100 * value:.1f} %"


def size(mb: float | None) -> str:
    if mb is None:
        return "-"
    return f"{mb:,.1f} MB" if mb >= 1 else f"{1000 * mb:,.0f} kB"


# -- the plot ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mark:
    """How a cell is drawn: its colour's class, and what stands beside its dot."""

    kind: str
    label: str


@dataclass(frozen=True)
class Panel:
    """svg fills the panel's box, ticks are (text, per cent from the left)."""

    title: str
    svg: Markup
    x_ticks: list[tuple[str, float]]


@dataclass(frozen=True)
class Plot:
    """Panels over one y axis; y_ticks: (text, per cent from the bottom). legend: (class, words); labels: what stands
    beside the dots."""

    title: str
    y_ticks: list[tuple[str, float]]
    panels: list[Panel]
    legend: list[tuple[str, str]]
    labels: str


def _grouped(told: Told) -> str:
    """The dimension that colours tell apart: the kind of adapter, else the first."""
    return "adapter.kind" if "adapter.kind" in told["dimensions"] else next(iter(told["dimensions"]))


def _marks(told: Told) -> list[Mark]:
    key = _grouped(told)
    groups = list(dict.fromkeys(said(one["varied"].get(key, "")) for one in told["cells"] if not _full(one)))
    rest = [other for other in told["dimensions"] if other != key]
    labels = ["/".join(said(one["varied"][of]) for of in rest if of in one["varied"]) for one in told["cells"]]
    if max(map(len, labels)) > LONGEST:
        labels = [f"#{row}" for row in range(1, len(labels) + 1)]
    kinds = ["full" if _full(one) else f"c{groups.index(said(one['varied'].get(key, ''))) % COLOURS}"
             for one in told["cells"]]  # fmt: skip
    return [Mark(kind, label) for kind, label in zip(kinds, labels, strict=True)]


def _full(one: Told) -> bool:
    """The kind of adapter varies, or would: this cell tunes all weights."""
    return one["varied"].get("adapter.kind") == "none"


def _plot(told: Told, metric: str, title: str) -> Plot | None:
    key, marks = _grouped(told), _marks(told)
    drawn = [(one, mark) for one, mark in zip(told["cells"], marks, strict=True)
             if one["figures"] and one["figures"]["trained"] and metric in one["figures"]["metrics"]]  # fmt: skip
    if not drawn:
        return None
    figures = [one["figures"]["metrics"][metric] for one, _ in drawn]
    ticks = charts.ticks(min(of["low"] for of in figures), max(of["high"] for of in figures))
    panels = []
    for words, what in (("trained parameters", "trained"), ("time of training", "training_seconds")):
        xs = [float(one["figures"][what]) for one, _ in drawn]
        low, high, x_ticks = _log_axis(xs) if what == "trained" else _time_axis(xs)
        places = [charts.share(_log(x) if what == "trained" else x, low, high) for x in xs]
        dots = [
            Dot(place, *(_y(of[side], ticks) for side in ("value", "low", "high")), mark,
                f"{one['name']}: {shown(metric, of)}, {words}: {_x_said(what, x)}")
            for (one, mark), of, place, x in zip(drawn, figures, places, xs, strict=True)
        ]  # fmt: skip
        panels.append(Panel(words, _svg(f"{title} by {words}", dots, ticks, x_ticks), x_ticks))
    words = {
        mark.kind: "all weights" if mark.kind == "full" else said(one["varied"].get(key, "")) for one, mark in drawn
    }
    rest = [other for other in told["dimensions"] if other != key]
    numbered = any(mark.label.startswith("#") for _, mark in drawn)
    labels = "row of the table" if numbered else " / ".join(other.partition(".")[2] or other for other in rest)
    at = [(_percent(metric, tick), charts.share(tick, ticks[0], ticks[-1])) for tick in ticks]
    return Plot(title, at, panels, list(words.items()), labels)


def _percent(metric: str, tick: float) -> str:
    return charts.number(tick) if metric.endswith("loss") else f"{charts.number(round(100 * tick, 6))} %"


def _x_said(what: str, x: float) -> str:
    return f"{x:,.0f}" if what == "trained" else duration(x)


def _y(value: float, ticks: Sequence[float]) -> float:
    """px from the top"""
    return HEIGHT * (1 - charts.share(value, ticks[0], ticks[-1]) / 100)


def _log(x: float) -> float:
    return math.log10(max(x, 1.0))


def _log_axis(xs: Sequence[float]) -> tuple[float, float, list[tuple[str, float]]]:
    """(low, high) as powers of ten with room at both ends, and ticks at round numbers."""
    low, high = _log(min(xs)), _log(max(xs))
    room = max(0.12 * (high - low), 0.15)
    low, high = low - room, high + room
    fine = high - low < 2.5
    found = [factor * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1)
             for factor in ((1, 2, 5) if fine and high - low < 1.5 else (1, 3) if fine else (1,))]  # fmt: skip
    inside = [x for x in found if low <= _log(x) <= high and x >= 1]
    return low, high, [(_thousands(x), charts.share(_log(x), low, high)) for x in inside]


def _thousands(x: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= unit:
            return f"{x / unit:g}{name}"
    return f"{x:g}"


def _time_axis(xs: Sequence[float]) -> tuple[float, float, list[tuple[str, float]]]:
    """From 0, with room at the right end, in seconds, minutes or hours."""
    most = max(max(xs), 1e-3)
    unit, name = next((of for of in ((3600.0, "h"), (60.0, "min")) if most >= 2 * of[0]), (1.0, "s"))
    high = 1.12 * most
    found = [x for x in charts.ticks(0.0, most / unit, 4) if x * unit <= high]
    return 0.0, high, [(f"{charts.number(x)} {name}", charts.share(x * unit, 0.0, high)) for x in found]


@dataclass(frozen=True)
class Dot:
    """x in per cent of the width; y, low and high (the interval) in px from the top."""

    x: float
    y: float
    low: float
    high: float
    mark: Mark
    spoken: str


def _svg(title: str, dots: Sequence[Dot], ticks: Sequence[float], x_ticks: Sequence[tuple[str, float]]) -> Markup:
    """x runs in per cent of the width, y in px, so that dots stay round and text stays of its own size."""
    grid = [f'<line class="grid" x1="0" x2="100%" y1="{_y(y, ticks):.1f}" y2="{_y(y, ticks):.1f}"/>' for y in ticks]
    grid += [f'<line class="grid" x1="{at:.2f}%" x2="{at:.2f}%" y1="0" y2="{HEIGHT}"/>' for _, at in x_ticks]
    out = []
    shifts = _shifts([dot.x for dot in dots])
    for dot, shift, (dx, dy, anchor) in zip(dots, shifts, _labels(dots, shifts), strict=True):
        out.append(
            f'<svg x="{dot.x:.2f}%" class="{dot.mark.kind}"><title>{escape(dot.spoken)}</title>'
            f'<line x1="{shift:.1f}" x2="{shift:.1f}" y1="{dot.low:.1f}" y2="{dot.high:.1f}"/>'
            f'<circle cx="{shift:.1f}" cy="{dot.y:.1f}" r="4.5"/>'
            f'<text x="{shift + dx:.1f}" y="{dot.y + dy:.1f}" text-anchor="{anchor}">{escape(dot.mark.label)}</text>'
            "</svg>"
        )
    said_of = "; ".join(dot.spoken for dot in dots)
    return Markup('<svg class="dots" width="100%" height="{}" role="img" aria-label="{}: {}">{}</svg>').format(
        HEIGHT, title, said_of, Markup("".join([*grid, *out]))
    )


def _shifts(xs: Sequence[float]) -> list[float]:
    """px to the right for each dot, so that none lies on another on a phone: neighbours are moved apart evenly."""
    order = sorted(range(len(xs)), key=lambda at: xs[at])
    out, at = [0.0] * len(xs), 0
    while at < len(order):
        group = [order[at]]
        while at + len(group) < len(order) and _near(xs[group[-1]], xs[order[at + len(group)]]):
            group.append(order[at + len(group)])
        middle = sum(xs[one] for one in group) / len(group) * WIDTHS[0] / 100
        for place, one in enumerate(group):
            if len(group) > 1:
                out[one] = middle + (place - (len(group) - 1) / 2) * APART - xs[one] * WIDTHS[0] / 100
        at += len(group)
    return out


def _near(a: float, b: float) -> bool:
    return (b - a) * WIDTHS[0] / 100 < APART


PLACES = [(8, 4, "start"), (-8, 4, "end"), (7, -8, "start"), (7, 16, "start"), (-7, -8, "end"), (-7, 16, "end")]
PLACES += [(0, -10 - 4 * step, "middle") for step in range(30)] + [(0, 20 + 4 * step, "middle") for step in range(30)]

Box = tuple[float, float, float, float]


def _labels(dots: Sequence[Dot], shifts: Sequence[float]) -> list[tuple[float, float, str]]:
    """(dx, dy, anchor) of each dot's label: the first of PLACES where it covers no dot, interval or label, at both
    widths; where none is free, the one that covers least."""
    placed: list[tuple[int, tuple[float, float, str]]] = []
    for at, dot in enumerate(dots):
        width = LETTER * len(dot.mark.label)

        def cost(place: tuple[float, float, str], at: int = at) -> float:
            total = abs(place[1]) / 1000.0
            for panel in WIDTHS:
                box = _box(dots[at], shifts[at], place, panel)
                solid = [
                    rest for other, shift in zip(dots, shifts, strict=True) for rest in _solid(other, shift, panel)
                ]
                solid += [_box(dots[other], shifts[other], where, panel) for other, where in placed]
                total += sum(_covers(box, other) for other in solid)
                outside = box[0] < 0 or box[1] > panel or box[2] < -4 or box[3] > HEIGHT + 4
                total += 5.0 * outside
            return total

        placed.append((at, min(PLACES, key=cost) if width else PLACES[0]))
    return [place for _, place in placed]


def _box(dot: Dot, shift: float, place: tuple[float, float, str], panel: float) -> Box:
    """(left, right, top, bottom) of a label, px"""
    width = LETTER * len(dot.mark.label)
    x = dot.x * panel / 100 + shift + place[0]
    left = x - {"start": 0.0, "middle": width / 2, "end": width}[place[2]]
    y = dot.y + place[1]
    return left, left + width, y - LINE + 3, y + 3


def _solid(dot: Dot, shift: float, panel: float) -> list[Box]:
    x = dot.x * panel / 100 + shift
    return [(x - 5, x + 5, dot.y - 5, dot.y + 5), (x - 1.5, x + 1.5, dot.high, dot.low)]


def _covers(a: Box, b: Box) -> bool:
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]

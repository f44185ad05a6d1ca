"""Charts of the report as inline SVG and plain numbers: dot-and-whisker rows and curves that stay sharp at any width.

Not for finding the figures (report.py). No script and no viewBox for text: what is text stays text of its own size
on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

POINTS = 400  # a curve has at most so many; more cannot be told apart on paper

Point = tuple[float, float]


def whiskers(name: str, sides: Sequence[tuple[str, str, Mapping[str, Any] | None]]) -> Markup:
    """One metric between 0 and 1, a row for each of `sides` (class, title, figure or None): a dot with its interval.
    x runs in per cent of the width.
    """
    height, out = 4 + 14 * len(sides), []
    for place, (kind, _, figure) in enumerate(sides):
        if figure is None:
            continue
        low, value, high = (100 * min(1.0, max(0.0, figure[key])) for key in ("low", "value", "high"))
        y = 9 + 14 * place
        out.append(
            f'<line class="{kind}" x1="{low:.2f}%" x2="{high:.2f}%" y1="{y}" y2="{y}"/>'
            f'<circle class="{kind}" cx="{value:.2f}%" cy="{y}" r="5"/>'
        )
    grid = "".join(f'<line class="grid" x1="{x}%" x2="{x}%" y1="0" y2="{height}"/>' for x in (0, 25, 50, 75, 100))
    said = ", ".join(
        f"{title} {figure['value']:.1%} ({figure['low']:.1%} to {figure['high']:.1%})"
        for _, title, figure in sides
        if figure is not None
    )
    return Markup('<svg class="whiskers" width="100%" height="{}" role="img" aria-label="{}: {}">{}</svg>').format(
        height, name, said, Markup(grid + "".join(out))
    )


@dataclass(frozen=True)
class Curve:
    """A line of a chart; `dots` marks its points (few, far apart)."""

    name: str
    points: Sequence[Point]
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A place on the x axis at which something was said; kind is its class ("warn" or "stop")."""

    x: float
    kind: str
    text: str


@dataclass(frozen=True)
class Chart:
    """A drawn chart: `svg` fills the plot's box, ticks are (text, per cent from the left or the bottom). marks: kinds
    of the marks in it."""

    title: str
    svg: Markup
    x_ticks: list[tuple[str, float]]
    y_ticks: list[tuple[str, float]]
    names: list[str]
    marks: list[str]


def curves(title: str, lines: Sequence[Curve], *, from_zero: bool = False, marks: Sequence[Mark] = ()) -> Chart | None:
    """Lines over the same axes; None where none of them has two points to join or one dot to show."""
    lines = [Curve(line.name, thin(line.points), line.dots) for line in lines]
    lines = [line for line in lines if len(line.points) > (0 if line.dots else 1)]
    if not lines:
        return None
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks = ticks(min(0.0, *xs), max(xs))
    y_ticks = ticks(0.0 if from_zero else min(ys), max(ys))
    left, right = min(0.0, *xs), max(*xs, left_of(xs))
    bottom, top = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)
    marks = [mark for mark in marks if left <= mark.x <= right]
    spoken_of = [spoken(line) for line in lines] + [f"at step {number(mark.x)}: {mark.text}" for mark in marks]
    drawn = ['<svg class="plot" viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="']
    drawn.append(str(escape(f"{title}: {'; '.join(spoken_of)}")) + '">')
    for y in y_ticks:
        at = 100 - share(y, bottom, top)
        drawn.append(f'<line class="grid" x1="0" x2="100" y1="{at:.2f}" y2="{at:.2f}"/>')
    for mark in marks:
        at, text = f"{share(mark.x, left, right):.2f}", escape(mark.text)
        drawn.append(f'<line class="mark {mark.kind}" x1="{at}" x2="{at}" y1="0" y2="100"><title>{text}</title></line>')
    for place, line in enumerate(lines):
        places = [(share(x, left, right), 100 - share(y, bottom, top)) for x, y in line.points]
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
        drawn.append(f'<polyline class="line line{place}" points="{path}"/>')
        if line.dots:  # a line of no length with round ends: a dot that keeps its shape when the box is stretched
            drawn += [
                f'<line class="dot line{place}" x1="{x:.2f}" x2="{x:.2f}" y1="{y:.2f}" y2="{y:.2f}"/>'
                for x, y in places
            ]
    drawn.append("</svg>")
    return Chart(
        title,
        Markup("".join(drawn)),
        [(number(x), share(x, left, right)) for x in x_ticks if left <= x <= right],
        [(number(y), share(y, bottom, top)) for y in y_ticks],
        [line.name for line in lines],
        list(dict.fromkeys(mark.kind for mark in marks)),
    )


def left_of(xs: Sequence[float]) -> float:
    """A right end for the axis where all points stand at 0."""
    return 1.0 if max(xs) <= 0 else max(xs)


def spoken(line: Curve) -> str:
    (_, first), (x, last) = line.points[0], line.points[-1]
    return f"{line.name} from {number(first)} to {number(last)} at step {number(x)}"


def share(value: float, low: float, high: float) -> float:
    """Where `value` stands between low and high, in per cent."""
    return 100 * (value - low) / (high - low) if high > low else 50.0


def thin(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """At most `most` points: neighbours are averaged; the first and the last stay themselves."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(points) <= most:
        return points
    inner = points[1:-1]
    size = math.ceil(len(inner) / (most - 2))
    groups = [inner[at : at + size] for at in range(0, len(inner), size)]
    means = [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
    return [points[0], *means, points[-1]]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from at most `low` to about `high`: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        low, high = (low - abs(low) * 0.1, low + abs(low) * 0.1) if low else (0.0, 1.0)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, last + 1)]


def number(value: float) -> str:
    """1,200 or 0.25 or 3e-5: no digits that say nothing."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.4g}"

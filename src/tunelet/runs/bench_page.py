"""bench.html: how fast a model is answered with, by engine and number of clients; one file, no network, no script.

Not for measuring (infer/bench.py). Reads only what bench.json holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunelet import __version__
from tunelet.runs import charts
from tunelet.runs.files import disk, write_atomically
from tunelet.runs.templates import template

NAME = "bench.html"
COLUMNS = ("", "load, CPU s", "memory, MB", "first token, ms")


def write(told: Mapping[str, Any], folder: Path) -> Path:
    """Write the page into a folder, and return its path."""
    path = folder / NAME
    with disk(path):
        write_atomically(path, html(told))
    return path


def html(told: Mapping[str, Any]) -> str:
    """The page as text. told: what bench.run returns."""
    lines = [
        charts.Curve(_name(case), [(row["clients"], row["tokens_per_second"]) for row in case["clients"]], dots=True)
        for case in told["cases"]
    ]
    columns, rows = table(told)
    return template("bench.html.j2").render(
        model=told["model"],
        version=__version__,
        machine=told["machine"],
        memory=told["memory_bytes_per_second"] / 1e9,
        prompt=told["prompt"],
        answer=told["answer"],
        columns=columns,
        rows=rows,
        chart=charts.curves("tokens a second, all clients together", lines, from_zero=True),
    )


def table(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(titles of the columns, cells of the rows), also for the terminal."""
    clients = [row["clients"] for row in told["cases"][0]["clients"]] if told["cases"] else []
    columns = [*COLUMNS, *(f"{n} at once, tokens/s" for n in clients), "most alone"]
    rows = [
        [
            _name(case),
            f"{case['load']['cpu_seconds']:.1f}",
            "?" if case["peak_mb"] is None else f"{case['peak_mb']:.0f}",
            f"{1000 * case['first_token_seconds']:.0f}",
            *(f"{row['tokens_per_second']:.0f}" for row in case["clients"]),
            f"{case['most_alone']:.0f}",
        ]
        for case in told["cases"]
    ]
    return columns, rows


def _name(case: Mapping[str, Any]) -> str:
    return f"{case['engine']} {case['quant']}"

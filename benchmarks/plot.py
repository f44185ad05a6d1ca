"""`python -m benchmarks plot`: pictures of the results in docs/benchmarks, for docs/benchmarks.md."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.process import show
from tunelet.errors import TuneletError

COLOURS = {"tunelet": "#0b6e4f", "tunelet-unshared": "#7fb8a4", "trl-default": "#9aa5b1", "trl-best": "#5b6b7b"}
SMALL = {"dpi": 110, "bbox_inches": "tight", "metadata": {"Software": None}}


def run(options: Namespace) -> int:
    """The verb: writes step.png and ladder.png, each where it has results. Raises TuneletError where there are none."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TuneletError("matplotlib is not installed.", fix="make install-parity")
    import matplotlib

    matplotlib.use("Agg")
    results = Path(options.results)
    every = [report.load(file) for file in sorted(results.glob("*.json"))]
    trains = [one for one in every if one["benchmark"] == "train" and one["peer"] and one["device"] == "cpu"]
    rungs = [rung for one in every if one["benchmark"] == "ladder" for rung in one["rungs"]]
    if not trains and not rungs:
        raise TuneletError(
            f"There are no results in {results}.",
            fix=f"python -m benchmarks train --peer trl --json {results / 'sft-long.json'}",
        )
    for name, made, content in (("step.png", step, trains), ("ladder.png", ladder, rungs)):
        if content:
            made(content, results / name)
            show(str(results / name))
    return 0


def _maker(content: dict[str, Any]) -> str:
    """The CPU's name, as short as it can be told apart."""
    return " ".join(content["machine"]["cpu"].replace("(R)", "").split()[:2])


def step(trains: list[dict[str, Any]], path: Path) -> None:
    """Two rows of bars: rate and peak of memory of every contestant, a group for each results file."""
    from matplotlib import pyplot as plt

    trains = sorted(
        trains, key=lambda one: (one["machine"]["cpu"], one["method"] != "sft", one["work"]["rows"], one["work"]["set"])
    )
    shown: set[str] = set()
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.9 + 1.05 * len(trains)), sharey=True)
    labels = []
    for at, content in enumerate(trains):
        names = list(content["contestants"])
        compiled = ", compiled" if "train.compile=true" in content["work"]["set"] else ""
        labels.append(
            f"{report.METHODS[content['method']]}\n{content['work']['rows']} rows{compiled}\n{_maker(content)}"
        )
        for place, name in enumerate(names):
            got, y = content["contestants"][name], at + (place - (len(names) - 1) / 2) * 0.27
            label = None if name in shown else report.NAMES[name]
            shown.add(name)
            rate, share, gb = got["tokens_per_cpu_second"], 100 * got["gemm_fraction"], got["peak_mb"] / 1000
            axes[0].barh(y, rate, 0.25, color=COLOURS[name], label=label)
            axes[0].text(rate, y, f" {rate:,.0f} ({share:.0f} %)", va="center", fontsize=8)
            axes[1].barh(y, gb, 0.25, color=COLOURS[name])
            axes[1].text(gb, y, f" {gb:.1f}", va="center", fontsize=8)
    axes[0].set_yticks(range(len(trains)), labels, fontsize=9)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("tokens per CPU-second (% of the bf16 product's peak)")
    axes[1].set_xlabel("peak of memory, GB")
    for axis in axes:
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(*axes[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.suptitle(
        f"One step of the {trains[0]['work']['shape']} shape, {trains[0]['threads']} thread(s)", fontsize=11
    )
    figure.savefig(path, **SMALL)
    plt.close(figure)


def ladder(rungs: list[dict[str, Any]], path: Path) -> None:
    """Rate against parameters and peak of memory against parameters, a line for each way to train on long rows."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    from benchmarks import shapes

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    rungs = [rung for rung in rungs if rung["rows"] == "long" and rung["batch_size"] == 8] or rungs
    for mode in dict.fromkeys(rung["mode"] for rung in rungs):
        points = sorted(
            (shapes.parameters(rung["shape"])["total"] / 1e6, rung["tokens_per_cpu_second"], rung["peak_mb"] / 1000)
            for rung in rungs
            if rung["mode"] == mode
        )
        x, rate, gb = zip(*points, strict=True)
        axes[0].loglog(x, rate, "o-", label=mode)
        axes[1].loglog(x, gb, "o-", label=mode)
    sizes = {shapes.parameters(rung["shape"])["total"] / 1e6: rung["shape"] for rung in rungs}
    for axis, label in zip(axes, ("tokens per CPU-second", "peak of memory, GB"), strict=True):
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_xticks(list(sizes), list(sizes.values()))
        axis.set_xlabel("parameters")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=8, fontsize=9, frameon=False)
    figure.savefig(path, **SMALL)
    plt.close(figure)

"""`python -m benchmarks report`: the tables of docs/benchmarks.md, made again from the JSON files beside it. No figure
in that page is typed by hand.

A table stands between two marks, which stay: <!-- train: a.json b.json -->, <!-- ladder: ladder.json -->,
<!-- settings: a.json --> or <!-- serve: a.json -->, and <!-- end -->. Files are of docs/benchmarks/; of one that is not
there yet it is said so.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import process
from benchmarks.process import show
from tunelet.errors import TuneletError

PAGE = process.ROOT / "docs" / "benchmarks.md"
RESULTS = process.ROOT / "docs" / "benchmarks"
BLOCK = re.compile(r"(<!-- (train|ladder|settings|serve): ([\w. -]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {"tunelet": "tunelet", "trl-default": "TRL, its defaults", "trl-best": "TRL, best CPU settings"}
NAMES["tunelet-unshared"] = "tunelet, prompts read twice"


def run(options: Namespace) -> int:
    """The verb. With options.check nothing is written, and the exit code is 1 where the page is not up to date."""
    page, results = Path(options.page), Path(options.results)
    try:
        old = page.read_text(encoding="utf-8")
    except OSError as error:
        raise TuneletError(f"{page} cannot be read.", why=str(error), fix="Name the page: --page FILE") from error
    new = fill(old, results)
    if options.check:
        show(f"{page} is {'up to date' if new == old else 'not up to date: python -m benchmarks report'}")
        return 0 if new == old else 1
    page.write_text(new, encoding="utf-8")
    show(f"{page}: {len(BLOCK.findall(old))} tables")
    return 0


def fill(text: str, results: Path) -> str:
    """`text` with every table between marks made again."""

    def block(found: re.Match[str]) -> str:
        tables = {"train": train_table, "ladder": ladder_table, "settings": settings_table, "serve": serve_table}
        made = tables[found[2]]
        files = [results / name for name in found[3].split()]
        here = [(file.name, load(file)) for file in files if file.exists()]
        missing = [f"`{file.name}` has not been measured yet." for file in files if not file.exists()]
        parts = [made(here)] if here else []
        return found[1] + "\n" + "\n\n".join([*parts, *missing]) + "\n\n" + found[4]

    return BLOCK.sub(block, text)


def load(file: Path) -> dict[str, Any]:
    """A results file. Raises TuneletError where it is not one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.get("benchmark") in ("train", "ladder", "settings", "serve"):
            return content
        why = "it has no benchmark in it"
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        why = str(error)
    raise TuneletError(
        f"{file} holds no results of a benchmark.", why=why, fix="Make it again: see docs/benchmarks.md."
    )


def train_table(files: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Markdown: one line for each contestant of each file, and under it what it was measured on."""
    cuda = all(content["device"] == "cuda" for _, content in files)
    unit = "s" if cuda else "CPU-s"
    head = f"| Method, rows | | tokens/{unit} | tunelet is | % of bf16 peak | peak MB | memory of tunelet is |"
    lines = [head, "|---|---|--:|--:|--:|--:|--:|"]
    for _, content in files:
        ours = content["contestants"].get("tunelet")
        what = f"{METHODS[content['method']]}, {content['work']['rows']}"
        if "train.compile=true" in content["work"]["set"]:
            what += ", compiled"
        for name, got in content["contestants"].items():
            speed = memory = ""
            if ours and name != "tunelet":
                ratio, peak = COMPARED[name]
                speed = f"**{content[ratio]:.2f}x**"
                memory = f"{content[peak]:.2f}x" if peak else f"{ours['peak_mb'] / got['peak_mb']:.2f}x"
            lines.append(
                f"| {what} | {NAMES[name]} | {got['tokens_per_cpu_second']:,.0f} | {speed} "
                f"| {100 * got['gemm_fraction']:.0f} | {got['peak_mb']:,.0f} | {memory} |"
            )
            what = ""
    notes = dict.fromkeys(_conditions(content) for _, content in files)
    for _, content in files:
        if "train.compile=true" in content["work"]["set"]:
            ours, warm = content["contestants"]["tunelet"], content["work"]["warm"]
            notes[f"Compiled: the first {warm} steps took {ours['facts']['warm_seconds']:.0f} s by the clock."] = None
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes)


# contestant -> keys of tunelet's ratios to it: rate, memory
COMPARED = {
    "trl-default": ("ratio_default", "peak_ratio"),
    "trl-best": ("ratio_best", "peak_ratio_best"),
    "tunelet-unshared": ("ratio_shared", ""),
}
METHODS = {"sft": "SFT, all weights", "lora": "LoRA r=16", "dpo": "DPO"}


def _conditions(content: dict[str, Any]) -> str:
    v, threads = content["versions"], content["threads"]
    on = "one GPU" if content["device"] == "cuda" else f"{threads} thread{'s' if threads > 1 else ''}"
    return (
        f"{content['work']['shape']} shape, {on} of {content['machine']['cpu']}, "
        f"bf16 product {content['gemm_gflops_per_cpu_second']:.0f} GFLOP/CPU-s, "
        f"median of {content['pairs_done']} pair{'s' if content['pairs_done'] > 1 else ''} "
        f"of {content['work']['steps']} steps, torch {v['torch']}, transformers {v['transformers']}, "
        f"peft {v['peft']}" + (f", trl {v['trl']}" if content["peer"] else "") + f"; {content['time'][:10]}."
    )


def ladder_table(files: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Markdown: one line for each rung."""
    lines = [
        "| Shape | Trained | Tokens of a row | Rows of a step | tokens/CPU-s | % of bf16 peak | peak MB |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    for _, content in files:
        for rung in content["rungs"]:
            kind = rung["rows"]
            mean = "" if kind.isdigit() else f" ({rung['timed']['mean_length']:.0f})"
            rate = rung["tokens_per_cpu_second"]
            lines.append(
                f"| {rung['shape']} | {rung['mode']} | {kind}{mean} | {rung['batch_size']} "
                f"| {rate:,.0f} | {100 * rung['gemm_fraction']:.0f} | {rung['peak_mb']:,.0f} |"
            )
    return "\n".join(lines)


def serve_table(files: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Markdown: for each file tunelet's server, the peer, and the ratio, by number of clients."""
    clients = sorted({int(n) for _, content in files for n in content["rates"]["tunelet"]})
    titles = [f"{n} client{'' if n == 1 else 's'}" for n in clients]
    lines = [f"| tokens/CPU-s | {' | '.join(titles)} | MB |", "|---|" + "--:|" * (len(clients) + 1)]
    for _, content in files:
        engine = content["engine"] + (f" {content['quant']}" if content["engine"] == "llama.cpp" else "")
        shared = f", {content['shared']} tokens shared" if content["shared"] else ""
        for name, rates in content["rates"].items():
            told = f"tunelet, {engine}{shared}" if name == "tunelet" else PEER_SERVERS[name].format(**content)
            cells = [f"{rates[str(n)]:,.0f}" if str(n) in rates else "" for n in clients]
            lines.append(f"| {told} | {' | '.join(cells)} | {content['rss_mb'][name]:,.0f} |")
        if content["peer"]:
            cells = [f"**{content['ratios'][str(n)]:.2f}x**" if str(n) in rates else "" for n in clients]
            lines.append(f"| ratio | {' | '.join(cells)} | |")
    notes = dict.fromkeys(_served(content) for _, content in files)
    return "\n".join(lines) + "\n\n" + "\n\n".join(notes)


PEER_SERVERS = {"llama-server": "llama.cpp's own server, {quant}", "transformers": "transformers' generate, {dtype}"}


def _served(content: dict[str, Any]) -> str:
    threads, pairs = content["threads"], content["pairs_done"]
    return (
        f"{content['model']} shape, {threads} thread{'s' if threads > 1 else ''} of {content['machine']['cpu']}; "
        f"prompts of {content['prompt'] + content['shared']} tokens, answers of {content['answer']}, "
        f"{content['rounds']} one after the other from each client; median of {pairs} pair{'s' if pairs > 1 else ''}; "
        f"{content['time'][:10]}."
    )


def settings_table(files: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Markdown: one line for each setting of the peer that was tried, the fastest first."""
    lines = ["| Method, rows | TRL's settings | tokens/CPU-s | peak MB |", "|---|---|--:|--:|"]
    for _, content in files:
        what = f"{METHODS[content['method']]}, {content['work']['rows']}"
        for one in sorted(content["tried"], key=lambda one: -one.get("tokens_per_cpu_second", 0)):
            failed = "error" in one
            rate, peak = (
                ("failed", "") if failed else (f"{one['tokens_per_cpu_second']:,.0f}", f"{one['peak_mb']:,.0f}")
            )
            lines.append(f"| {what} | {one['name']} | {rate} | {peak} |")
            what = ""
    return "\n".join(lines)

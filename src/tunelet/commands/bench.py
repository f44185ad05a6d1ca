"""The verb bench: how fast this machine answers with a model. Measured in infer/bench.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunelet.commands.common import Json, choice_of, open_console, write_json
from tunelet.errors import TuneletError

ENGINES = ("torch", "llama.cpp")


def bench(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder, a model folder, starter.")],
    engine: Annotated[
        list[str] | None, typer.Option("--engine", metavar="E", help="torch or llama.cpp; repeat. Default: both.")
    ] = None,
    quant: Annotated[
        list[str] | None, typer.Option("--quant", metavar="Q", help="Of llama.cpp: q8_0, q4_0, f16, ...; repeat.")
    ] = None,
    clients: Annotated[
        list[int] | None, typer.Option("--clients", min=1, metavar="N", help="So many at once; repeat.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of a prompt.")] = 128,
    answer: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of an answer.")] = 64,
    threads: Annotated[int, typer.Option(min=0, metavar="N", help="0: as many as there are cores.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where bench.json and bench.html go. Default: here.")
    ] = None,
    json_to: Json = None,
) -> None:
    """Measure time to the first token, tokens a second alone and with clients, memory and loading; by engine.

    The figures are kept for this machine: generate and serve take the engine that was faster.
    """
    console = open_console(json_to)
    from rich.table import Table

    from tunelet.infer import bench as measuring
    from tunelet.models import device
    from tunelet.runs import bench_page
    from tunelet.runs.files import disk

    engines, quants = engine or list(ENGINES), quant or list(measuring.QUANTS)
    for one in engines:
        choice_of("--engine", one, ENGINES)
    if quant and "llama.cpp" not in engines:
        raise TuneletError("--quant is for llama.cpp", fix="leave it out, or add --engine llama.cpp")
    folder = out or Path()
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    wanted = measuring.cases(engines, quants, device.choose(threads=threads).dtype)
    told = measuring.run(
        model,
        wanted,
        clients=sorted(set(clients or measuring.CLIENTS)),
        prompt=prompt,
        answer=answer,
        threads=threads,
        progress=lambda text: console.print(f"{text} ...", markup=False, highlight=False),
    )
    columns, rows = bench_page.table(told)
    table = Table(box=None, pad_edge=False)
    for place, title in enumerate(columns):
        table.add_column(title, justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    machine = told["machine"]
    speed = told["memory_bytes_per_second"] / 1e9
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, {speed:.1f} GB/s from memory; prompts of {prompt} tokens, "
        f"answers of {answer}. Most alone: what the memory allows a single answer.",
        markup=False,
        highlight=False,
    )
    write_json(told, str(folder / "bench.json"))
    console.print(f"Wrote {folder / 'bench.json'} and {bench_page.write(told, folder)}", markup=False, soft_wrap=True)
    write_json(told, json_to)

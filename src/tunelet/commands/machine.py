"""The verb doctor: what this machine has and what tunelet will use. The facts come from `tunelet.machine`."""

from __future__ import annotations

from tunelet.commands.common import Json, open_console, write_json


def doctor(json_to: Json = None) -> None:
    """Check this machine, and say what tunelet will use and why: device, dtype, threads, memory, disk."""
    console = open_console(json_to)
    from rich.table import Table

    from tunelet import machine

    told = machine.report()
    table = Table(box=None, show_header=False, pad_edge=False)
    for what, value, why in machine.lines(told):
        table.add_row(what, f"[bold]{value}[/]", f"[dim]{why}[/]")
    if json_to != "-":
        console.print(table, soft_wrap=False)
        for note in told["notes"]:
            console.print(f"Note: {note}", style="yellow", markup=False)
    write_json(told, json_to)

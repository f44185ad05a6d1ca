"""The verb export: a trained adapter becomes a model folder of its own.

Not for the work and its proof (infer/export.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunelet.commands.common import Json, Trust, bar, choice_of, open_console, print_wrapped, write_json
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from rich.console import Console

    from tunelet.infer.export import Merged, Source


def export(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder, or an adapter's.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The new model folder.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base model.")] = False,
    dtype: Annotated[
        str,
        typer.Option(
            metavar="D", help="What the weights are stored in: float32, bfloat16, float16; auto: as the base's."
        ),
    ] = "auto",
    trust: Trust = False,
    json_to: Json = None,
) -> None:
    """Make a model folder that needs neither tunelet nor peft, and prove it.

    --merge: the adapter goes into the weights of its base. The folder appears only if, loaded from the disk by plain
    transformers, it says what the adapter on its base says: on held-out rows of the run, or on built-in ones.
    """
    console = open_console(json_to)
    from tunelet.infer import export as exporting

    choice_of("--dtype", dtype, exporting.DTYPES)
    if not merge:
        raise TuneletError(
            "export: what shall become of it?",
            why="it can merge an adapter into its base model",
            fix=f"tunelet export {path} --merge --out {out}",
        )
    of = exporting.source(path)
    exporting.check_out(out, of)
    import torch

    from tunelet.models import device

    # only the threads: to keep freed memory, as device.apply does, would hold a copy of the model more
    torch.set_num_threads(device.choose("cpu", "float32").threads)
    rows, rows_from = _held_out(of, console)
    with bar(console, "Checking") as progress:
        merged = exporting.merge(
            path, out, dtype=dtype, rows=rows, rows_from=rows_from, trust_remote_code=trust, progress=progress
        )
    _tell(merged, console)
    write_json(merged.as_dict(), json_to)


def _held_out(of: Source, console: Console) -> tuple[list[Any], str]:
    """Token rows held out in the run's training and what they are; none, and why, where there is no run or its data is
    gone."""
    if of.run is None:
        return [], ""
    from tunelet.runs.record import Run
    from tunelet.train.prepare import prepare

    try:
        prepared = prepare(Run.open(of.run).recipe())
        rows = [(row.only(0) if row.branches else row).ids for row in prepared.eval_rows]
        why = "the run held out no rows"
    except TuneletError as error:
        rows, why = [], error.what
    if rows:
        return rows, f"held-out rows of {of.run}"
    print_wrapped(console, f"The run's own held-out rows cannot be compared on: {why}.", "yellow")
    return [], ""


def _tell(merged: Merged, console: Console) -> None:
    of, figures = merged.source, merged.figures
    over = f" (trained over {of.quantization} weights, merged into the unquantised ones)"
    told = f"Merged {of.kind} adapter {of.adapter} into {of.base}{over if of.quantization != 'none' else ''}"
    console.print(f"{told}: {merged.folder}, {merged.dtype}", markup=False)
    console.print(f"Compared on {figures['positions']} positions of {merged.rows_from}:", markup=False)
    for name, what in (("merged", "adapter on its base -> loaded from disk"), ("merging", "of that, by merging")):
        found = figures[name]
        console.print(
            f"  {what}: log-probability of the next token mean {found['mean_delta_logprob']:.1e}, "
            f"max {found['max_delta_logprob']:.1e}; logits max {found['max_delta_logit']:.1e}; "
            f"same likeliest token {found['greedy_agreement']:.2%}",
            markup=False,
        )

"""The verb export: a run, an adapter or a model becomes a file or folder that needs no tunelet.

Not for the work and its proof (infer/export.py, infer/gguf_export.py), nor for the run's evaluation of the exported
file (export_parity.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunelet.commands.common import Json, Trust, bar, choice_of, open_console, print_wrapped, write_json
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from rich.console import Console

    from tunelet.infer.export import Merged
    from tunelet.infer.gguf_export import Exported

TO = ("safetensors", "gguf", "ollama")


def export(
    path: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder, an adapter's, a model's, or a hub id.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="gguf: one file for llama.cpp; ollama: that and a Modelfile; safetensors: a model folder.",
        ),
    ] = None,
    quant: Annotated[
        str | None,
        typer.Option("--quant", metavar="Q", help="gguf, ollama: f32, bf16, f16, q8_0 or q4_0. Default: q8_0."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="DIR",
            help="The new folder. Default for gguf and ollama: RUN/export/QUANT, of a model in tunelet's cache.",
        ),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="The same as --to safetensors, for an adapter.")] = False,
    lora: Annotated[
        bool, typer.Option("--lora", help="gguf: the LoRA as a file of its own, to be loaded beside its base's.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="D",
            help="safetensors of an adapter: float32, bfloat16, float16; auto, the default: as the base's.",
        ),
    ] = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate/--no-evaluate", help="gguf, ollama: repeat the run's evaluation with the exported file."
        ),
    ] = True,
    trust: Trust = False,
    json_to: Json = None,
) -> None:
    """Make a model that needs neither tunelet nor peft, and prove it.

    It appears only if, loaded from the disk by the program it is for, it says what the run's model says: on held-out
    rows of the run, or on built-in ones. An adapter is merged into the weights of its base.
    """
    console = open_console(json_to)
    if to is None and not merge:
        raise TuneletError(
            "export: what shall become of it?",
            why="it can make a model folder (safetensors), a GGUF file, or what Ollama takes in",
            fix=f"tunelet export {path} --to gguf; or merge an adapter: tunelet export {path} --merge --out DIR",
        )
    to = to or "safetensors"
    choice_of("--to", to, TO)
    given = {"--merge": merge, "--lora": lora, "--quant": quant, "--dtype": dtype, "--trust-remote-code": trust}
    _check(to, path, out, given | {"--no-evaluate": not evaluate})
    if to == "safetensors":
        assert out is not None
        write_json(_safetensors(path, out, dtype or "auto", trust, console), json_to)
    else:
        write_json(_gguf(path, out, quant or "q8_0", lora, to, evaluate, console), json_to)


def _check(to: str, path: str, out: Path | None, given: dict[str, Any]) -> None:
    """Raises TuneletError for options that mean nothing here."""
    no_use = (
        ("--quant", "--lora", "--no-evaluate") if to == "safetensors" else ("--merge", "--dtype", "--trust-remote-code")
    )
    if to == "ollama":
        no_use += ("--lora",)
    for flag in no_use:
        if given[flag]:
            raise TuneletError(
                f"{flag} says nothing to --to {to}.", fix=f"leave it out: tunelet export {path} --to {to}"
            )
    if to == "safetensors" and out is None:
        raise TuneletError("export: where to?", fix=f"tunelet export {path} --to safetensors --out DIR")


def _gguf(
    path: str, out: Path | None, quant: str, lora: bool, to: str, evaluate: bool, console: Console
) -> dict[str, Any]:
    from tunelet.commands import export_parity
    from tunelet.infer import gguf_export, gguf_source

    gguf_export.check_quant(quant)
    of = gguf_source.source(path)
    made = gguf_export.there(path, quant, lora=lora) if out is None else None
    if made is None:
        if out is not None:
            gguf_export.check_out(out)
        rows, rows_from = _held_out(of.run, console)
        with bar(console, "Checking") as progress:
            how = {"lora": lora, "rows": rows, "rows_from": rows_from, "progress": progress}
            made = gguf_export.ready(path, quant, **how) if out is None else gguf_export.export(path, out, quant, **how)
    _tell_gguf(made, console)
    if evaluate and not lora:
        made = export_parity.repeat(of, made, console)
    if to == "ollama":
        remark = export_parity.modelfile(made)
        console.print(f"For Ollama: ollama create NAME -f {made.file.parent / 'Modelfile'}", markup=False)
        if remark:
            print_wrapped(console, remark, "yellow")
    return made.parity


def _safetensors(path: str, out: Path, dtype: str, trust: bool, console: Console) -> dict[str, Any]:
    from tunelet.infer import export as exporting
    from tunelet.models import load

    choice_of("--dtype", dtype, exporting.DTYPES)
    if not (load.resolve(path) / "adapter_config.json").is_file():
        if dtype != "auto":
            raise TuneletError(
                f"--dtype {dtype}: {path} is a whole model, which is copied as it is.", fix="leave --dtype out"
            )
        copied = exporting.copy(path, out, trust_remote_code=trust)
        console.print(f"Copied {copied['model']}: {out}, {copied['dtype']}", markup=False)
        return copied
    of = exporting.source(path)
    exporting.check_out(out, of)
    import torch

    from tunelet.models import device

    # only the threads: to keep freed memory, as device.apply does, would hold a copy of the model more
    torch.set_num_threads(device.choose("cpu", "float32").threads)
    rows, rows_from = _held_out(of.run, console)
    with bar(console, "Checking") as progress:
        merged = exporting.merge(
            path,
            out,
            dtype=dtype,
            rows=[row.ids for row in rows],
            rows_from=rows_from,
            trust_remote_code=trust,
            progress=progress,
        )
    _tell(merged, console)
    return merged.as_dict()


def _held_out(run: Path | None, console: Console) -> tuple[list[Any], str]:
    """Rows held out in the run's training (gguf_rows.Row) and what they are; none, and why, where there is no run or
    its data is gone."""
    if run is None:
        return [], ""
    from tunelet.infer import gguf_rows
    from tunelet.runs.record import Run
    from tunelet.train.prepare import prepare

    try:
        rows = gguf_rows.of_tokens(prepare(Run.open(run).recipe()).eval_rows)
        why = "the run held out no rows"
    except TuneletError as error:
        rows, why = [], error.what
    if rows:
        return rows, f"held-out rows of {run}"
    print_wrapped(console, f"The run's own held-out rows cannot be compared on: {why}.", "yellow")
    return [], ""


def _tell_gguf(made: Exported, console: Console) -> None:
    parity, found = made.parity, made.parity["figures"]
    size = f"{parity['bytes'] / 1e6:.1f} MB"
    done = "Exported" if made.fresh else "There already, and still the model's"
    console.print(f"{done}: {made.file}, {parity['quant']}, {size}", markup=False)
    console.print(
        f"llama.cpp against torch float32 on {found['positions']} answer tokens of {parity['rows_from']}: "
        f"log-probability mean {found['mean_delta_logprob']:.1e}, max {found['max_delta_logprob']:.1e}; "
        f"same greedy answer to {found['greedy_agreement_texts']:.1%} of {found['greedy_texts']}",
        markup=False,
    )


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

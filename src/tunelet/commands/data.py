"""The verbs about data: convert, doctor, render, mask. Reading, judging and rendering are done in `data/`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunelet.commands.common import (
    Columns,
    Json,
    Template,
    bar,
    choice_of,
    column_map,
    free_file,
    open_console,
    open_engine,
    open_tokenizer,
    print_wrapped,
    write_json,
)
from tunelet.commands.overlap import overlap
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from rich.console import Console

    from tunelet.data.examples import Finding
    from tunelet.data.formats import Loaded

SHOWN = 40  # findings printed one by one; --json has them all

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Convert, check and look at data: convert, doctor, overlap, render, mask.",
)
app.command("overlap", short_help="Evaluation items that were trained on.")(overlap)

Sources = Annotated[list[str], typer.Argument(metavar="SOURCE", help="starter, files, folders or hub ids.")]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help="starter, a file, a folder or a hub id.")]
Want = Annotated[str, typer.Option(metavar="KIND", help="What rows should become: chat, text, preference or labelled.")]
Format = Annotated[
    str, typer.Option(metavar="NAME", help="auto detects the format of every row; a name insists on one.")
]
System = Annotated[str, typer.Option(metavar="TEXT", help="System message for conversations without one.")]
Limit = Annotated[int, typer.Option(min=0, metavar="N", help="Use the first so many rows; 0: all.")]
ModelOf = Annotated[
    str, typer.Option("--model", metavar="M", help="Whose tokenizer and template: starter, a folder, a hub id, a run.")
]
RowNumber = Annotated[
    int, typer.Option("--row", metavar="N", min=1, help="Which row: its line in the file, or its number.")
]


def _load(
    sources: list[str], want: str, format: str, columns: list[str] | None, system: str = "", limit: int = 0
) -> Loaded:
    from tunelet.data import formats

    choice_of("--want", want, ("chat", "text", "preference", "labelled"))
    return formats.load(sources, want=want, format=format, columns=column_map(columns), system=system, limit=limit)


@app.command(short_help="Any known format to one, every row accounted for.")
def convert(
    sources: Sources,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The JSONL file to write.")],
    want: Want = "chat",
    format: Format = "auto",
    columns: Columns = None,
    system: System = "",
    limit: Limit = 0,
    json_to: Json = None,
) -> None:
    """Convert rows of any known format to one: rows in = examples out + rows dropped, each with its reason."""
    console = open_console(json_to)
    free_file(out)
    from tunelet.data.convert import write_jsonl

    loaded = _load(sources, want, format, columns, system, limit)
    counts = loaded.counts
    _print_findings(loaded.findings, console)
    if not loaded.examples:
        fixes = Counter(finding.fix for finding in loaded.findings if finding.fix)
        reasons = ", ".join(f"{number} {reason}" for reason, number in counts.dropped.items()) or "there are no rows"
        raise TuneletError(
            f"{', '.join(sources)}: no row became an example",
            why=f"{counts.rows_in} rows in, dropped: {reasons}",
            fix=next((fix for fix, _ in fixes.most_common(1)), "give a file, a folder or a hub id that holds rows"),
        )
    write_jsonl(loaded.examples, out)
    detected = ", ".join(f"{name}: {number}" for name, number in loaded.formats.items())
    dropped = ", ".join(f"{reason} {number}" for reason, number in counts.dropped.items())
    console.print(f"Wrote {out}: {counts.examples_out} of {counts.rows_in} rows ({detected})", markup=False)
    if dropped:
        console.print(f"Dropped {counts.rows_in - counts.examples_out}: {dropped}", markup=False)
    figures = counts.as_dict() | {"formats": loaded.formats, "sha256": loaded.sha256, "out": str(out)}
    write_json(figures | {"findings": [finding_row(finding) for finding in loaded.findings]}, json_to)


@app.command(short_help="Check rows; --fix writes mended ones.")
def doctor(
    sources: Sources,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="M",
            help="Also check with this model's tokenizer and template; pairs: also which answer it finds more likely.",
        ),
    ] = None,
    template: Template = None,
    max_length: Annotated[int, typer.Option(min=0, metavar="N", help="Tokens a row may have; 0: not checked.")] = 0,
    want: Want = "chat",
    format: Format = "auto",
    columns: Columns = None,
    system: System = "",
    limit: Limit = 0,
    fix: Annotated[Path | None, typer.Option("--fix", metavar="FILE", help="Write a mended JSONL file.")] = None,
    json_to: Json = None,
) -> None:
    """Check rows before training: every finding with its row, how bad it is and what mends it.

    With --want preference and --model, pairs that the model would clearly order the other way round are named, with
    their margins; --fix then leaves them out, and never swaps. Exit code 1 where errors were found and not mended.
    """
    console = open_console(json_to)
    if fix is not None:
        free_file(fix)
    from tunelet.data import doctor as checks
    from tunelet.data.convert import write_jsonl

    loaded = _load(sources, want, format, columns, system, limit)
    renderer, margins = None, []
    if model is not None and want == "preference":
        renderer, margins = _margins(loaded.examples, model, template, max_length, console)
    elif model is not None:
        renderer = open_tokenizer(model, template)[1]
    findings = [*loaded.findings, *checks.check(loaded.examples, renderer, max_length, margins)]
    errors, warnings = (sum(f.severity == kind for f in findings) for kind in ("error", "warning"))
    figures: dict[str, Any] = loaded.counts.as_dict() | {"errors": errors, "warnings": warnings}
    figures["findings"] = [finding_row(finding) for finding in findings]
    if margins:
        figures["margins"] = [
            {"file": example.origin.file, "row": example.origin.line, "margin": margin.total if margin else None}
            for example, margin in zip(loaded.examples, margins, strict=True)
        ]
    _print_findings(findings, console)
    console.print(f"{loaded.counts.rows_in} rows, {errors} errors, {warnings} warnings")
    if fix is not None:
        mended, notes = checks.fix(loaded.examples, loaded.counts.dropped, renderer, max_length, margins)
        write_jsonl(mended, fix)
        for note in notes:
            print_wrapped(console, f"  {note.message}")
        console.print(f"Wrote {fix}: {len(mended)} rows", markup=False)
        figures |= {"fixed": str(fix), "rows_out": len(mended), "mended": [finding_row(note) for note in notes]}
    write_json(figures, json_to)
    if errors and fix is None:
        raise typer.Exit(1)


@app.command(short_help="A row as the model sees it.")
def render(
    source: Source,
    model: ModelOf = "starter",
    row: RowNumber = 1,
    template: Template = None,
    prompt: Annotated[
        bool, typer.Option("--prompt", help="Without the last answer, with the generation prompt.")
    ] = False,
    want: Want = "chat",
    format: Format = "auto",
    columns: Columns = None,
    system: System = "",
    json_to: Json = None,
) -> None:
    """One row as the model sees it: the text after the chat template, and its token ids."""
    console = open_console(json_to)
    example = _row(source, row, want, format, columns, system)
    tokenizer, renderer = open_tokenizer(model, template)
    if prompt:
        messages = example.messages[:-1] if example.messages[-1].role == "assistant" else example.messages
        ids, text = renderer.prompt(messages, example.tools), renderer.string(messages, example.tools, True)
    else:
        ids = list(_tokens(example, renderer).ids)
        text = renderer.string(example.messages, example.tools) if hasattr(example, "messages") else example.text
    pieces = [tokenizer.decode([int(token)]) for token in ids]
    if json_to != "-":
        console.print(f"{example.origin}: {len(ids)} tokens\n", style="bold", markup=False)
        console.print(text, markup=False)
        console.print(
            " ".join(f"{token}:{piece!r}" for token, piece in zip(ids, pieces, strict=True)), style="dim", markup=False
        )
    _print_findings(renderer.findings(), console)
    write_json({"row": str(example.origin), "text": text, "ids": [int(i) for i in ids], "tokens": pieces}, json_to)


@app.command(short_help="A row in colour: what is trained.")
def mask(
    source: Source,
    model: ModelOf = "starter",
    row: RowNumber = 1,
    template: Template = None,
    want: Want = "chat",
    format: Format = "auto",
    columns: Columns = None,
    system: System = "",
    ids: Annotated[bool, typer.Option("--ids", help="A line a token: place, id, trained or not, role.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also write it as a page.")] = None,
    json_to: Json = None,
) -> None:
    """One row in colour: which tokens are trained (green, in [[ ]]) and which are only read."""
    console = open_console(json_to)
    if html is not None:
        free_file(html)
    example = _row(source, row, want, format, columns, system)
    tokenizer, renderer = open_tokenizer(model, template)
    tokens = _tokens(example, renderer)
    from tunelet.data import show

    if json_to != "-":
        console.print(show.summary(tokens) + " (in [[ ]])\n", style="bold", markup=False)
        console.print(show.terminal(tokens, tokenizer, ids=ids))
    _print_findings(renderer.findings(), console)
    if html is not None:
        from tunelet.runs.files import write_atomically

        write_atomically(html, show.page([tokens], tokenizer))
        console.print(f"Wrote {html}", markup=False)
    figures = {"row": str(example.origin), "tokens": len(tokens.ids), "trained": tokens.trained}
    figures |= {
        "ids": [int(i) for i in tokens.ids],
        "mask": [bool(m) for m in tokens.mask],
        "spans": list(tokens.spans),
    }
    pieces = [{"text": p.text, "trained": p.trained, "role": p.role} for p in show.pieces(tokens, tokenizer)]
    write_json(figures | {"pieces": pieces}, json_to)


# --- helpers -----------------------------------------------------------------------------------------------------


def _row(source: str, row: int, want: str, format: str, columns: list[str] | None, system: str) -> Any:
    choice_of("--want", want, ("chat", "text"))
    loaded = _load([source], want, format, columns, system, limit=0 if source != "starter" else row)
    for example in loaded.examples:
        if example.origin.line == row:
            return example
    for finding in loaded.findings:
        if finding.origin is not None and finding.origin.line == row:
            raise TuneletError(f"{finding.origin}: {finding.message}", fix=finding.fix or "choose another --row")
    raise TuneletError(
        f"{source}: there is no row {row}", why=f"it has {loaded.counts.rows_in}", fix="choose another --row"
    )


def _margins(
    examples: list[Any], model: str, template: str | None, max_length: int, console: Console
) -> tuple[Any, list[Any]]:
    """(renderer, doctor_pairs.margins) under a model."""
    from tunelet.data import doctor_pairs
    from tunelet.evals.held_out import losses

    engine = open_engine(model, device="auto", dtype="auto", trust=False, template=template)
    length = min(filter(None, (max_length, engine.max_length)), default=0)
    with bar(console, "Scoring pairs") as progress:
        found = doctor_pairs.margins(
            examples, engine.renderer, lambda rows: losses(engine.model, rows), length, progress
        )
    return engine.renderer, found


def _tokens(example: Any, renderer: Any) -> Any:
    return renderer.chat(example) if hasattr(example, "messages") else renderer.text(example)


def finding_row(finding: Finding) -> dict[str, Any]:
    origin = finding.origin
    return {
        "kind": finding.kind,
        "severity": finding.severity,
        "message": finding.message,
        "file": origin.file if origin else None,
        "row": origin.line if origin else None,
        "unit": origin.unit if origin else None,
        "fix": finding.fix,
    }


def _print_findings(findings: list[Finding], console: Console) -> None:
    from tunelet.data import listing

    styles = {"error": "bold red", "warning": "yellow", "info": "cyan", "fix": "dim"}
    for kind, line in listing.lines(findings, SHOWN):
        print_wrapped(console, line, styles.get(kind, ""))

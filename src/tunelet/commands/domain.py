"""The verbs of a domain project: new, annotate, build, export, status. The work is done in `domain/`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunelet.commands.common import (
    Device,
    Dtype,
    Json,
    Template,
    Trust,
    bar,
    choice_of,
    free_file,
    open_console,
    open_engine,
    print_wrapped,
    write_json,
)
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Your documents as an exam that people checked: new, annotate, build, export, status.",
)
Dir = Annotated[Path, typer.Argument(metavar="DIR", help="The project's folder.")]
DirOrPairs = Annotated[
    Path, typer.Argument(metavar="DIR", help="The project's folder, or a JSONL file of pairs of answers.")
]
CLOZE = "cloze"
WEB = "pip install 'tunelet[web]'"


@app.command(short_help="Documents become passages, and these become questions.")
def new(
    docs: Annotated[Path, typer.Argument(metavar="DOCS", help="A folder of Markdown, text or HTML files, or one.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The project's folder; a new one.")],
    questions: Annotated[int, typer.Option("--questions", min=1, metavar="N", help="How many to write.")] = 30,
    writer: Annotated[
        str,
        typer.Option(
            metavar="W",
            help="cloze: by rules, a number, name or term of a sentence is blanked; needs no model. Else a model "
            "(starter, a folder, a hub id, a run), or an OpenAI-compatible URL#MODEL: the documents go there.",
        ),
    ] = CLOZE,
    size: Annotated[int, typer.Option(min=100, metavar="N", help="Characters that a passage may have.")] = 1200,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Which sentences and choices are drawn.")] = 0,
    template: Template = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    json_to: Json = None,
) -> None:
    """Documents become passages, and these become multiple-choice questions for people to check.

    A question stays where its answer, or the sentence quoted for it, stands in the passage, and its wrong choices
    differ; all others are counted with the reason.
    """
    console = open_console(json_to)
    from tunelet import __version__
    from tunelet.domain import chunks, project, writers
    from tunelet.domain import questions as asking
    from tunelet.domain.cloze import Cloze

    project.check_free(out)
    read = chunks.read(docs, size)
    for path, why in read.skipped.items():
        console.print(f"Left out {path}: {why}", markup=False)
    console.print(f"{len(read.documents)} documents, {len(read.chunks)} passages", markup=False)
    if writer == CLOZE:
        made: Any = Cloze(read.chunks)
        print_wrapped(console, "Writer: cloze, by rules. No model writes here; for one name it: --writer MODEL_OR_URL")
    elif writer.startswith(("http://", "https://")):
        made = writers.UrlWriter(writer)
        print_wrapped(console, f"Writer: {made.name}. The documents' text is sent there.")
    else:
        engine = open_engine(writer, device=device, dtype=dtype, trust=trust, template=template)
        made = writers.EngineWriter(engine, writer)
    with bar(console, "Questions") as progress:
        kept, account = asking.write(read.chunks, made, questions, seed=seed, progress=progress)
    _accounted(console, account.as_dict())
    if not kept:
        raise TuneletError(
            f"{made.name}: no question holds",
            why=", ".join(f"{number} {why}" for why, number in account.dropped.most_common()),
            fix="--writer cloze" if writer != CLOZE else "documents with more sentences that name numbers or terms",
        )
    settings = project.Settings(
        name=out.resolve().name,
        source=str(docs),
        writer=made.name,
        seed=seed,
        size=size,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        tunelet=__version__,
    )
    project.create(out, settings, read, kept, account)
    if len(kept) < questions:
        told = f"{len(kept)} of {questions} questions: the writer finds no more in these documents that hold."
        print_wrapped(console, told, "yellow")
    console.print(f"Wrote {out}\nNext: tunelet domain annotate {out}", markup=False)
    write_json(
        {"out": str(out), "documents": len(read.documents), "passages": len(read.chunks)} | account.as_dict(), json_to
    )


def _accounted(console: Console, account: dict[str, Any]) -> None:
    dropped = ", ".join(f"{number} {why}" for why, number in account["dropped"].items())
    words = f"{account['asked']} asked for = {account['kept']} kept + {sum(account['dropped'].values())} dropped"
    print_wrapped(console, words + (f" ({dropped})" if dropped else ""))
    if account["retries"]:
        console.print(f"{account['calls']} calls of the writer, {account['retries']} of them retries", markup=False)


@app.command(short_help="A page in the browser: answer, edit, reject.")
def annotate(
    folder: DirOrPairs,
    name: Annotated[
        str, typer.Option("--as", metavar="NAME", help="Who annotates. Everyone has a file of their own.")
    ] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: any free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page at once.")] = True,
) -> None:
    """Serve the annotation page on this machine until Ctrl-C. Every answer is saved at once; the same command goes on.

    With a JSONL file of pairs (prompt, and chosen and rejected, or answer_a and answer_b) the page asks which answer
    is better.
    """
    console = open_console()
    try:
        from tunelet.domain import server
    except ModuleNotFoundError as error:
        raise TuneletError(
            "the annotation page needs a web server that is not installed", why=f"no module {error.name}", fix=WEB
        ) from error
    import secrets

    from tunelet.domain import annotations
    from tunelet.domain.session import Session

    who = annotations.name_of(name or _user())
    title, items, at = _study(folder)
    token = secrets.token_urlsafe(24)
    with (
        annotations.opened(at, who, lambda text: print_wrapped(console, text, "yellow")) as log,
        server.bound(port) as sock,
    ):
        session = Session(title, items, log, at)
        url = server.address(sock, token)
        state = session.state()
        console.print(f"{who}: {state['done']} of {state['total']} done. Ctrl-C ends.\n{url}", markup=False)
        if browser:
            import webbrowser

            webbrowser.open(url)
        server.serve(session, sock, token)
        state = session.state()
    console.print(f"{who}: {state['done']} of {state['total']} done, all saved in {log.path}", markup=False)
    after = f"tunelet domain build {folder}" + (" --out PREFERENCES.jsonl" if session.pairs else "")
    console.print(f"Next: {after}", markup=False)


def _user() -> str:
    """The name of who is logged in, made fit for a file; "me" where there is none."""
    import getpass
    import re

    try:
        return re.sub(r"[^\w-]", "-", getpass.getuser()).strip("-_")[:40] or "me"
    except (OSError, KeyError, ImportError):
        return "me"


def _study(folder: Path) -> tuple[str, list[Any], Path]:
    """(title, items, folder of annotators' files) of a project or of a file of pairs."""
    if _pairs(folder):
        from tunelet.domain import pairs

        return folder.stem, pairs.read(folder), pairs.folder_of(folder)
    from tunelet.domain.project import Project
    from tunelet.domain.session import items_of

    project = Project(folder)
    return project.settings.name, items_of(project), project.annotations


def _pairs(folder: Path) -> bool:
    """Whether a file of pairs is meant. Raises TuneletError where nothing is there."""
    if folder.is_file():
        return True
    if not folder.exists():
        fix = "name a project's folder (tunelet domain new makes one), or a JSONL file of pairs"
        raise TuneletError(f"{folder}: there is no such folder or file", fix=fix)
    return False


@app.command(short_help="What people accepted becomes a data set and a task.")
def build(
    folder: DirOrPairs,
    least: Annotated[
        int, typer.Option("--annotators", min=1, metavar="N", help="Who must have judged a question.")
    ] = 1,
    train: Annotated[
        float, typer.Option(metavar="SHARE", help="Of the rows, kept apart for training, by passage.")
    ] = 0.0,
    name: Annotated[str, typer.Option(metavar="NAME", help="Of the task. Default: the folder's name.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Pairs: the preference JSONL to write.")
    ] = None,
    json_to: Json = None,
) -> None:
    """What people accepted becomes dataset/vN and a task for tunelet eval; of pairs, preference rows to train on.

    A question stays where more than half of those who judged it accept it with the same answer.
    """
    console = open_console(json_to)
    if _pairs(folder):
        _build_pairs(folder, out, console, json_to)
        return
    if out is not None:
        raise TuneletError("--out is for pairs", why=f"a project's data set goes to {folder / 'dataset'}")
    from tunelet.domain import build as building
    from tunelet.domain.project import Project, slug

    told = building.write(Project(folder), least=least, train=train, name=slug(name) if name else "")
    rows = ", ".join(f"{number} {part}" for part, number in told["rows"].items())
    if told["new"]:
        console.print(f"Wrote {told['folder']}: {rows}", markup=False)
    else:
        console.print(f"{told['folder']} has these rows already: {rows}. Nothing new is written.", markup=False)
    for why, number in told["questions"]["left_out"].items():
        console.print(f"Left out {number}: {why}", markup=False)
    _agreed(console, told["agreement"])
    console.print(f"Next: tunelet eval MODEL --task {folder / 'task.toml'}", markup=False)
    write_json(told, json_to)


def _build_pairs(path: Path, out: Path | None, console: Console, json_to: str | None) -> None:
    from tunelet.domain import pairs

    if out is None:
        raise TuneletError("where do the preference rows go?", fix="name a file: --out preferences.jsonl")
    free_file(out)
    rows, figures = pairs.results(path)
    if not rows:
        raise TuneletError(f"{path}: nobody has judged a pair yet", fix=f"tunelet domain annotate {path}")
    written = pairs.write(rows, out)
    console.print(
        f"Wrote {out}: {written} rows; {figures['ties']} ties and {figures['rejected']} rejected left out", markup=False
    )
    _agreed(console, {"answers": figures["agreement"]})
    write_json(figures | {"out": str(out), "rows": written}, json_to)


def _agreed(console: Console, found: dict[str, Any]) -> None:
    from tunelet.domain import agreement

    names = {"answers": "Agreement on answers", "verdicts": "Agreement on keeping"}
    for key, of in found.items():
        console.print(f"{names[key]}: {agreement.told(of)}", markup=False)


@app.command(short_help="Questions for Argilla or Label Studio.")
def export(
    folder: Dir,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="argilla or label-studio.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The JSON file; settings are written beside it.")],
    json_to: Json = None,
) -> None:
    """Write the questions as another annotation program imports them, and the settings that it needs."""
    console = open_console(json_to)
    from tunelet.domain import export as exporting
    from tunelet.domain.project import Project

    choice_of("--to", to, exporting.KINDS)
    written = exporting.write(Project(folder), to, out)
    console.print(f"Wrote {' and '.join(map(str, written))}", markup=False)
    write_json({"files": [str(path) for path in written]}, json_to)


@app.command(short_help="How far is it, and do annotators agree?")
def status(folder: DirOrPairs, json_to: Json = None) -> None:
    """Documents, questions, who judged how many, how far they agree, what would be built."""
    console = open_console(json_to)
    if _pairs(folder):
        from tunelet.domain import pairs

        figures = pairs.results(folder)[1]
        console.print(f"{folder}: {figures['pairs']} pairs", markup=False)
        for who, number in figures["annotators"].items():
            console.print(f"{who}: {number} judged", markup=False)
        _agreed(console, {"answers": figures["agreement"]})
        write_json(figures, json_to)
        return
    from collections import Counter

    from tunelet.domain import build as building
    from tunelet.domain.project import Project

    project = Project(folder)
    decisions, found = building.decide(project)
    people, agreed = building.people(project, found), building.agreed(found)
    console.print(
        f"{folder}: {len(project.documents)} documents, {len(project.chunks)} passages, "
        f"{len(project.questions)} questions by {project.settings.writer}",
        markup=False,
    )
    for who, of in people.items():
        told = ", ".join(f"{of[key]} {key}" for key in ("accepted", "edited", "rejected", "disputed") if of[key])
        answers = f"{of['answered']} answered, {of['as_the_key']} as the key"
        console.print(f"{who}: {answers}; {told}", markup=False)
    if not people:
        console.print(f"Nobody has annotated yet: tunelet domain annotate {folder}", markup=False)
    _agreed(console, agreed)
    counted = Counter(decision.why for decision in decisions)
    console.print(
        f"If built now: {', '.join(f'{number} {why}' for why, number in counted.most_common())}", markup=False
    )
    write_json({"annotators": people, "agreement": agreed, "questions": dict(counted)}, json_to)

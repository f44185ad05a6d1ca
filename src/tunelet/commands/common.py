"""What the verbs share: their common options, the console, figures as JSON, the default run folder.

Not for work: a verb hands its arguments on and prints what comes back.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunelet.errors import TuneletError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console

    from tunelet.recipe import Recipe
    from tunelet.recipe_io import Loaded

METHODS = ("pretrain", "sft", "dpo", "orpo", "simpo", "kto")

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a recipe key, above the recipe. Repeat for more."),
]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON; - for standard output.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run's folder. Default: runs/NAME.")]
Model = Annotated[
    str | None, typer.Option("--model", metavar="M", help="starter, a folder, a hub id, or a run's folder.")
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="D", help="starter, a file, a folder or a hub id. Repeat for more."),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", metavar="KIND", help="none, lora, rslora, dora, prompt, prefix or ia3."),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="[NAME=]RUN", help="A run or folder with an adapter, put on the model. Repeat for more."
    ),
]
Use = Annotated[
    str | None,
    typer.Option(
        "--use", metavar="MIX", help="Which adapters: NAME, A+B, 0.7*A+0.3*B, or off. Default: the first one."
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        "--engine",
        metavar="E",
        help="torch, llama.cpp, or an address: http://127.0.0.1:8080/v1#MODEL. auto: the faster.",
    ),
]
Device = Annotated[str, typer.Option(metavar="D", help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(metavar="D", help="auto, float32 or bfloat16.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")]
Template = Annotated[
    str | None,
    typer.Option("--template", metavar="FILE", help="A Jinja chat template, chatml or plain, for the model's own."),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="ROLE=COLUMN", help="Which column has which role, e.g. prompt=Q. Repeat for more."
    ),
]


def open_console(json_to: str | None = None) -> Console:
    """The console of a verb. With `--json -` people read on standard error, so that standard output is JSON alone."""
    from rich.console import Console

    check_json(json_to)
    return Console(stderr=json_to == "-", soft_wrap=True, highlight=False)


def print_wrapped(console: Console, line: str, style: str = "") -> None:
    """A line of prose: wrapped between words under its own indent in a terminal, left whole in a pipe or file."""
    from rich.padding import Padding
    from rich.text import Text

    if not console.is_terminal:
        console.print(line, style=style, markup=False)
        return
    text = Text(line.lstrip(), style)
    first = len(line) - len(text.plain)
    wrapped = text.wrap(console, max(20, console.width - first - 2))
    for number, part in enumerate(wrapped):
        console.print(Padding(part, (0, 0, 0, first + (2 if number else 0))), soft_wrap=False)


def first_process() -> bool:
    """Whether this is the process to speak of a mistake that all find: torchrun starts all with one command line."""
    from tunelet.train import distributed

    return distributed.asked().first


def check_processes(verb: str) -> None:
    """Raises TuneletError where torchrun started several processes of a verb that runs in one."""
    from tunelet.train import distributed

    here = distributed.asked()
    if here.size == 1 or verb == "train":
        return
    if not here.first:
        raise SystemExit(2)
    raise TuneletError(
        f"tunelet {verb} runs in one process, and torchrun started {here.size}.",
        fix="Train with torchrun ... -m tunelet train, and do the rest without it: tunelet eval, tunelet report",
    )


def check_json(json_to: str | None) -> None:
    """Fail before the work where the figures could not be written after it."""
    if json_to in (None, "-"):
        return
    file = Path(json_to)
    folder = file.parent
    if file.is_dir() or not folder.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        why = "it is a folder" if file.is_dir() else "its folder is missing, or can't be written"
        raise TuneletError(f"--json {json_to}: can't write there", why=why, fix="name a file in a folder that exists")


def write_json(figures: Mapping[str, Any] | Sequence[Any], json_to: str | None) -> None:
    """Write the figures where `--json` says; nothing without it. NaN and infinities become null."""
    if json_to is None:
        return
    from tunelet.runs.files import finite, write_atomically

    text = json.dumps(finite(figures), ensure_ascii=False, indent=1, default=str) + "\n"
    if json_to == "-":
        sys.stdout.write(text)
    else:
        write_atomically(Path(json_to), text)


def load_recipe(
    file: str | None, sets: Sequence[str] | None, flags: Mapping[str, tuple[str, Any]] | None = None
) -> Loaded:
    from tunelet import recipe_io

    given = {flag: pair for flag, pair in (flags or {}).items() if pair[1] not in (None, [])}
    return recipe_io.load(file, sets=sets or [], flags=given)


def flags_of(
    model: str | None, data: list[str] | None, columns: list[str] | None, adapter: str | None
) -> dict[str, tuple[str, Any]]:
    """The dedicated flags as `recipe_io.load` takes them."""
    return {
        "--model": ("model.path", model),
        "--data": ("data.train", data),
        "--column": ("data.columns", column_map(columns) or None),
        "--adapter": ("adapter.kind", adapter),
    }


def choose_out(out: Path | None, recipe: Recipe, console: Console) -> Path:
    """The run's folder: as given; else runs/NAME, or the next free runs/NAME-2, ... after finished runs.

    An unfinished run of the same recipe is taken up again, so that the same command after a crash goes on.
    """
    from tunelet import stages
    from tunelet.runs import record

    if out is None:
        out = free_folder(recipe)
    if (run := stages.unfinished(recipe, out)) is not None:
        console.print(f"Going on with the {run.status} run in {run.folder}", style="bold", markup=False)
    elif not record.is_run(out):
        console.print(f"Run folder: {out}", markup=False)
    return out


def free_folder(recipe: Recipe) -> Path:
    from tunelet import stages

    base = Path("runs") / (recipe.name if recipe.name != "run" else recipe.method.name)
    for number in range(1, 10_000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            return folder
        if stages.unfinished(recipe, folder) is not None:
            return folder
    raise TuneletError(f"{base}: 10,000 folders of that name are taken", fix="choose one with --out")


def column_map(pairs: Sequence[str] | None) -> dict[str, str]:
    out = {}
    for pair in pairs or []:
        role, equals, column = pair.partition("=")
        if not equals or not role.strip() or not column.strip():
            raise TuneletError(
                f"--column {pair}: is not of the form role=column", fix="write for example: --column prompt=Q"
            )
        out[role.strip()] = column.strip()
    return out


def free_file(file: Path) -> None:
    """Raises TuneletError where a verb could not write this new file, before it has done its work."""
    if file.exists():
        raise TuneletError(
            f"{file}: is there already", why="it is not written over", fix="choose another file, or delete it"
        )
    if not file.parent.is_dir():
        raise TuneletError(f"{file}: there is no folder {file.parent}", fix="make it, or choose another file")


def choice_of(flag: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise TuneletError(
            f"{flag} {value}: there is no such choice.{did_you_mean(value, choices)}",
            fix=f"one of {', '.join(choices)}",
        )


def open_tokenizer(model: str, template: str | None = None) -> tuple[Any, Any]:
    """(tokenizer, renderer) of a model, or of a folder that holds a tokenizer alone."""
    from tunelet.data.render import Renderer, load_tokenizer
    from tunelet.models import load

    tokenizer = load_tokenizer(load.tokenizer_folder(model), template or "")
    return tokenizer, Renderer(tokenizer)


def open_engine(
    model: str | None,
    *,
    device: str,
    dtype: str,
    trust: bool,
    template: str | None,
    adapters: Sequence[str] | None = None,
    use: str | None = None,
    engine: str = "torch",
    slots: int = 1,
) -> Any:
    """A TorchEngine of a model, a run or adapter; with `adapters` an AdapterEngine. The tokenizer first: its mistakes
    show without loading weights. engine: as chosen (infer/choose.py); slots: of llama.cpp, requests at once."""
    if engine != "torch":
        return _other_engine(
            engine,
            model,
            slots,
            template,
            {"--device": device, "--dtype": dtype, "--trust-remote-code": "on" if trust else "auto"},
        )
    choice_of("--device", device, ("auto", "cpu", "cuda", "mps"))
    choice_of("--dtype", dtype, ("auto", "float32", "bfloat16"))
    if adapters:
        from tunelet.infer.adapters import AdapterEngine, named
        from tunelet.models import device as devices

        choice = devices.choose(device, dtype)
        devices.apply(choice)
        engine = AdapterEngine.open(model, named(adapters), choice, template=template or "", trust_remote_code=trust)
        if use is not None:
            engine.use(use)
        return engine
    if use is not None or model is None:
        raise TuneletError(
            "--use: there are no adapters to choose among" if use else "which model?",
            fix="give adapters: --adapter NAME=RUN" if use else "name a model, a run, or adapters: --adapter RUN",
        )
    tokenizer, renderer = open_tokenizer(model, template)
    from tunelet.infer.engine import TorchEngine
    from tunelet.models import device as devices
    from tunelet.models import load

    choice = devices.choose(device, dtype)
    devices.apply(choice)
    loaded = load.load_model(model, choice, trust_remote_code=trust)
    load.check_tokenizer(loaded, tokenizer, model)
    return TorchEngine(loaded, tokenizer, renderer)


def choose_engine(
    asked: str,
    model: str | None,
    at_once: int,
    adapters: Sequence[str] | None,
    device: str,
    dtype: str,
    trust: bool,
) -> str:
    """Which engine answers, as `open_engine` takes it; why is told. Raises TuneletError where what was asked for does
    not go together."""
    from tunelet.infer import choose
    from tunelet.infer.endpoint import is_url

    if is_url(asked) and not adapters:
        if model is not None:
            raise TuneletError(
                f"--engine {asked} and {model}: which one?", fix="leave the model out; an address's stands behind #"
            )
        return asked
    if adapters or model is None:
        choice_of("--engine", asked, ("auto", "torch"))  # several adapters on one base are torch's
        return "torch"
    if asked == "auto" and (trust or (device, dtype) != ("auto", "auto")):  # what only torch has a use for
        return "torch"
    chosen = choose.choose(model, asked, at_once)
    if asked == "auto":  # on standard error: standard output may be the answer alone
        print(f"Engine: {chosen.engine} ({chosen.reason})", file=sys.stderr)
    return chosen.engine


def _other_engine(name: str, model: str | None, slots: int, template: str | None, torchs: Mapping[str, str]) -> Any:
    """llama.cpp, or an address."""
    for flag, value in torchs.items():
        if value != "auto":
            raise TuneletError(f"{flag} {value}: is for the torch engine, not for {name}", fix="leave it out")
    if name != "llama.cpp":
        from tunelet.infer.remote import RemoteEngine

        if template:
            raise TuneletError("--template: an address has its own template", fix="leave it out")
        return RemoteEngine(name)
    from tunelet.infer import choose, gguf_export
    from tunelet.infer.engine import CACHE_MB
    from tunelet.infer.llama_cpp import LlamaCppEngine

    tokenizer, renderer = open_tokenizer(str(model), template)
    file = gguf_export.ready(str(model), choose.QUANT).file
    return LlamaCppEngine(file, tokenizer, renderer, slots=slots, cache_mb=CACHE_MB)


@contextlib.contextmanager
def bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing in a pipe: the figures follow."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)

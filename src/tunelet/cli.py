"""The command `tunelet`: its verbs, and how errors become messages and exit codes. Their options are in `commands/`.

Exit codes: 0 done, 1 a check or gate did not hold, 2 a user's mistake (one clear message), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from tunelet import __version__
from tunelet.commands import (
    ask,
    bench,
    common,
    compare,
    data,
    domain,
    export,
    machine,
    plan,
    recipe,
    results,
    serve,
    sweep,
    train,
)
from tunelet.errors import TuneletError, did_you_mean

app = typer.Typer(
    name="tunelet",
    help="Align small language models, end to end, on the computer you already have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"tunelet {__version__}")
        raise typer.Exit


@app.callback(epilog="Begin with: tunelet demo. Your own data: tunelet recipe init --data FILE --out my.toml")
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command("demo", short_help="Align the shipped model; show before and after.")(train.demo)
app.command("align", short_help="From a recipe to a report: before and after.")(train.align)
app.command("train", short_help="Train a model: sft, dpo, orpo, ...")(train.train)
app.command("sweep", short_help="Which settings are best? A grid of them.")(sweep.sweep)
app.command("plan", short_help="How long will it take, and will it fit?")(plan.plan)
app.add_typer(data.app, name="data")
app.add_typer(domain.app, name="domain")
app.command("eval", short_help="Score a model or a run, with intervals.")(results.evaluate)
app.command("chat", short_help="Talk with a model.")(ask.chat)
app.command("generate", short_help="Answer a file of prompts.")(ask.generate)
app.command("serve", short_help="An OpenAI-compatible server, and a chat page.")(serve.serve)
app.command("bench", short_help="How fast does this machine answer with it?")(bench.bench)
app.command("export", short_help="A file for llama.cpp or Ollama, or a model folder; proved.")(export.export)
app.command("compare", short_help="Finished runs side by side, and tested.")(compare.compare)
app.command("report", short_help="Write a run's page again.")(results.report)
app.add_typer(recipe.app, name="recipe")
app.command("doctor", short_help="What this machine has, and tunelet will use.")(machine.doctor)

UsageError = typer.BadParameter.__mro__[1]  # click's, wherever typer keeps click


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code. Users' mistakes are one message on standard error, a bug keeps its traceback."""
    # Nothing is sent or asked behind the user's back; set before transformers or huggingface_hub is imported.
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="replace")  # a terminal without Korean letters still gets the rest
    try:
        args = _json_to_stdout(sys.argv[1:] if argv is None else list(argv))
        common.check_processes(next((arg for arg in args if not arg.startswith("-")), ""))
        code = app(args=args, prog_name="tunelet", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # typer's own answer to Ctrl-C
            return _tell("interrupted", 130)
        return code if isinstance(code, int) else 0
    except TuneletError as error:
        return _tell(str(error), error.exit_code)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # a bare `tunelet` or `tunelet data`
            print(error.format_message())  # type: ignore[attr-defined]
            return 0
        return _tell(_usage(error), 2) if common.first_process() else 2
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort) as error:
        told = str(error) or str(error.__cause__ or "")
        return _tell(told or "interrupted", 130)
    except BrokenPipeError:
        # The reader (head, less) has what it wanted. Standard output is gone: keep Python from flushing it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        told = _machine_trouble(error)
        if told is None:
            raise
        return _tell(str(told), told.exit_code)


def _json_to_stdout(args: list[str]) -> list[str]:
    """`--json` without a file means standard output, as `--json -` does."""
    out = []
    for number, arg in enumerate(args):
        out.append(arg)
        following = args[number + 1] if number + 1 < len(args) else "--"
        if arg == "--json" and following.startswith("-") and following != "-":
            out.append("-")
    return out


def _tell(message: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError, ValueError):
        sys.stdout.flush()
    print(f"tunelet: {message}" if code != 130 else message, file=sys.stderr)
    return code


def _usage(error: Exception) -> str:
    """A mistake on the command line: what, and the help to read, last."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "tunelet"
    what = error.format_message().rstrip(".")  # type: ignore[attr-defined]
    hint = ""
    if context is not None and "No such command" in what and "Did you mean" not in what:
        name = what.partition("'")[2].rstrip("'")
        hint = did_you_mean(name, context.command.list_commands(context))
    return f"{what}.{hint}\nfix: see {path} --help"


def _machine_trouble(error: BaseException) -> TuneletError | None:
    """Full disks, missing rights and too little memory, wherever they surface; None for what is a bug."""
    text = str(error)
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return TuneletError(
            "not enough memory for this",
            why=text.splitlines()[0] if text else "",
            fix="a smaller train.batch_size (and more train.gradient_accumulation), data.max_length, eval.batch_size",
        )
    if isinstance(error, OSError) and error.filename is not None:
        fixes = {
            errno.ENOSPC: "free some disk space, then run the same command again",
            errno.EDQUOT: "free some of your disk quota, then run the same command again",
            errno.EROFS: "choose a folder that can be written",
            errno.EACCES: "choose a folder or file that you may read and write",
            errno.EPERM: "choose a folder or file that you may read and write",
        }
        if error.errno in fixes:
            return TuneletError(f"{error.filename}: {error.strerror}", fix=fixes[error.errno])
    return None


if __name__ == "__main__":
    sys.exit(main())

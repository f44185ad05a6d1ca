"""The verbs that ask a model: chat (one conversation, as it comes) and generate (a file of prompts)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunelet.commands.common import (
    Adapters,
    Device,
    Dtype,
    Engine,
    Json,
    Template,
    Trust,
    Use,
    choose_engine,
    open_console,
    open_engine,
    write_json,
)
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from rich.console import Console

    from tunelet.data.examples import Message

RunOrModel = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        help="A run's folder, starter, a model folder or a hub id. With --adapter: the base, if not their own.",
        show_default=False,
    ),
]
MaxNew = Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0, metavar="X", help="0 always takes the likeliest token.")]
TopP = Annotated[
    float, typer.Option(min=0, max=1, metavar="X", help="Sample among the likeliest tokens of this total probability.")
]
TopK = Annotated[int, typer.Option(min=0, metavar="N", help="Sample among so many tokens; 0: all.")]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="Of the sampling; the same gives the same answers.")]
Raw = Annotated[bool, typer.Option("--raw", help="No chat template: go on with the text as it stands.")]

HELP = "/reset forgets the conversation, /system TEXT sets the system message, /save FILE writes it down, /quit ends."
ADAPTERS = "/adapter shows the adapters; /adapter NAME, A+B, 0.7*A+0.3*B or off answers with these."


def chat(
    model: RunOrModel = None,
    adapter: Adapters = None,
    use: Use = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Ask once, print the answer, end.")
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="System message.")] = "",
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    raw: Raw = False,
    template: Template = None,
    engine: Engine = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    json_to: Json = None,
) -> None:
    """Talk with a model. Answers come as they are made; the conversation is kept until /reset."""
    console = open_console(json_to)
    name = choose_engine(engine, model, 1, adapter, device, dtype, trust)
    opened = open_engine(
        model,
        device=device,
        dtype=dtype,
        trust=trust,
        template=template,
        adapters=adapter,
        use=use,
        engine=name,
    )
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    session = _Session(opened, system, raw, options, console)
    if prompt is not None:
        answer = session.ask(prompt)
        write_json({"prompt": prompt, "answer": answer, "finish": session.finish, "tokens": session.tokens}, json_to)
        return
    if sys.stdin.isatty():
        console.print(f"{HELP} Ctrl-C stops an answer.", style="dim", markup=False)
        if adapter:
            console.print(ADAPTERS, style="dim", markup=False)
    while (line := _read_line(console)) is not None:
        if not session.command(line):
            return
    write_json(session.as_row(), json_to)


class _Session:
    """A conversation with its history."""

    def __init__(self, engine: Any, system: str, raw: bool, options: dict[str, Any], console: Console):
        self.engine, self.raw, self.options, self.console = engine, raw, options, console
        self.system = system
        self.messages: list[Message] = []
        self.finish, self.tokens = "", 0

    def command(self, line: str) -> bool:
        """Do what a line says: a /command or a question. False: end."""
        word, _, rest = line.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if not word:
            return True
        if word == "/reset":
            self.messages = []
            self._note("The conversation is forgotten.")
        elif word == "/system":
            self.system, self.messages = rest.strip(), []
            self._note("A new conversation with this system message." if rest else "No system message any more.")
        elif word == "/save":
            self._save(rest.strip())
        elif word == "/adapter":
            self._adapter(rest.strip())
        elif word in ("/help", "/?"):
            self._note(f"{HELP} {ADAPTERS}" if hasattr(self.engine, "names") else HELP)
        elif word.startswith("/") and "/" not in word[1:]:
            self._note(f"There is no {word}. {HELP}")
        else:
            try:
                self.ask(line.strip())
            except TuneletError as error:  # too long a conversation, say: it can be mended without leaving
                self.messages = self.messages[: -1 if self.messages and self.messages[-1].role == "user" else None]
                self._note(f"{error}\n/reset begins a new conversation.")
        return True

    def ask(self, text: str) -> str:
        """Print the answer as it comes, keep both in the history; returns the answer."""
        from tunelet.data.examples import Message

        self.messages.append(Message("user", text))
        if self.raw:
            ids = self.engine.renderer.raw(text)
        else:
            head = [Message("system", self.system)] if self.system else []
            ids = self.engine.renderer.prompt([*head, *self.messages])
        pieces: list[str] = []
        stream = self.engine.stream(ids, **self.options)
        try:
            while True:
                piece = next(stream)
                pieces.append(piece)
                self.console.print(piece, end="", markup=False)
                self.console.file.flush()
        except StopIteration as end:
            self.finish, self.tokens = end.value.finish, end.value.tokens
        except KeyboardInterrupt:
            self.finish = "interrupted"
            if not sys.stdin.isatty():
                raise
        self.console.print()
        self.messages.append(Message("assistant", "".join(pieces)))
        return "".join(pieces)

    def as_row(self) -> dict[str, Any]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": head + [message.as_dict() for message in self.messages]}

    def _adapter(self, mix: str) -> None:
        """Answer on with other adapters; the conversation is kept."""
        names = getattr(self.engine, "names", None)
        if names is None:
            self._note("No adapters are loaded: tunelet chat --adapter NAME=RUN loads some.")
            return
        try:
            if mix:
                self.engine.use(mix)
        except TuneletError as error:
            self._note(str(error))
            return
        self._note(f"Adapters: {', '.join(names)}. In use: {self.engine.used}.")

    def _save(self, name: str) -> None:
        """Append the conversation to a JSONL file: a row that can be trained on."""
        if not name:
            self._note("Save where? /save my-conversations.jsonl")
            return
        try:
            with Path(name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.as_row(), ensure_ascii=False) + "\n")
        except OSError as error:
            self._note(f"{name} can't be written: {error.strerror}")
            return
        self._note(f"Saved as a row of {name}.")

    def _note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False)


def _read_line(console: Console) -> str | None:
    try:
        return console.input("[bold]> [/]" if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            console.print()
        return None


def generate(
    prompts: Annotated[
        Path,
        typer.Option("--prompts", metavar="FILE", help="Text: a prompt a line. JSONL: rows with prompt or messages."),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The JSONL file to write, in the prompts' order.")],
    model: RunOrModel = None,
    adapter: Adapters = None,
    use: Use = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="System message for prompts without one.")] = "",
    max_new_tokens: MaxNew = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts answered at the same time.")] = 32,
    raw: Raw = False,
    template: Template = None,
    engine: Engine = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    json_to: Json = None,
) -> None:
    """Answer a file of prompts. Stopped half-way, the same command goes on where it was.

    With --adapter a row may say which it is for: {"prompt": "...", "adapter": "NAME"} (or A+B, 0.7*A+0.3*B, off).
    """
    console = open_console(json_to)
    from tunelet.infer.batch import answer_file

    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    name = choose_engine(engine, model, batch_size, adapter, device, dtype, trust)
    settings = options | {"model": model, "system": system, "raw": raw, "template": template, "batch_size": batch_size}
    settings["engine"] = name  # one file of answers has one author
    if adapter:
        from tunelet.infer.adapters import named

        settings |= {"adapters": named(adapter), "use": use}

    def opened() -> Any:
        return open_engine(
            model,
            device=device,
            dtype=dtype,
            trust=trust,
            template=template,
            adapters=adapter,
            use=use,
            engine=name,
            slots=batch_size,
        )

    write_json(answer_file(prompts, out, opened, settings, console), json_to)

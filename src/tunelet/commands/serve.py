"""The verb `serve`: models behind an OpenAI-compatible API, with a page to chat on. The work is done in `serve/`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tunelet.commands.common import Template, choice_of, open_console
from tunelet.errors import TuneletError

KEY = "TUNELET_API_KEY"
INSTALL = "pip install 'tunelet[serve]'"


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN...", help="Runs, starter, model folders or hub ids. The name is used in requests."
        ),
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="[NAME=]RUN", help="An adapter on one of the models. Repeat for more."),
    ] = None,
    engine: Annotated[str, typer.Option(metavar="E", help="auto, llama.cpp or torch.")] = "auto",
    quant: Annotated[
        str, typer.Option(metavar="Q", help="Weights of llama.cpp: q8_0, q4_0, bf16, f16 or f32.")
    ] = "q8_0",
    slots: Annotated[int, typer.Option(min=1, max=256, metavar="N", help="Requests answered at the same time.")] = 4,
    context: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Tokens of prompt and answer together. Default: the model's, at most 2048."
        ),
    ] = 0,
    template: Template = None,
    device: Annotated[str, typer.Option(metavar="D", help="Of torch: auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(metavar="D", help="Of torch: auto, float32 or bfloat16.")] = "auto",
    host: Annotated[str, typer.Option(metavar="H", help="Address to listen on. Others than loopback need a key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="FILE", help=f"Holds the key of requests. Or set {KEY}."),
    ] = None,
    queue: Annotated[
        int, typer.Option(min=0, metavar="N", help="Requests that wait for a slot; more get status 429.")
    ] = 64,
    max_body: Annotated[
        int, typer.Option("--max-body", min=1024, metavar="BYTES", help="Largest request; larger ones get 413.")
    ] = 4 * 2**20,
    timeout: Annotated[
        float, typer.Option(min=0, metavar="S", help="Seconds that a stop waits for answers under way.")
    ] = 30.0,
    grammars: Annotated[
        bool,
        typer.Option(
            "--allow-grammar", help="Take GBNF grammars in requests. One of a few lines can stop all others' answers."
        ),
    ] = False,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write requests with what they say into the log.")
    ] = False,
) -> None:
    """Serve models over OpenAI's API, until Ctrl-C or SIGTERM. Open the address in a browser to chat."""
    console = open_console()
    try:
        from tunelet.serve import opening, server
        from tunelet.serve.app import App
        from tunelet.serve.guard import LOOPBACK
    except ImportError as error:
        raise TuneletError("the server's packages are not installed", why=str(error), fix=INSTALL) from error
    from tunelet.infer import gguf_export

    choice_of("--engine", engine, opening.ENGINES)
    choice_of("--device", device, ("auto", "cpu", "cuda", "mps"))
    choice_of("--dtype", dtype, ("auto", "float32", "bfloat16"))
    gguf_export.check_quant(quant)
    key, local = _key(api_key_file), host in LOOPBACK
    if not local and not key:
        raise TuneletError(
            f"--host {host} needs a key",
            why="whoever reaches that address could use the model",
            fix=f"set {KEY}, or name a file: --api-key-file FILE (openssl rand -hex 24 > FILE makes one)",
        )
    named, adapters = opening.names(models, adapter or [])
    options = opening.Options(engine, quant, slots, context, queue, template or "", device, dtype)
    app = App(key=key, local=local, max_body=max_body, log_prompts=log_prompts, grammars=grammars)

    def tell(line: str) -> None:
        console.print(line, markup=False)

    with server.bound(host, port) as sock:
        where = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"

        def ready() -> None:
            tell(f"Ready: {where} (a page to chat on), {where}/v1 (the API). Ctrl-C stops.")

        def load() -> opening.Models:
            return opening.open_models(named, adapters, options, app.metrics, tell)

        server.run(server.Server(app, load, ready, timeout), sock)
    console.print("Stopped.", markup=False)


def _key(file: Path | None) -> str:
    if file is None:
        key, whence = os.environ.get(KEY, "").strip(), KEY
    else:
        whence = f"--api-key-file {file}"
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise TuneletError(f"{whence}: can't be read", why=str(error), fix="name a text file") from error
        if not key:
            raise TuneletError(f"{whence}: it is empty", fix=f"openssl rand -hex 24 > {file}")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise TuneletError(f"{whence}: it holds no key", why="a key is one line of letters, digits and signs")
    return key

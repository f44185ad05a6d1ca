"""Runs and models become what is served: which engine each gets, its files, its names.

Not for the engines (infer/) nor for the process (server.py). torch is imported where the torch engine or a score is
asked for, and nowhere else: llama.cpp starts in a second or two.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunelet.data.render import Renderer, load_tokenizer
from tunelet.errors import TuneletError
from tunelet.infer import gguf_source
from tunelet.serve.desk import Desk
from tunelet.serve.metrics import Metrics
from tunelet.serve.models import Models, Served
from tunelet.serve.scoring import Scorer

ENGINES = ("auto", "llama.cpp", "torch")
NAME = re.compile(r"[A-Za-z0-9][\w.:-]{0,99}")
CONTEXT = 2048  # tokens of a slot where nothing is asked for: memory is taken for all slots at the start
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Options:
    engine: str = "auto"
    quant: str = "q8_0"
    slots: int = 4
    context: int = 0
    queue: int = 64
    template: str = ""
    device: str = "auto"
    dtype: str = "auto"


def names(paths: Sequence[str], adapters: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(models, adapters): name -> path. NAME=PATH gives a name, else it is the folder's. Raises TuneletError."""
    out: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for found, given in zip(out, (paths, adapters), strict=True):
        for one in given:
            name, equals, path = one.partition("=")
            if not equals or not NAME.fullmatch(name):
                path, name = one, re.sub(r"[^\w.:-]", "-", Path(one).resolve().name if Path(one).exists() else one)
            if not NAME.fullmatch(name) or name in out[0] or name in out[1]:
                why = "two have it" if name in out[0] or name in out[1] else "it is no name"
                raise TuneletError(
                    f"'{one}' cannot be served as '{name}'.", why=why, fix=f"give it another name: NAME={path}"
                )
            found[name] = path
    return out


def open_models(
    paths: Mapping[str, str],
    adapters: Mapping[str, str],
    options: Options,
    metrics: Metrics,
    tell: Callable[[str], None],
) -> Models:
    """All of them, ready to answer. tell: gets a line about each. Raises TuneletError for what cannot be served."""
    served: list[Served] = []
    bases = {gguf_source.source(path).folder.resolve(): name for name, path in paths.items()}
    of: dict[str, dict[str, str]] = {name: {} for name in paths}
    for name, path in adapters.items():
        source = gguf_source.source(path)
        if source.base is None:
            raise TuneletError(
                f"--adapter {name}={path}: it is no adapter", fix=f"serve it by itself: tunelet serve {path}"
            )
        if source.base.resolve() not in bases:
            raise TuneletError(
                f"--adapter {name}={path}: its base is not served",
                why=f"it was trained on {source.base}",
                fix=f"name that, too: tunelet serve {source.base} --adapter {name}={path}",
            )
        of[bases[source.base.resolve()]][name] = path
    for name, path in paths.items():
        opened = _open(name, path, of[name], options, metrics, tell)
        served += opened
    return Models(served)


def _open(
    name: str,
    path: str,
    adapters: Mapping[str, str],
    options: Options,
    metrics: Metrics,
    tell: Callable[[str], None],
) -> list[Served]:
    """The model, then its adapters."""
    file, why = _gguf(name, path, options, tell)
    renderers = {one: _renderer(where, options.template) for one, where in ({name: path} | dict(adapters)).items()}
    if file is None:
        out = []
        for one, where in ({name: path} | dict(adapters)).items():
            engine = _torch(where, renderers[one], options)
            tell(f"{one}: torch{why}, {engine.slots} slots of {engine.max_length} tokens")
            scorer = Scorer(lambda engine=engine: engine.model, options.queue)
            out.append(Served(one, Desk(engine, options.queue, metrics), renderers[one], scorer))
        return out
    for adapter, where in adapters.items():
        if set(renderers[adapter].stop_ids) != set(renderers[name].stop_ids):
            raise TuneletError(
                f"--adapter {adapter}={where}: its answers end with another token than its base's",
                why="one engine serves both, and looks for one kind of end",
                fix=f"serve it by itself: tunelet serve {adapter}={where}",
            )
    engine = _llama_cpp(file, adapters, renderers[name], options)
    desk = Desk(engine, options.queue, metrics)
    tell(f"{name}: llama.cpp, {options.quant}{why}, {engine.slots} slots of {engine.max_length} tokens")
    out = [Served(name, desk, renderers[name], Scorer(lambda: _model(path, options), options.queue))]
    for adapter, where in adapters.items():
        scorer = Scorer(lambda where=where: _model(where, options), options.queue)
        out.append(Served(adapter, desk, renderers[adapter], scorer, adapter))
        tell(f"{adapter}: an adapter on {name}")
    return out


def _gguf(name: str, path: str, options: Options, tell: Callable[[str], None]) -> tuple[Path | None, str]:
    """(the file that llama.cpp reads, ""), or (None, why it is torch that answers)."""
    if options.engine == "torch":
        return None, ""
    if options.engine == "auto" and importlib.util.find_spec("xllamacpp") is None:
        return None, " (llama.cpp is not installed)"
    from tunelet.infer import bench, gguf_export

    tell(f"{name}: looking for its GGUF file, which is made and proved once")
    try:
        file = gguf_export.ready(path, options.quant).file
    except TuneletError as error:
        if options.engine != "auto":
            raise
        return None, f" ({error.why or error.what})"
    measured = bench.kept(path) if options.engine == "auto" else None
    found = bench.fastest(measured, options.quant, options.slots) if measured is not None else None
    if found is not None and found[0] == "torch":  # not taken by itself: it has no schemas, no calls that are required
        tell(f"{name}: --engine torch would be faster for {options.slots} at once ({found[1]}); it has no JSON schemas")
    return file, ""


def _renderer(path: str, template: str) -> Renderer:
    source = gguf_source.source(path)
    own = any((source.folder / file).is_file() for file in TOKENIZER)
    return Renderer(load_tokenizer(source.folder if own or source.base is None else source.base, template))


def _llama_cpp(file: Path, adapters: Mapping[str, str], renderer: Renderer, options: Options) -> Any:
    from tunelet.infer import gguf_export, llama_cpp

    loras = {name: gguf_export.ready(path, "f16", lora=True).file for name, path in adapters.items()}
    return llama_cpp.LlamaCppEngine(
        file,
        renderer.tokenizer,
        renderer,
        slots=options.slots,
        context=_context(options.context, llama_cpp.trained_length(file)),
        adapters=loras,
    )


def _torch(path: str, renderer: Renderer, options: Options) -> Any:
    from tunelet.infer.continuous import ContinuousEngine
    from tunelet.infer.engine import context_length

    model = _model(path, options)
    context = _context(options.context, context_length(model.config))
    return ContinuousEngine(model, renderer.tokenizer, renderer, slots=options.slots, context=context)


def _context(asked: int, trained: int) -> int:
    if trained and asked > trained:
        raise TuneletError(
            f"--context {asked}: this model reads at most {trained} tokens",
            why="past that length its positions were never trained",
            fix=f"--context {trained} or less",
        )
    return asked or min(CONTEXT, trained or CONTEXT)


def _model(path: str, options: Options) -> Any:
    from tunelet.models import device, load

    choice = device.choose(options.device, options.dtype)
    device.apply(choice)
    return load.load_model(path, choice)

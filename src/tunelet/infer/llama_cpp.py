"""The llama.cpp engine, through the xllamacpp wheel: GGUF files on the CPU, many requests at once.

Not for making those files (gguf_file.py), not for templates (prompts are token ids from data/render.py), and not for
scoring texts: llama.cpp gives log-probabilities of what it samples alone.

Every request is a stream, because only a stream can be ended early. Text is made here from the token ids, with the
model's own tokenizer, as for every other engine.
"""

from __future__ import annotations

import functools
import json
import secrets
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError
from tunelet.infer import gguf_export
from tunelet.infer.gguf_bytes import TokenBytes
from tunelet.infer.request import Emit, Piece, Request, Submitting, check_prompt
from tunelet.infer.text import TextStream
from tunelet.runs.environment import usable_cores

BATCH = 512  # prompt tokens computed at once
LARK = "%llguidance"  # what a grammar begins with that llguidance reads, in place of llama.cpp's own GBNF
PUSHED = "xXqQyY"  # letters that no JSON begins with
STRING, ARRAY, NUMBERS = 8, 9, "BbHhIif?__QqdX"  # kinds of values in a GGUF file, and struct's letters for them
KEPT = 255  # schemas remembered as understood


class LlamaCppEngine(Submitting):
    """file: a GGUF file; tokenizer, renderer: of the model it was made from. slots: requests answered at once, each of
    which has room for `context` tokens (0: as many as the model reads). adapters: name -> GGUF file of a LoRA, which a
    request asks for by name. threads: 0: as many as this process may use. cache_mb: fewer slots where their keys and
    values would take more; 0: no limit.

    Raises TuneletError where xllamacpp is not installed or does not load the file.
    """

    name = "llama.cpp"

    def __init__(
        self,
        file: Path,
        tokenizer: Any,
        renderer: Any,
        *,
        slots: int = 1,
        context: int = 0,
        threads: int = 0,
        adapters: Mapping[str, Path] | None = None,
        cache_mb: float = 0,
    ):
        gguf_export.check_installed()
        import xllamacpp

        facts = about(file)
        self._length = context or int(facts["context_length"])
        if cache_mb:
            slots = min(slots, max(1, int(cache_mb * 1e6 / (self._length * _token_bytes(facts)))))
        self.file, self.tokenizer, self.renderer, self.slots = file, tokenizer, renderer, slots
        self.stop_ids = frozenset(renderer.stop_ids) if renderer is not None else frozenset()
        self.adapters = list(adapters or {})
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel = slots * self._length, slots
        threads = threads or usable_cores()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_ubatch = BATCH
        params.verbosity = -1
        params.warmup = False
        # What llama.cpp puts aside of earlier prompts (up to 8 GB) it takes up again whichever adapter read them: an
        # adapter then answers as the base does. A slot's own beginning is known to be of its adapter, and stays.
        params.cache_ram_mib = 0
        # llama.cpp opens a port of its own, on loopback; nobody but this object knows its key
        self._key = secrets.token_hex(16)
        params.api_keys = [self._key]
        params.cors_origins = ""
        params.endpoint_slots = False
        params.ui = False
        if adapters:
            params.lora_adapters = [_adapter(xllamacpp, path) for path in adapters.values()]
            params.lora_init_without_apply = True
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise TuneletError(
                f"{file}: llama.cpp does not load it.",
                why=" ".join(str(error).split()),
                fix="make it again: tunelet export RUN --to gguf",
            ) from error
        self._under_way: set[_Run] = set()
        self._understood: set[str] = set()  # schemas and grammars, as text
        self._lock = threading.Lock()

    @property
    def max_length(self) -> int:
        return self._length

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)

    def submit(self, request: Request, emit: Emit) -> _Run:
        check_prompt(request.prompt, self._length, "The prompt")
        body = self._body(request)
        run = _Run(self, request, emit, body)
        with self._lock:
            self._under_way.add(run)
        run.thread.start()
        return run

    def close(self) -> None:
        """End what is under way and free the model's memory."""
        with self._lock:
            runs = list(self._under_way)
        for run in runs:
            run.cancel()
        for run in runs:
            run.thread.join()
        self._server = None

    def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One of llama.cpp's own endpoints (/tokenize, /apply-template), for checks of what a file holds."""
        import urllib.request

        url = self._server.listening_address + path
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        asked = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as answer:
            return json.loads(answer.read())

    def _understands(self, body: Mapping[str, Any]) -> bool:
        """Whether llama.cpp is held to the schema or grammar: one that llguidance can't read it passes over in silence.
        So it is asked for one token, and pushed to one that no JSON and no call of a tool begins with.
        """
        rules = {name: body[name] for name in ("json_schema", "grammar") if name in body}
        if not rules or not ("json_schema" in rules or rules["grammar"].startswith(LARK)):
            return True
        text = json.dumps(rules)
        if text not in self._understood:
            pushed = next(
                (id_ for letter in PUSHED if (id_ := self.tokenizer.get_vocab().get(letter)) is not None), None
            )
            asked = {"prompt": body["prompt"][-1:], "max_tokens": 1, "stream": True, "verbose": True, "temperature": 0}
            ids: list[int] = []

            def told(chunk: Any) -> bool:
                found = json.loads(chunk) if isinstance(chunk, str | bytes) else chunk
                ids.extend(found.get("__verbose", {}).get("tokens", []))
                return False

            self._server.handle_completions(asked | rules | {"logit_bias": [[pushed, 1e4]]}, told)
            if not ids or ids[0] == pushed:
                return False
            self._understood = {*list(self._understood)[-KEPT:], text}
        return True

    def _body(self, request: Request) -> dict[str, Any]:
        """The request in llama.cpp's words: each of its own defaults (top_k 40, min_p 0.05, ...) is said otherwise."""
        s = request.sampling
        room = self._length - len(request.prompt)
        body: dict[str, Any] = {
            "prompt": list(request.prompt),
            "max_tokens": min(request.max_new_tokens, room),
            "stream": True,
            "verbose": True,  # the ids of the tokens
            "cache_prompt": True,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k,
            "min_p": 0.0,
            "repeat_penalty": s.repetition_penalty,
            "repeat_last_n": self._length,
            "presence_penalty": s.presence_penalty,
            "frequency_penalty": s.frequency_penalty,
            "seed": s.seed,
            "samplers": ["penalties", "temperature", "top_k", "top_p"],
            "logit_bias": [[id_, bias] for id_, bias in request.logit_bias.items()],
        }
        if request.logprobs is not None:
            body["logprobs"] = max(1, request.logprobs)
        if request.schema is not None:
            body["json_schema"] = request.schema
        elif request.grammar:
            body["grammar"] = request.grammar
        if self.adapters:
            on = request.adapter
            if on and on not in self.adapters:
                raise TuneletError(f"there is no adapter {on!r}", why=f"loaded are: {', '.join(self.adapters)}")
            body["lora"] = [{"id": n, "scale": float(name == on)} for n, name in enumerate(self.adapters)]
        return body


class _Run:
    """One request in a thread of its own: llama.cpp's own loop does the work, this waits for it."""

    def __init__(self, engine: LlamaCppEngine, request: Request, emit: Emit, body: dict[str, Any]):
        self.engine, self.request, self.emit, self.body = engine, request, emit, body
        self.text = TextStream(engine.tokenizer, request.stop)
        self.count = 0
        self.finish, self.error = "", ""
        self.cancelled = False
        self.thread = threading.Thread(target=self._work, name="llama.cpp request", daemon=True)

    def cancel(self) -> None:
        self.cancelled = True

    def _work(self) -> None:
        try:
            if self.engine._understands(self.body):
                self.engine._server.handle_completions(self.body, self._told)
            else:
                self.finish, self.error = "refused", "llama.cpp does not understand this JSON schema or grammar"
        except Exception as error:  # whatever it was, the one who waits must hear of it
            self.finish, self.error = "error", f"{type(error).__name__}: {error}"
        with self.engine._lock:
            self.engine._under_way.discard(self)
        self.emit(Piece(None, self.text.finish(), finish=self.finish or "cancelled", error=self.error))

    def _told(self, chunk: Any) -> bool:
        """A chunk of the stream. True: no more of it, which frees the slot."""
        if self.cancelled:
            return True
        found = json.loads(chunk) if isinstance(chunk, str | bytes) else chunk
        if "error" in found or "code" in found:
            told = found.get("error", found)
            self.finish = "refused" if told.get("code") == 400 else "error"
            self.error = str(told.get("message", told))
            return True
        verbose = found.get("__verbose", {})
        ids, said = verbose.get("tokens", []), verbose.get("tokens_predicted", self.count)
        [choice] = found.get("choices") or [{}]
        told = (choice.get("logprobs") or {}).get("content", [])
        if ids and (held := said - self.count - len(ids)) > 0:  # it ended inside a character, and was not told
            before = self.engine.token_bytes.held_back(choice.get("text", ""), ids[0], held)
            ids, told = [*before, *ids], [*([None] * len(before)), *told]
        for place, token in enumerate(ids):
            if token in self.engine.stop_ids:
                self.finish = "stop"
                return True
            piece = self.text.push(token)
            about = told[place] if place < len(told) else None
            logprob, top = _logprobs(about, self.request.logprobs) if about else (None, ())
            self.emit(Piece(token, piece, logprob, top))
            if self.text.stopped:
                self.finish = "stop"
                return True
        self.count = max(self.count, said)
        if reason := choice.get("finish_reason"):
            most = self.count >= self.request.max_new_tokens
            self.finish = "stop" if reason == "stop" else "length" if most else "context"
        return False


def _logprobs(told: Mapping[str, Any], most: int | None) -> tuple[float, list[tuple[int, float]]]:
    top = [(one["id"], one["logprob"]) for one in told.get("top_logprobs", [])]
    return told["logprob"], top[:most]


def _adapter(xllamacpp: Any, path: Path) -> Any:
    info = xllamacpp.CommonAdapterLoraInfo()
    info.path, info.scale = str(path), 0.0
    return info


def trained_length(file: Path) -> int:
    """How many tokens the model in a GGUF file reads."""
    return int(about(file)["context_length"])


def about(file: Path) -> dict[str, Any]:
    """What a GGUF file says of its model: context_length, block_count, attention.key_length, ... Key by key up to the
    tokenizer: gguf's own reader goes through the vocabulary first, for two seconds of 49,152 entries."""
    out: dict[str, Any] = {}
    with file.open("rb") as opened:

        def number(kind: str) -> Any:
            return struct.unpack(f"<{kind}", opened.read(struct.calcsize(kind)))[0]

        def value(kind: int) -> Any:
            if kind == STRING:
                return opened.read(number("Q")).decode()
            if kind == ARRAY:
                return [value(each) for each, count in [(number("I"), number("Q"))] for _ in range(count)]
            return number(NUMBERS[kind])

        try:
            opened.seek(16)  # magic, version, number of tensors
            for _ in range(number("Q")):
                key, found = value(STRING), value(number("I"))
                if key.startswith("tokenizer."):
                    break
                out[key.partition(".")[2]] = found
            return {**out, "context_length": out["context_length"]}
        except (struct.error, UnicodeDecodeError, IndexError, KeyError, MemoryError, OverflowError) as error:
            raise TuneletError(
                f"{file}: llama.cpp does not load it.",
                why="it is no GGUF file, or a part of one",
                fix="make it again: tunelet export RUN --to gguf",
            ) from error


def _token_bytes(facts: Mapping[str, Any]) -> int:
    """Bytes of the keys and values of one token, in f16."""
    width = facts["attention.key_length"] + facts["attention.value_length"]
    return 2 * facts["block_count"] * facts["attention.head_count_kv"] * width

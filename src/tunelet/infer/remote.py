"""The engine behind an OpenAI-compatible address: vLLM, SGLang, Ollama, another tunelet. Spoken to, never imported.

Not for the HTTP client and its rules for keys (endpoint.py). The server has the model's template, so a prompt is the
messages themselves here, not token ids.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from tunelet.data.examples import Message
from tunelet.errors import TuneletError
from tunelet.infer.endpoint import Endpoint, Unanswered
from tunelet.infer.request import Completion, mixed

Prompt = Sequence[Message]


class _Messages:
    """In the place of a renderer: what is asked goes as it is."""

    def prompt(self, messages: Prompt, tools: Any = None) -> Prompt:
        if tools:
            raise TuneletError("tools are not passed on to an address", fix="take a local model")
        return list(messages)

    def raw(self, text: str) -> Prompt:
        raise TuneletError(
            "--raw: a chat endpoint puts its own template around every text", fix="leave it out, or take a local model"
        )


class RemoteEngine:
    """url: as for Endpoint, the model behind `#`. `generate` and `stream` as TorchEngine has them, on messages."""

    max_length = 0

    def __init__(self, url: str):
        self._endpoint = Endpoint(url, flag="--engine")
        self.name, self.renderer = self._endpoint.name, _Messages()
        self._endpoint.check()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        batch_size: int = 64,
        progress: Callable[[int], None] | None = None,
        heard: Callable[[str], None] | None = None,
    ) -> list[Completion]:
        """`batch_size`: requests in flight at once. heard: gets the text of all of them as it comes.

        Raises TuneletError for settings that the API has no word for, and where an answer cannot be had: what is half
        done is kept by whoever asked (see batch.py).
        """
        if top_k or repetition_penalty != 1:
            raise TuneletError(
                "top_k and repetition_penalty are not part of the API of an address", fix="leave them out: --top-p"
            )
        done: list[Completion | None] = [None] * len(prompts)
        with ThreadPoolExecutor(max(1, batch_size)) as pool:
            asked = {
                pool.submit(
                    self._answer,
                    prompt,
                    heard,
                    max_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    seed=mixed(seed, index),
                    stop=stop,
                ): index
                for index, prompt in enumerate(prompts)
            }
            try:
                for number, one in enumerate(as_completed(asked), 1):
                    done[asked[one]] = one.result()
                    if progress:
                        progress(number)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [one for one in done if one is not None]

    def stream(self, prompt: Prompt, *, max_new_tokens: int, **options: Any) -> Iterator[str]:
        """The answer in pieces, as the server sends them. A generator that is closed closes the connection."""
        told: queue.SimpleQueue[str | Future[list[Completion]]] = queue.SimpleQueue()
        closed = threading.Event()

        def heard(piece: str) -> None:
            if closed.is_set():
                raise TuneletError("nobody listens any more")
            told.put(piece)

        pool = ThreadPoolExecutor(1)
        asked = pool.submit(
            self.generate, [prompt], max_new_tokens=max_new_tokens, batch_size=1, heard=heard, **options
        )
        asked.add_done_callback(told.put)
        try:
            while isinstance(piece := told.get(), str):
                yield piece
            [done] = piece.result()
        finally:
            closed.set()
            pool.shutdown(wait=False)  # it ends with the next piece; nobody waits for that
        return done

    def _answer(self, prompt: Prompt, heard: Callable[[str], None] | None, **settings: Any) -> Completion:
        try:
            reply = self._endpoint.chat([message.as_dict() for message in prompt], heard=heard, **settings)
        except Unanswered as error:
            raise TuneletError(
                f"{self.name}: did not answer a prompt", why=str(error), fix="give the same command to go on"
            ) from error
        finish = "length" if reply.finish == "length" else "stop"
        return Completion(reply.text, (), finish, reply.tokens)

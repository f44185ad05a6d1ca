"""Log-probabilities of given texts, and embeddings: by torch, on the model as it is, loaded when it is first asked.

Not for writing answers (the engines), and not for benchmarks (evals/likelihood.py, whose figures these equal).
llama.cpp tells log-probabilities of what it samples alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from tunelet.serve.refusal import Refusal

BATCH_TOKENS = 2048  # of one forward: heads that are not plain give logits of all of them at once
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Scored:
    """Of one text, for each of its tokens but the first: logprobs, natural logarithms; top: the likeliest tokens at
    that place. next: (token, logprob) that is likeliest behind it; next_top: the likeliest there."""

    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    next: tuple[int, float]
    next_top: list[tuple[int, float]]


class Scorer:
    """load: gives the transformers model. One text-batch is computed at a time; `queue` more may wait."""

    def __init__(self, load: Callable[[], Any], queue: int):
        self._load, self.most = load, queue + 1
        self._model: Any = None
        self._pool = ThreadPoolExecutor(1, "scorer")
        self.waiting = 0

    async def score(self, texts: Sequence[Sequence[int]], top: int) -> list[Scored]:
        return await self._do(lambda model, gone: score(model, texts, top, gone))

    async def embed(self, texts: Sequence[Sequence[int]]) -> list[list[float]]:
        return await self._do(lambda model, gone: embed(model, texts, gone))

    async def _do(self, work: Callable[[Any, threading.Event], T]) -> T:
        if self.waiting >= self.most:
            raise Refusal(429, "Too many texts wait to be scored.", code="queue_full", headers={"Retry-After": "1"})
        gone = threading.Event()
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: self._work(work, gone))
        finally:
            gone.set()  # whoever asked is away, or has what they asked for
            self.waiting -= 1

    def _work(self, work: Callable[[Any, threading.Event], T], gone: threading.Event) -> T:
        if self._model is None:
            self._model = self._load()
        return work(self._model, gone)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def score(model: Any, texts: Sequence[Sequence[int]], top: int, gone: threading.Event) -> list[Scored]:
    """The log-probabilities of texts, whatever shares a forward with them: differences are those of rounding."""
    import torch

    out: list[Scored] = []
    with torch.inference_mode():
        for batch in _batches(texts, gone):
            flat = torch.tensor([id_ for text in batch for id_ in text])
            targets = torch.cat([flat[1:], flat[:1]])  # the last of each text has none: what stands there is not used
            logprobs, tops = [], []
            for rows, targeted in _logprob_rows(model, batch, targets):
                logprobs += rows.gather(1, targeted[:, None])[:, 0].tolist()
                values, ids = rows.topk(max(1, top))
                tops += [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
            start = 0
            for text in batch:
                end = start + len(text) - 1
                nexts = tops[end]
                out.append(Scored(logprobs[start:end], [t[:top] for t in tops[start:end]], nexts[0], nexts[:top]))
                start = end + 1
    return out


def embed(model: Any, texts: Sequence[Sequence[int]], gone: threading.Event) -> list[list[float]]:
    """The mean of each text's last hidden states, of length 1."""
    import torch

    from tunelet.models import head

    out: list[list[float]] = []
    with torch.inference_mode():
        for batch in _batches(texts, gone):
            hidden = head.hidden_states(model, _packed(model, batch)).float()
            start = 0
            for text in batch:
                mean = hidden[start : start + len(text)].mean(0)
                out.append(torch.nn.functional.normalize(mean, dim=0).tolist())
                start += len(text)
    return out


def _batches(texts: Sequence[Sequence[int]], gone: threading.Event) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    size = 0
    for text in texts:
        if batch and size + len(text) > BATCH_TOKENS:
            yield batch
            batch, size = [], 0
        if gone.is_set():
            return
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _packed(model: Any, texts: Sequence[Sequence[int]]) -> Any:
    """models' Batch of texts one after the other, every position scored."""
    import itertools

    import torch

    from tunelet.data.examples import Batch
    from tunelet.models import head

    ids = torch.tensor([id_ for text in texts for id_ in text])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    borders = torch.tensor([0, *itertools.accumulate(len(text) for text in texts)])
    none = torch.empty(0, dtype=torch.int64)
    batch = Batch(ids, positions, borders, torch.arange(len(ids)), none, none, none.float(), none.bool())
    return batch.to(head.causal_lm(model).get_input_embeddings().weight.device)


def _logprob_rows(model: Any, texts: Sequence[Sequence[int]], targets: Any) -> Iterator[tuple[Any, Any]]:
    """([n, vocabulary] fp32 log-probabilities, [n] targets) in chunks, along the same paths as evals/likelihood.py."""
    import torch

    from tunelet.models import head, sequences

    batch = _packed(model, texts)
    if not head.is_plain(model):
        rows = torch.log_softmax(head.own_logits(model, batch), -1, dtype=torch.float32)
        yield rows, targets.to(rows.device)
        return
    hidden = head.hidden_states(model, batch)
    weight = head.causal_lm(model).get_output_embeddings().weight
    factor, chunk = sequences.as_factor(weight), max(1, head.CHUNK_ELEMENTS // weight.shape[0])
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        rows = sequences.logp_of(hidden[part], factor)
        yield rows, targets[part].to(rows.device)

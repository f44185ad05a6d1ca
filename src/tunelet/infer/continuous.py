"""The torch engine for requests that come one by one: each joins the batch as soon as there is room and leaves it when
it has ended (continuous batching), and what its prompt shares with earlier ones is not computed again.

Not for a fixed list of prompts (engine.py) and not for the cache's layout (slots.py). One thread owns model and cache;
`submit` and `cancel` only leave word for it. A long prompt is read in parts, and the others go on between them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from tunelet.errors import TuneletError
from tunelet.infer.cache import RoomyLayer
from tunelet.infer.engine import TorchEngine, make_cache
from tunelet.infer.request import Emit, Piece, Request, Submitting, check_prompt
from tunelet.infer.sampling import Sampler
from tunelet.infer.slots import Pairs, Prefixes, SlotCache, shared
from tunelet.infer.text import TextStream
from tunelet.models import virtual

READ = 512  # tokens read at once: more stops the others for longer, fewer reads the weights more often
ALIKE = 2.0  # prompts are read together where the longest is at most so much longer than the shortest


@dataclass(eq=False)
class _Row:
    """A request under way. ids: prompt and answer so far; answer: tokens of the answer; most: that it may have."""

    request: Request
    emit: Emit
    text: TextStream
    sampler: Sampler | None
    ids: list[int]
    most: int
    cancelled: bool = False
    answer: int = 0

    def cancel(self) -> None:
        self.cancelled = True

    def pick(self, logits: torch.Tensor) -> int:
        """logits: [vocabulary] fp32, the model's own."""
        if self.request.logit_bias:
            logits = logits.clone()
            for id_, bias in self.request.logit_bias.items():
                logits[id_] += bias
        return int(self.sampler.pick(logits[None])) if self.sampler else int(logits.argmax())


@dataclass
class _Reading:
    """Prompts that are read together, their ends in one column. ids, positions: [rows, columns to read]; seen: [rows,
    all columns], those included that were known; lengths: columns of each row; done: columns that have been read."""

    rows: list[_Row]
    cache: Any
    ids: torch.Tensor
    seen: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    done: int = 0


class ContinuousEngine(Submitting):
    """model, tokenizer, renderer: as for TorchEngine. slots: rows of the batch; context: most tokens of a row (0: as
    many as the model reads); prefix_mb: what may be kept of earlier rows."""

    name = "torch"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        renderer: Any = None,
        *,
        slots: int = 8,
        context: int = 0,
        prefix_mb: float = 256,
        stop_ids: Sequence[int] = (),
    ):
        plain = TorchEngine(model, tokenizer, renderer, stop_ids=stop_ids)
        self.model, self.tokenizer, self.renderer, self.slots = model, tokenizer, renderer, slots
        self.stop_ids = plain.stop_ids
        self._causal = plain._causal()
        self._length = min(context, plain.max_length) if context and plain.max_length else context or plain.max_length
        if not self._length:
            raise TuneletError("how many tokens may a request have?", why="the model sets no limit", fix="--context N")
        self._check_layers()
        self._name = virtual.cache_name(self._causal)
        own = virtual.of(self._causal)
        self._before = own.number if own else 0
        self._own: Pairs | None = None
        self._device = next(model.parameters()).device
        self._layers = len(make_cache(model.config, 1).layers)
        self._slots = SlotCache(self._layers, slots, self._length + self._before)
        self._alive: set[_Row] = set()  # all that have not been told their end
        self._rows: list[_Row] = []
        self._prefixes = Prefixes(prefix_mb)
        self._waiting: deque[_Row] = deque()
        self._reading: _Reading | None = None
        self._word = threading.Condition()
        self._ended = False
        model.eval()
        self._thread = threading.Thread(target=self._work, name="torch engine", daemon=True)
        self._thread.start()

    @property
    def max_length(self) -> int:
        return self._length

    def submit(self, request: Request, emit: Emit) -> _Row:
        check_prompt(request.prompt, self._length, "The prompt")
        if request.schema is not None or request.grammar:
            raise TuneletError(
                "the torch engine has no grammars",
                why="they restrict each token, which llama.cpp does",
                fix="--engine llama.cpp",
            )
        if request.adapter:
            raise TuneletError(f"there is no adapter {request.adapter!r}", why="this engine has one model, as it is")
        s = request.sampling
        plain = not s.temperature and s.repetition_penalty == 1 and not s.presence_penalty and not s.frequency_penalty
        row = _Row(
            request,
            emit,
            TextStream(self.tokenizer, request.stop),
            None if plain else Sampler(s, [list(request.prompt)], [0], self._device),
            [int(id_) for id_ in request.prompt],
            min(request.max_new_tokens, self._length - len(request.prompt)),
        )
        with self._word:
            if self._ended:
                raise TuneletError("the engine has been closed")
            self._alive.add(row)
            self._waiting.append(row)
            self._word.notify()
        return row

    def close(self) -> None:
        with self._word:
            self._ended = True
            self._word.notify()
        self._thread.join()

    # -- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with torch.inference_mode():
            while self._wait():
                try:
                    self._turn()
                except Exception as error:  # whatever it was, those who wait must hear of it; the engine goes on
                    self._fail(error)
        self._fail(None)

    def _wait(self) -> bool:
        """Until there is something to do; False: no more."""
        with self._word:
            while not (self._ended or self._waiting or self._rows or self._reading):
                self._word.wait()
            return not self._ended

    def _turn(self) -> None:
        """One part of a prompt, or of several, and one step of all rows."""
        for row in [row for row in self._rows if row.cancelled]:
            self._end(row, "cancelled")
        with self._word:
            gone = [row for row in self._waiting if row.cancelled]
            for row in gone:
                self._waiting.remove(row)
        for row in gone:
            self._tell_end(row, "cancelled")
        if self._reading is None:
            self._reading = self._next()
        if self._reading is not None:
            self._read(self._reading)
        if self._rows:
            self._step()

    def _fail(self, error: Exception | None) -> None:
        """All that is under way ends here, wherever it was; None: because the engine does."""
        with self._word:
            gone = list(self._alive)
            self._waiting.clear()
        self._reading, self._rows = None, []
        self._slots = SlotCache(self._layers, self.slots, self._length + self._before)
        told = "" if error is None else f"{type(error).__name__}: {error}"
        for row in gone:
            self._tell_end(row, "error" if told else "cancelled", told)

    def _tell_end(self, row: _Row, finish: str, error: str = "") -> None:
        with self._word:
            self._alive.discard(row)
        row.emit(Piece(None, row.text.finish(), finish=finish, error=error))

    # -- joining ------------------------------------------------------------------------------------------------------

    def _next(self) -> _Reading | None:
        """The prompts that are read next, as many as there is room for and as are about equally long."""
        rows: list[_Row] = []
        with self._word:
            free = self.slots - len(self._rows)
            while self._waiting and len(rows) < free:
                row = self._waiting[0]
                lengths = [len(one.ids) for one in (*rows, row)]
                if max(lengths) > ALIKE * min(lengths) or (rows and max(lengths) * len(lengths) > 2 * READ):
                    break
                if rows and len(row.ids) > READ // 2 and self._alike(row, rows):
                    break  # what they share is known once the first is read
                rows.append(self._waiting.popleft())
        return self._begin(rows) if rows else None

    @staticmethod
    def _alike(row: _Row, rows: Sequence[_Row]) -> bool:
        return any(shared(row.ids, one.ids) > len(row.ids) // 2 for one in rows)

    def _begin(self, rows: list[_Row]) -> _Reading:
        known = [self._known(row.ids[:-1]) for row in rows]
        # one width for all: of what is known of a row only so much is taken as leaves that width to read
        width = max(len(row.ids) - n for row, (n, _) in zip(rows, known, strict=True))
        lengths = [self._before + len(row.ids) for row in rows]
        columns = max(max(lengths), width)
        cache = self._fresh(columns)
        if columns > width:
            self._seed(cache, rows, known, lengths, columns - width, columns)
        starts = torch.tensor([columns - length for length in lengths])[:, None]
        at = torch.arange(columns)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        for place, row in enumerate(rows):
            tail = row.ids[-width:]
            ids[place, width - len(tail) :] = torch.tensor(tail)
        seen = (at >= starts).long()
        positions = (at - starts).clamp(min=0)[:, columns - width :]
        return _Reading(rows, cache, ids.to(self._device), seen.to(self._device), positions.to(self._device), lengths)

    def _known(self, ids: Sequence[int]) -> tuple[int, Pairs | None]:
        """(how many of these tokens are in a row, or were; their keys and values)"""
        best, pairs = self._prefixes.find(ids)
        place = None
        for number, row in enumerate(self._rows):
            if (n := shared(ids, row.ids[:-1])) > best:
                best, place = n, number
        if place is not None:
            pairs = self._slots.pairs(place, self._before + best)
        return best, pairs

    def _seed(
        self,
        cache: Any,
        rows: Sequence[_Row],
        known: Sequence[tuple[int, Pairs | None]],
        lengths: Sequence[int],
        upto: int,
        columns: int,
    ) -> None:
        """Fill the first `upto` of the columns with what is known of each row there."""
        for layer in range(self._layers):
            like = self._like()[layer]
            made = [x.new_zeros(len(rows), x.shape[0], upto, x.shape[2]) for x in like]
            for place, ((_, pairs), length) in enumerate(zip(known, lengths, strict=True)):
                start = columns - length
                if start < upto:  # what is known of it, or the virtual tokens alone
                    for buffer, found in zip(made, pairs[layer] if pairs else like, strict=True):
                        buffer[place, :, start:upto] = found[:, : upto - start]
            cache.update(*made, layer)

    def _like(self) -> Pairs:
        """Keys and values of one column, or of the virtual tokens, for their shapes and dtypes."""
        if self._own is None:
            cache = self._fresh(1)
            own = virtual.of(self._causal)
            if own:
                own.fill(cache, self._causal, 1)
            else:
                ids = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
                self._forward(ids, None, None, cache)
            self._own = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers]
        return self._own

    def _fresh(self, columns: int) -> Any:
        """An empty cache. Windows too are kept whole: the mask hides what is outside of them."""
        cache = DynamicCache()
        cache.layers = [RoomyLayer(columns) for _ in range(self._layers)]
        return cache

    def _read(self, reading: _Reading) -> None:
        """A part of the prompts; after the last one the rows join the batch, with their first tokens."""
        width = reading.ids.shape[1]
        part = max(1, READ // len(reading.rows))
        end = min(width, reading.done + part)
        columns = reading.seen.shape[1] - width + end
        here = slice(reading.done, end)
        logits = self._forward(
            reading.ids[:, here], reading.seen[:, :columns], reading.positions[:, here], reading.cache
        )
        reading.done = end
        if all(row.cancelled for row in reading.rows):
            reading.done = width
        if reading.done < width:
            return
        self._reading = None
        columns = reading.seen.shape[1]
        for place, (row, length) in enumerate(zip(reading.rows, reading.lengths, strict=True)):
            pairs = [
                (layer.keys[place, :, columns - length :], layer.values[place, :, columns - length :])
                for layer in reading.cache.layers
            ]
            if row.cancelled or not row.most:
                self._tell_end(row, "cancelled" if row.cancelled else "length")
                continue
            if (finish := self._token(row, logits[place])) is None:
                self._slots.join(pairs)
                self._rows.append(row)
            else:
                self._prefixes.keep(row.ids[: length - self._before], [(k.clone(), v.clone()) for k, v in pairs])
                self._tell_end(row, finish)

    # -- going on -----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        seen = self._slots.before_step().to(self._device)
        ids = torch.tensor([[row.ids[-1]] for row in self._rows], device=self._device)
        positions = torch.tensor([[self._before + len(row.ids) - 1] for row in self._rows], device=self._device)
        logits = self._forward(ids, seen, positions, self._slots.cache)
        self._slots.after_step()
        for row, of_row in zip(list(self._rows), logits, strict=True):
            if (finish := self._token(row, of_row)) is not None:
                self._end(row, finish)

    def _forward(self, ids: torch.Tensor, seen: Any, positions: Any, cache: Any) -> torch.Tensor:
        """[rows, vocabulary] fp32: logits behind the last column."""
        out = self._causal(
            input_ids=ids,
            attention_mask=seen,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._name: cache},
        )
        return out.logits[:, -1].float()

    def _token(self, row: _Row, logits: torch.Tensor) -> str | None:
        """Take the next token of a row and tell it. Why the row has ended, or None."""
        token = row.pick(logits)
        if token in self.stop_ids:
            return "stop"
        row.ids.append(token)
        row.answer += 1
        piece = row.text.push(token)
        logprob, top = None, ()
        if row.request.logprobs is not None:
            found = logits.log_softmax(-1)
            logprob = float(found[token])
            values, places = found.topk(min(row.request.logprobs, len(found)))
            top = tuple(zip(places.tolist(), values.tolist(), strict=True))
        row.emit(Piece(token, piece, logprob, top))
        if row.text.stopped:
            return "stop"
        if row.answer < row.most:
            return None
        return "length" if row.most == row.request.max_new_tokens else "context"

    def _end(self, row: _Row, finish: str) -> None:
        place = self._rows.index(row)
        # the last token was never read, so it has no keys
        self._prefixes.keep(row.ids[:-1], self._slots.pairs(place, self._slots.at - self._slots.starts[place]))
        self._slots.leave(place)
        self._rows[place] = self._rows[-1]
        self._rows.pop()
        self._tell_end(row, finish)

    def _check_layers(self) -> None:
        """Raises TuneletError for a model that keeps something else than keys and values of each token."""
        kinds = set(getattr(self.model.config.get_text_config(), "layer_types", None) or ())
        if other := kinds - {"full_attention", "sliding_attention"}:
            raise TuneletError(
                f"the torch engine cannot serve layers of the kind {', '.join(sorted(other))}",
                why="what they remember is no list of keys and values that rows could be moved in",
                fix="tunelet generate and tunelet chat run this model",
            )

"""/v1/completions: texts or token ids go on without a template, and what they are made of can be told (echo, logprobs).

Not for chats. Log-probabilities of the prompt are torch's, of the model as it is (scoring.py): an engine knows those of
its own answer alone. With temperature 0 one token behind a scored prompt comes out of the same computation.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from tunelet.serve import asked as fields
from tunelet.serve import writing
from tunelet.serve.desk import Answers
from tunelet.serve.models import Served
from tunelet.serve.refusal import bad
from tunelet.serve.scoring import Scored
from tunelet.serve.tokens import Told


class Completion:
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, asked: fields.Completion, served: Served):
        """Raises Refusal for what cannot be done."""
        self.asked, self.served, self.usage = asked, served, writing.Usage()
        self.given = asked.prompts
        if len(self.given) > writing.MOST:
            raise bad(f"'prompt' may hold {writing.MOST} prompts.", "prompt")
        self.prompts = [served.renderer.raw(one) if isinstance(one, str) else one for one in self.given]
        self.scored = asked.echo and asked.logprobs is not None
        if asked.logprobs is not None:
            _ = served.words  # made once, and not in the event loop's thread
        most = asked.max_tokens
        requests = writing.requests(asked, served, self.prompts, most, logprobs=asked.logprobs)
        # One greedy token behind a prompt that is scored anyway, as benchmarks ask for it, needs no second engine.
        plain = not (asked.temperature or asked.stops or asked.logit_bias or asked.grammar) and asked.n == 1
        plain = plain and not (asked.presence_penalty or asked.frequency_penalty) and asked.repetition_penalty == 1
        self.by_scorer = self.scored and most == 1 and plain
        self.requests = [] if self.by_scorer or not most else requests
        self.count = len(requests)
        self.usage.prompt = sum(map(len, self.prompts))
        self.answers: Answers | None = None

    def begin(self) -> None:
        if self.requests:
            self.answers = self.served.desk.ask(self.requests)

    def close(self) -> None:
        if self.answers is not None:
            self.answers.close()

    async def choices(self) -> AsyncIterator[list[dict[str, Any]]]:
        scores: list[Scored] = []
        if self.scored:
            scores = await self.served.scorer.score(self.prompts, self.asked.logprobs or 0)
        lengths = [0] * self.count  # characters of each choice so far
        if self.asked.echo or not self.requests:
            heads = [self._head(index, scores) for index in range(self.count)]
            lengths = [len(head["text"]) for head in heads]
            yield heads
        if self.answers is None:
            return
        async for index, piece in self.answers:
            told: list[Told] = []
            if piece.token is not None:
                self.usage.completion += 1
                told = [(piece.token, piece.logprob, piece.top)]
            if not (piece.text or piece.finish or (told and self.asked.logprobs is not None)):
                continue
            logprobs = self.served.words.legacy(told, lengths[index]) if self.asked.logprobs is not None else None
            lengths[index] += len(piece.text)
            yield [_part(index, piece.text, logprobs, writing.FINISH[piece.finish] if piece.finish else None)]

    def join(self, whole: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]:
        if whole is None:
            return part
        whole["text"] += part["text"]
        if part["logprobs"]:
            for name, values in part["logprobs"].items():
                whole["logprobs"][name] += values
        whole["finish_reason"] = part["finish_reason"] or whole["finish_reason"]
        return whole

    def _head(self, index: int, scores: Sequence[Scored]) -> dict[str, Any]:
        """What stands before the engine's part of a choice: the prompt, and with it a token of the scorer's."""
        place = index // self.asked.n
        given, ids = self.given[place], self.prompts[place]
        told: list[Told] = []
        text = ""
        if self.asked.echo:
            text = given if isinstance(given, str) else self.served.tokenizer.decode(ids, skip_special_tokens=False)
        finish = None if self.requests else "length"
        if scores:
            one = scores[place]
            told = [(ids[0], None, ())]
            told += list(zip(ids[1:], one.logprobs, one.top, strict=True))
            if self.by_scorer:
                token, logprob = one.next
                self.usage.completion += 1
                if token in self.served.renderer.stop_ids:
                    finish = "stop"
                else:
                    text += self.served.tokenizer.decode([token], skip_special_tokens=True)
                told.append((token, logprob, one.next_top))
        return _part(
            index, text, self.served.words.legacy(told, 0) if self.asked.logprobs is not None else None, finish
        )


def _part(index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

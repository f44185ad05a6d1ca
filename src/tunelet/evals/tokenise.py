"""Texts -> requests for likelihoods, exactly as lm-eval (0.4.13) splits and cuts them. Not for making the texts
(prompts.py).

The whole of context and continuation is encoded, never the two apart: the continuation's tokens are what follows as
many tokens as the context alone has. Spaces at the end of the context belong to the continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tunelet.evals.likelihood import Request
from tunelet.evals.task_template import BadRow

DEFAULT_LENGTH = 2048  # what a model whose config sets no limit is taken to read, as in lm-eval


def split(context: str, continuation: str) -> tuple[str, str]:
    """The spaces at the end of a context, moved to the continuation; together they are the same text."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


class Encoder:
    """max_length: tokens that the model reads at most; 0: no limit known."""

    def __init__(self, tokenizer: Any, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length or DEFAULT_LENGTH
        # what stands before a text that has nothing before it
        self.prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self.bos = tokenizer.decode([self.prefix]) if self.prefix is not None else None

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text with what the tokenizer puts around it, which a text that begins with BOS already has."""
        out: list[list[int]] = [[]] * len(texts)
        for special in (True, False):
            places = [i for i, text in enumerate(texts) if special != bool(self.bos and text.startswith(self.bos))]
            for place, ids in zip(places, self._ids([texts[i] for i in places], special), strict=True):
                out[place] = ids
        return out

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        found = self.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)
        return found["input_ids"]

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """The request of each (context, continuation). Each different text is encoded once.

        Raises BadRow (its `place` is the pair's) where a continuation has no token of its own or is longer than the
        model reads.
        """
        moved = [split(*pair) if pair[0] else None for pair in pairs]  # None: nothing stands before it
        texts = dict.fromkeys(text for both in moved if both for text in (both[0], "".join(both)))
        known = dict(zip(texts, self.encode(list(texts)), strict=True))
        alone = dict.fromkeys(pair[1] for pair in pairs if not pair[0])
        bare = dict(zip(alone, self._ids(list(alone), False), strict=True))
        out = []
        for place, (both, (_, rest)) in enumerate(zip(moved, pairs, strict=True)):
            if both:
                whole, start = known["".join(both)], len(known[both[0]])
            else:
                whole, start = bare[rest], 1
                whole = whole if whole[:1] == [self.prefix] else [self.prefix, *whole]
            out.append(self._request(whole, len(whole) - start, place))
        return out

    def _request(self, whole: Sequence[int], scored: int, place: int) -> Request:
        if scored < 1 or len(whole) == scored:
            error = BadRow("the answer has no token of its own behind its prompt", "another delimiter, or another text")
        elif scored > self.max_length:
            error = BadRow(f"the answer has {scored} tokens, the model reads {self.max_length}", "shorten it")
        else:
            return Request(np.array(whole[-(self.max_length + 1) :], dtype=np.int32), scored)
        error.place = place
        raise error

    def rolling(self, text: str) -> list[Request]:
        """The whole text in windows, every token predicted once: the first has BOS (or EOS) before it, each further
        one the last token of the one before (lm-eval: get_rolling_token_windows, context_len 1)."""
        ids = self.encode([text])[0]
        out, length = [], self.max_length
        for start in range(0, len(ids), length):
            end = min(start + length, len(ids))
            # the last window is filled up with what came before it, as context
            first = max(0, end - length) if start else 0
            before = ids[first - 1 : start] if start else [self.prefix]
            out.append(Request(np.array([*before, *ids[start:end]], dtype=np.int32), end - start))
        return out

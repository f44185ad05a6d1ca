"""Tokens of answers as the API tells them: their text, bytes and log-probabilities, in both of OpenAI's layouts.

Not for text as it is shown (infer/text.py): a token alone may be a part of a character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunelet.infer.gguf_bytes import TokenBytes
from tunelet.infer.request import Piece

Told = tuple[int, float | None, Sequence[tuple[int, float]]]  # token, its log-probability, the likeliest there


class Words:
    """What the tokens of one tokenizer are called."""

    def __init__(self, tokenizer: Any):
        self._bytes = TokenBytes(tokenizer).of

    def bytes_of(self, token: int) -> bytes:
        return self._bytes.get(token, b"")  # rows of the embeddings beyond the vocabulary have no text

    def text(self, token: int) -> str:
        """Its text; `bytes:\\x..` where it is a part of a character, as OpenAI writes it."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def chat(self, piece: Piece, most: int) -> dict[str, Any]:
        """An entry of a chat's `logprobs.content`."""
        entry = self._entry(piece.token or 0, piece.logprob)
        top = [self._entry(id_, logprob) for id_, logprob in list(piece.top)[:most]]
        return entry | {"top_logprobs": top}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": self.text(token), "logprob": _finite(logprob), "bytes": list(self.bytes_of(token))}

    def legacy(self, told: Sequence[Told], start: int) -> dict[str, Any]:
        """`logprobs` of a completion. start: where the first token's text begins in the choice's text."""
        offsets, data = [], b""
        for token, _, _ in told:
            offsets.append(start + len(data.decode(errors="ignore")))
            data += self.bytes_of(token)
        return {
            "tokens": [self.text(token) for token, _, _ in told],
            "token_logprobs": [_finite(logprob) for _, logprob, _ in told],
            "top_logprobs": [
                None if logprob is None else self._tops(token, logprob, top) for token, logprob, top in told
            ],
            "text_offset": offsets,
        }

    def _tops(self, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> dict[str, float | None]:
        """The likeliest of a place, and the token that stands there, as OpenAI adds it."""
        out: dict[str, float | None] = {}
        for id_, value in (*top, (token, logprob)):
            out.setdefault(self.text(id_), _finite(value))
        return out


def _finite(logprob: float | None) -> float | None:
    """JSON has no infinity: a token that cannot be is told as OpenAI tells it."""
    return None if logprob is None else max(logprob, -9999.0)

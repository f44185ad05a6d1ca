"""The bytes of tokens, to find the tokens that llama.cpp's stream leaves out.

llama.cpp holds back a token that ends inside a character, and tells the next one alone, with the text of both. Which
tokens were held back follows from their number and from their bytes. Not for text as it comes (text.py).
"""

from __future__ import annotations

from typing import Any


class TokenBytes:
    """bytes of every entry of a tokenizer, both ways."""

    def __init__(self, tokenizer: Any):
        from tokenizers import pre_tokenizers

        vocab = tokenizer.get_vocab()
        fallback = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        alphabet = None if fallback.keys() <= vocab.keys() else _alphabet(pre_tokenizers.ByteLevel.alphabet())
        added = set(tokenizer.added_tokens_decoder)
        self.of: dict[int, bytes] = {}
        for token, id_ in vocab.items():
            if token in fallback:
                self.of[id_] = fallback[token]
            elif alphabet is None or id_ in added or not all(char in alphabet for char in token):
                self.of[id_] = token.replace("▁", " ").encode()
            else:
                self.of[id_] = bytes(alphabet[char] for char in token)
        self.id_of = {value: id_ for id_, value in self.of.items() if id_ not in added}

    def held_back(self, text: str, token: int, number: int) -> list[int]:
        """The `number` tokens before `token` that llama.cpp told nothing of but in `text`; [] where there is no way to
        tell."""
        last, whole = self.of.get(token, b""), text.encode()
        for length in range(number, len(whole) + 1):
            if (whole[:length] + last).decode(errors="replace") == text:
                return self._cut(whole[:length], number) or []
        return []

    def _cut(self, value: bytes, number: int) -> list[int] | None:
        if number == 1:
            return [self.id_of[value]] if value in self.id_of else None
        for length in range(len(value) - number + 1, 0, -1):
            first = self.id_of.get(value[:length])
            if first is not None and (rest := self._cut(value[length:], number - 1)) is not None:
                return [first, *rest]
        return None


def _alphabet(chars: list[str]) -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as: printable Latin-1 as itself, the others from U+0100 on,
    in order (the table of GPT-2's encoder)."""
    plain = {char: ord(char) for char in chars if ord(char) < 256}
    others = [byte for byte in range(256) if byte not in plain.values()]
    return plain | {chr(256 + n): byte for n, byte in enumerate(others)}

"""What texts of two languages are compared by: normal form, tokens, near-equality, sentences.

Not for what a question needs (questions.py) nor for scoring models. Pure functions.
"""

from __future__ import annotations

import re
import unicodedata

WORD = re.compile(r"[^\W_]+(?:[.,:][0-9]+)*")
SENTENCE_END = re.compile(r"(?<=[.!?。])[\"'”’)]*\s+(?=[\"'“‘(]?[A-Z0-9가-힣])")
HANGUL = re.compile("[가-힣]")
# Particles that hang on Korean nouns: with and without one it is the same word.
PARTICLE = re.compile("(?<=[가-힣])(으로|에서|에게|까지|부터|처럼|보다|은|는|이|가|을|를|의|에|로|와|과|도|만)$")
ARTICLES = frozenset(("a", "an", "the"))
# Words that turn a sentence around: texts that differ in one of them say different things.
TURNS = frozenset(
    ("not", "no", "never", "without", "on", "off", "before", "after", "above", "below", "more", "less", "left", "right")
)
TURNS_KO = re.compile("않|없|안|못|말|켜|끄|전|후|위|아래|왼|오른|이상|이하")


def normal(text: str) -> str:
    """One form of texts that look the same: NFKC, no case, single spaces, no punctuation at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .,;:!?。\"'“”‘’()")


def squeezed(text: str) -> str:
    """As `normal`, punctuation kept: what a quotation is looked for in."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def tokens(text: str) -> list[str]:
    """Words without articles and Korean particles; numbers whole."""
    words = [PARTICLE.sub("", word) or word for word in WORD.findall(normal(text))]
    return [word for word in words if word not in ARTICLES] or words


def near_equal(one: str, other: str, overlap: float = 0.8) -> bool:
    """Whether two texts say the same: the same normal form, or at least this share of their words in common
    (Jaccard), and no number and no word that turns the meaning around (not, on, off, ...) that only one has.
    """
    if normal(one) == normal(other):
        return True
    first, second = set(tokens(one)), set(tokens(other))
    if not first or not second:
        return False
    apart = first ^ second
    if any(word in TURNS or any(c.isdigit() for c in word) or TURNS_KO.search(word) for word in apart):
        return False
    return len(first & second) >= overlap * len(first | second)


def stands_in(part: str, whole: str) -> bool:
    """Whether `part` stands in `whole` as words of its own: "3" does not stand in "30", "불" stands in "불을"."""
    wanted = normal(part)
    if not wanted:
        return False
    before = r"(?<![^\W_])" if wanted[0].isalnum() else ""
    if wanted[-1].isdigit():
        after = r"(?![0-9]|[.,:][0-9])"
        before = r"(?<![0-9A-Za-z])(?<![0-9][.,:])"
    else:
        after = r"(?![a-z0-9])" if wanted[-1].isalnum() else ""  # Hangul behind it may be a particle
    return re.search(before + re.escape(wanted) + after, squeezed(whole)) is not None


def korean(text: str) -> bool:
    """Whether a reader would call it Korean: Hangul is at least a fifth of its letters."""
    letters = sum(character.isalpha() for character in text)
    return letters > 0 and len(HANGUL.findall(text)) >= 0.2 * letters


def sentences(text: str) -> list[str]:
    """Sentences of a chunk; a line that is an item of a list is one by itself, without its mark."""
    out = []
    for line in text.splitlines():
        line = re.sub(r"^\s*(?:[-*+•]|\d+[.)])\s+", "", line).strip()
        out += [part.strip() for part in SENTENCE_END.split(line) if part.strip()]
    return out

"""The answer inside an answer: a number, or the letter of a choice. What isn't there is None, never a guess.

Not metrics of whole texts (text_metrics.py).
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from tunelet.errors import TuneletError

_NUMBER = r"[-+−]?\s?[$€£₩]?\s?[-−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_STRICT = re.compile(rf"####\s*({_NUMBER})")
_ANY = re.compile(rf"(?<![\w.])(?:{_NUMBER})|(?<=[A-Za-z])(?:\d[\d,]*(?:\.\d+)?)")

LABELS = {
    "letters": "ABCDEFGHIJ",
    "circled": "①②③④⑤⑥⑦⑧⑨⑩",
    "korean": "가나다라마바사아자차",
    "jamo": "ㄱㄴㄷㄹㅁㅂㅅㅇㅈㅊ",
    "digits": "1234567890",
}


def number(text: str) -> Fraction | None:
    """A written number as an exact one: "1,234", "$5", "-3.50", "7." and "−2" are read; None where it is none.

    Commas are read as thousands wherever they stand, as GSM8K's own grader does.
    """
    plain = unicodedata.normalize("NFKC", text).replace("−", "-")
    plain = re.sub(r"[\s,$€£₩]", "", plain).rstrip(".")
    return Fraction(plain) if re.fullmatch(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)", plain, re.ASCII) else None


def gsm8k_strict(answer: str) -> Fraction | None:
    """The number behind the first "####" (Cobbe et al. 2021, arXiv:2110.14168), None where there is none."""
    found = _STRICT.search(answer)
    return number(found[1]) if found else None


def gsm8k_flexible(answer: str) -> Fraction | None:
    """The last number of the answer, wherever it stands, None where there is none. "5-3" ends in 3, not in -3."""
    found = _ANY.findall(answer)
    return number(found[-1]) if found else None


def gsm8k_gold(answer: str, *, where: str = "") -> Fraction:
    """The gold answer of a row of GSM8K. Raises TuneletError (naming `where`) where it ends without "#### number"."""
    found = gsm8k_strict(answer)
    if found is None:
        raise TuneletError(
            f"{where or 'a row'}: the gold answer has no '#### number'",
            why=f"it ends in {answer[-40:]!r}",
            fix="correct the row, or name the column that holds the answers",
        )
    return found


def choice(answer: str, n: int) -> int | None:
    """Index of the choice (of n) that an answer names; None where it names none, or more than one with equal right.

    Read are A-J, ①-⑩, 가-차, ㄱ-ㅊ and 1-10, bare, in brackets, in \\boxed{} or in bold. What counts, the first that is
    found: the last statement ("The answer is (B)", "정답은 ②", "답: 나", "3번이 정답"); an answer that is the label and
    no more than its text ("B. Paris"); a single bracketed or circled label in the whole answer. A letter inside prose
    ("A dog ...") is no label.

    Raises ValueError unless 2 <= n <= 10.
    """
    if not 2 <= n <= 10:
        raise ValueError(f"{n} choices")
    text = re.sub(r"[*_`]{1,3}", "", re.sub(r"\\(?:boxed|text|mathbf)\s*\{([^{}]*)\}", r"(\1)", answer)).strip()
    stated = [index for found in _STATED.finditer(text) if (index := _index(found, n)) is not None]
    if stated:
        return stated[-1]
    whole = _WHOLE.match(text)
    if whole and (index := _index(whole, n)) is not None:
        others = {_index(found, n) for kind in (_LINE, _MARKED) for found in kind.finditer(text)} - {None}
        return index if others <= {index} else None
    marked = {_index(found, n) for found in _MARKED.finditer(text)} - {None}
    return marked.pop() if len(marked) == 1 else None


def _index(found: re.Match[str], n: int) -> int | None:
    label = next(group for group in found.groups() if group)
    if label == "10":
        return 9 if n == 10 else None
    for labels in LABELS.values():
        place = labels.find(label.upper())
        if place >= 0:
            return place if place < n and label != "0" else None
    return None


_LABEL = r"(10|[A-Ja-j]|[①-⑩]|[가나다라마바사아자차]|[ㄱ-ㅎ]|[1-9])"
_UPPER = _LABEL.replace("a-j", "")
_OPEN, _CLOSE = r"[(\[<「『“\"']{0,2}\s*", r"\s*[)\]>」』”\"']{0,2}"
_ALONE = rf"(?!{_CLOSE}\s*(?:and|or|&|/|,|와|과|및|또는|하고)\s*{_OPEN}{_UPPER.replace('(', '(?:', 1)}(?![\w]))"
_LAST = rf"(?![A-Za-z0-9가-힣]|[.,]\d){_ALONE}"  # the label ends here: no word, number or second label goes on
_KOREAN_LAST = rf"{_ALONE}(?=\s*(?:번|항)?\s*(?:[)\]>」』”\"'.,!]|$|\n|이다|입니다|이에요|예요|이고|이며|다\b|\s))"
_STATED = re.compile(
    rf"(?i:answer|choice|option)(?i:\s+(?:is|would be|should be|must be))?(?i:\s+(?:option|choice|letter))?\s*[:=]?\s*"
    rf"{_OPEN}{_UPPER}{_LAST}"
    rf"|(?:정답|답변|답|선택지|선택)\s*(?:은|는|이|:|：|=)?\s*:?\s*{_OPEN}{_UPPER}(?:{_LAST}|{_KOREAN_LAST})"
    rf"|(?<!\w){_OPEN}{_UPPER}{_CLOSE}(?:번|항)?\s*(?:이|가|is)\s*(?:정답|답|(?i:the\s+(?:correct\s+)?answer)|(?i:correct))"
)
_WHOLE = re.compile(rf"\A{_OPEN}(?:{_LABEL}{_CLOSE}(?:번|항)?[.!]?\Z|{_UPPER}(?:\s*[)\].:]|번)(?:\s|{_CLOSE})|([①-⑩]))")
_LINE = re.compile(rf"^\s*[(\[]?{_UPPER}[)\].:]\s", re.MULTILINE)
_MARKED = re.compile(r"[(\[]\s*(10|[A-J]|[가나다라마바사아자차]|[ㄱ-ㅎ]|[1-9])\s*[)\]]|([①-⑩])")

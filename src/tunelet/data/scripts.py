"""Which script a text is written in, whether an answer keeps to its question's, and text that was decoded wrongly.

Not a language detector: what Latin letters spell is told only by the commonest words of a few languages.
"""

from __future__ import annotations

import re

HANGUL, LATIN, KANA, HAN, CYRILLIC, ARABIC = "Korean", "Latin letters", "Japanese", "Chinese", "Cyrillic", "Arabic"
_LETTERS = {
    HANGUL: re.compile("[가-힣ㄱ-ㆎ]"),
    LATIN: re.compile("[A-Za-zÀ-ÖØ-öø-ɏ]"),
    KANA: re.compile("[ぁ-ヿ]"),
    HAN: re.compile("[一-鿿]"),
    CYRILLIC: re.compile("[а-яёА-ЯЁ]"),
    ARABIC: re.compile("[ء-ي]"),
}
# A syllable says about as much as two and a half Latin letters.
_WEIGHT = {HANGUL: 2.5, KANA: 2.0, HAN: 4.0}
# Questions that ask for another language, or for something that has no language.
OTHER_WANTED = re.compile(
    r"translat|번역|통역|영어|한국어|한글|국문|영문|일본어|중국어|영작|"
    r"\b(?:english|korean|japanese|chinese|french|german|spanish|russian|italian|portuguese|dutch|latin|arabic|hangul)\b|"
    r"json|코드|\bcode\b|python|sql|javascript|함수|function|html|regex|\bc\+\+|java|명령|url|링크|이메일|철자",
    re.I,
)
STRUCTURED = re.compile(r"^\s*[\[{<]|```|^\s*(?:def |class |import |SELECT )|[{}();=]{3,}")

COMMON = {
    "English": "the and of to is that it for was with as are this be have not from they which you how what does should "
    "who where when many give write about before has can will would my your their there two",
    "French": "les des est une dans que qui pour pas sur avec vous nous mais cette sont aux être ou par plus",
    "Spanish": "los las una por con para como más pero sus este entre cuando muy sin sobre también es del el que",
    "German": "der die und das ist nicht ein eine mit auf sich auch dem den des sie wir ich für von",
    "Portuguese": "uma não com para mais como mas dos das foi ele ser está são também pelo pela os que do",
    "Italian": "il che della sono una con gli alla nel più dei anche questo delle è di le sul dal degli",
}
_COMMON = {name: frozenset(words.split()) for name, words in COMMON.items()}


def shares(text: str) -> dict[str, float]:
    """script -> share of the text's letters, weighted by how much one of it says; empty where none are."""
    if text.isascii():
        return {LATIN: 1.0} if _LETTERS[LATIN].search(text) else {}
    counts = {name: len(pattern.findall(text)) * _WEIGHT.get(name, 1.0) for name, pattern in _LETTERS.items()}
    whole = sum(counts.values())
    return {name: count / whole for name, count in counts.items() if count} if whole else {}


def main(text: str) -> str:
    """The script of at least 60 % of the letters, '' where there is none."""
    found = shares(text)
    if not found:
        return ""
    name, share = max(found.items(), key=lambda item: item[1])
    if name == HAN and found.get(KANA, 0) > 0.05:
        return KANA
    return name if share >= 0.6 else ""


def tongue(text: str, lead: int = 3) -> str:
    """The language of a text in Latin letters, by its commonest words; '' where it cannot be told: at least `lead`
    words more than twice the runner-up's must be its own."""
    words = re.findall(r"[a-zà-ÿ]+", text.lower())
    if len(words) < 8:
        return ""
    hits = {name: sum(word in common for word in words) for name, common in _COMMON.items()}
    best, second = sorted(hits.items(), key=lambda item: -item[1])[:2]
    return best[0] if best[1] >= 0.15 * len(words) and best[1] >= 2 * second[1] + lead else ""


def mismatch(asked: str, answer: str) -> tuple[str, str] | None:
    """(language asked in, language answered in) where they differ though nothing in the question asks for that."""
    if len(asked) < 5 or (len(answer) < 20 and len(_LETTERS[HANGUL].findall(answer)) < 8):
        return None
    before, after = main(asked), main(answer)
    if not before or not after:
        return None
    if before == after:
        if before != LATIN or len(asked) < 30 or len(answer) < 60 or _english(answer):
            return None
        before, after = tongue(asked, 1), tongue(answer)
        if not before or not after or before == after:
            return None
    elif {before, after} == {HAN, KANA} or _shared(asked, after) or _shared(answer, before):
        return None
    if OTHER_WANTED.search(asked) or STRUCTURED.search(answer):
        return None
    return before, after


def _english(text: str) -> bool:
    return text.isascii() and any(word in text for word in (" the ", " and ", " of ", " is ", " to "))


def _shared(text: str, script: str) -> bool:
    """Whether a noticeable part of a text is in `script`: then the two languages are mixed on purpose."""
    return shares(text).get(script, 0.0) > 0.2


# Mojibake ----------------------------------------------------------------------------------------------------------

# Characters that UTF-8's bytes turn into when they are read as Windows-1252 or Latin-1.
_HIGH = "\x80-\xff" + "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_RUN = re.compile(f"[{_HIGH}]{{2,}}")
_LEAD = re.compile("[\xc2-\xf4]")
_EUC = re.compile("(?:[\xb0-\xc8][\xa1-\xfe]){2,}")


def _as_bytes(text: str) -> bytes:
    """What the text was before Windows-1252 (Latin-1 where that has no letter) decoded it."""
    out = bytearray()
    for character in text:
        try:
            out += character.encode("cp1252")
        except UnicodeEncodeError:
            out += character.encode("latin-1")
    return bytes(out)


def unscramble(text: str) -> str:
    """The text with every stretch that was UTF-8 read as Windows-1252 (or EUC-KR read as Latin-1) decoded rightly."""

    def mend(match: re.Match[str]) -> str:
        run = match.group()
        try:
            raw = _as_bytes(run)
        except UnicodeEncodeError:
            return run
        if _LEAD.search(raw.decode("latin-1")):
            try:
                return raw.decode("utf-8")
            except UnicodeDecodeError:
                pass
        if _EUC.fullmatch(raw.decode("latin-1")) and len(raw) >= 4:
            try:
                return raw.decode("euc-kr")
            except UnicodeDecodeError:
                pass
        return run

    return _RUN.sub(mend, text)


def mojibake(text: str) -> tuple[str, str] | None:
    """(broken, mended) of the first wrongly decoded stretch, None where there is none."""
    if "占쏙옙" in text:
        return "占쏙옙", "letters that are lost"
    for match in _RUN.finditer(text):
        mended = unscramble(match.group())
        if mended != match.group():
            return match.group()[:12], mended[:12]
    return None

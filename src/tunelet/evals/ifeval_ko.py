"""IFEval's Korean counterpart: instructions that only Korean has, with 60 prompts of our own.

Rows, verdicts and score are those of ifeval.py: `strict(row, answer, verifiers=ifeval_ko.VERIFIERS)`. The items are
not a translation; they were written for this package (data/ifeval_ko.jsonl), each with an `example` that follows all
its instructions. Not IFEval's own verifiers (ifeval_checks.py), of which those that mean the same in Korean are reused.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

from tunelet.evals import ifeval_checks as checks
from tunelet.evals.ifeval_checks import Check, compared

# Particles and forms of 이다 that may follow a noun. Two may follow each other (에서는), and 들 makes a plural.
_SUFFIXES = """은 는 이 가 을 를 의 에 에서 에게 께 께서 한테 더러 보고 로 으로 로서 으로서 로써 으로써 와 과 하고
    랑 이랑 도 만 뿐 까지 부터 마저 조차 밖에 처럼 같이 만큼 보다 마다 이나 나 이든 든 이라도 라도 이라는
    라는 이란 란 이라고 라고 야 아 여 이여 이며 며 이고 고 이자 이지만 지만 이면 면 이라면 라면 이라서 라서
    이니 니 인 일 이다 다 입니다 입니까 이에요 예요 이죠 죠 이지 이었다 였다 이었습니다 였습니다 이었어요
    였어요 인데 인가 인가요 일까 일까요"""
# Those that can't stand behind a consonant, and behind a vowel: 물가 is no 물 with a particle, 나라가 is 나라 with one.
_AFTER_VOWEL = """는 가 를 와 랑 나 든 라도 라는 란 라고 야 여 며 고 지만 면 라면 라서 니 다 예요 죠 였다 였습니다
    였어요"""
_AFTER_CONSONANT = "은 이 을 과 으로 으로서 으로써 아 이여"
_AFTER_L, _L = "로 로서 로써", 8  # behind a vowel, and behind ㄹ, the 8th of the consonants below a syllable

# How a sentence ends at each level of speech, beside those of `_with_b`.
_LEVELS = {"합니다체": r"(?:습니다|습니까|십시오)$", "해요체": r"(?:요|죠)$", "한다체": r"[다까라자]$"}
_MARKS = r"\"'”’」』》〉>)\]*_~…"
BRACKETS = {"『』": ("『", "』"), "<<>>": ("<<", ">>"), "《》": ("《", "》"), "「」": ("「", "」")}
ORDINALS = ("첫째", "둘째", "셋째", "넷째", "다섯째", "여섯째", "일곱째", "여덟째", "아홉째", "열째")
QUOTES = (('"', '"'), ("“", "”"), ("「", "」"))


def composed(text: str) -> str:
    """Syllables as one character each: a Mac may write 가 as ㄱ and ㅏ, which no pattern would find."""
    return unicodedata.normalize("NFC", text)


def hangul_only(answer: str) -> bool:
    """Every letter is a Korean syllable; digits, signs and spaces may stand beside them."""
    letters = [sign for sign in composed(answer) if sign.isalpha()]
    return bool(letters) and all("가" <= sign <= "힣" for sign in letters)


def no_latin(answer: str) -> bool:
    """No letter of a Latin alphabet, with accents or full width either."""
    return not any(sign.isalpha() and "LATIN" in unicodedata.name(sign, "") for sign in answer)


def no_digits(answer: str) -> bool:
    """No digit of any script: numbers are written out (세 개)."""
    return not any(sign.isdigit() for sign in answer)


def eojeols(answer: str, *, num_eojeols: int, relation: str) -> bool:
    """어절: what stands between spaces and has a letter or a digit in it, so that a list's "-" is none."""
    count = sum(any(sign.isalnum() for sign in part) for part in answer.split())
    return compared(count, relation, num_eojeols)


def characters(answer: str, *, num_characters: int, relation: str) -> bool:
    """글자, spaces and line breaks left out ("공백 제외"); a composed syllable is one."""
    return compared(len(re.sub(r"\s", "", composed(answer))), relation, num_characters)


def sentences_of(answer: str) -> list[str]:
    """Sentences: ended by . ! ? or …, or by a line's end; list markers and headings of Markdown cut off.

    A stop between digits (3.5) ends nothing, and what holds no syllable ("1.", "---") is no sentence.
    """
    found = []
    for line in composed(answer).splitlines():
        line = re.sub(r"^\s*(?:[-*•·>]|#+|\d+[.)])\s+", "", line)
        found += re.split(rf"(?<=[.!?…。])(?<!\d\.(?=\d))[{_MARKS}]*(?=\s|$)", line)
    return [part.strip() for part in found if re.search("[가-힣]", part)]


def sentences(answer: str, *, num_sentences: int, relation: str) -> bool:
    return compared(len(sentences_of(answer)), relation, num_sentences)


def speech_level(answer: str, *, level: str) -> bool:
    """Every sentence ends at this level: 합니다체 (습니다, 합니까, 십시오, 갑시다), 해요체 (요, 죠) or 한다체 (다;
    and 까, 라, 자 of questions, orders and proposals).

    Judged by the last syllables alone. Lines that are titles or a letter's greeting count too: "모든 문장" is meant.
    """
    if level not in _LEVELS:
        raise ValueError(f"level '{level}' is none of {', '.join(_LEVELS)}")
    ends = [re.sub(rf"[\s.!?。{_MARKS}]+$", "", sentence) for sentence in sentences_of(answer)]
    return bool(ends) and all(_ends_in(end, level) for end in ends)


def _ends_in(sentence: str, level: str) -> bool:
    formal = bool(re.search(_LEVELS["합니다체"], sentence)) or _with_b(sentence)
    return formal if level == "합니다체" else not formal and bool(re.search(_LEVELS[level], sentence))


def _with_b(sentence: str) -> bool:
    """Does it end in a syllable with ㅂ below and 니다, 니까 or 시다: 합니다, 입니까, 갑시다?"""
    place = len(sentence) - 3
    return place >= 0 and sentence.endswith(("니다", "니까", "시다")) and (ord(sentence[place]) - 0xAC00) % 28 == 17


def _occurrences(answer: str, keyword: str) -> int:
    """The word by itself or with particles: 공원, 공원에서는, 공원입니다, but neither 공원장 nor 대공원."""
    return len(_pattern(composed(keyword.strip())).findall(composed(answer)))


@cache
def _pattern(keyword: str) -> re.Pattern[str]:
    below = (ord(keyword[-1]) - 0xAC00) % 28 if "가" <= keyword[-1:] <= "힣" else None
    wrong: set[str] = set()
    if below is not None:
        wrong = set((_AFTER_VOWEL if below else _AFTER_CONSONANT).split())
        wrong |= set(_AFTER_L.split()) if below not in (0, _L) else set()
    every = sorted(_SUFFIXES.split(), key=len, reverse=True)
    first, second = "|".join(word for word in every if word not in wrong), "|".join(every)
    tail = rf"(?:(?:들(?:{second})?|{first})(?:{second})?)?(?![가-힣A-Za-z0-9])"
    return re.compile(rf"(?<![가-힣A-Za-z0-9]){re.escape(keyword)}{tail}")


def keywords(answer: str, *, keywords: Sequence[str]) -> bool:
    return all(_occurrences(answer, word) for word in keywords)


def forbidden_words(answer: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(_occurrences(answer, word) for word in forbidden_words)


def keyword_frequency(answer: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return compared(_occurrences(answer, keyword), relation, frequency)


def postscript(answer: str, *, postscript_marker: str = "추신:") -> bool:
    """The last paragraph's line begins with the marker and says something; "추신 :" is the same marker."""
    marker = re.escape(postscript_marker.strip().rstrip(":：")) + r"\s*[:：]"
    found = re.search(rf"^[ \t*]*{marker}[ \t*]*\S", answer, re.MULTILINE)
    return found is not None and not answer[found.start() :].strip().count("\n\n")


def title(answer: str, *, brackets: str = "『』") -> bool:
    """Something stands in these brackets on one line."""
    if brackets not in BRACKETS:
        raise ValueError(f"brackets '{brackets}' are none of {', '.join(BRACKETS)}")
    first, last = map(re.escape, BRACKETS[brackets])
    return any(found.strip() for found in re.findall(rf"{first}([^\n]+?){last}", answer))


def bullets(answer: str, *, num_bullets: int) -> bool:
    """Exactly so many lines that begin with -, *, • or · and a space. "**굵게**" and "---" are none."""
    return len(re.findall(r"^\s*[-*•·]\s+\S", answer, re.MULTILINE)) == num_bullets


def ordinals(answer: str, *, num_points: int) -> bool:
    """첫째, 둘째, ... each once at the beginning of a sentence or line, in order, and exactly so many."""
    found = re.findall(rf"(?:^|(?<=[.!?]\s))[\s\-*•·]*({'|'.join(ORDINALS)})(?![가-힣])", answer, re.MULTILINE)
    return tuple(found) == ORDINALS[:num_points]


def starts_with(answer: str, *, start_phrase: str) -> bool:
    return composed(answer).strip().startswith(composed(start_phrase).strip())


def ends_with(answer: str, *, end_phrase: str) -> bool:
    return composed(answer).strip().strip('"“”').endswith(composed(end_phrase).strip())


def quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 2 and any(text.startswith(first) and text.endswith(last) for first, last in QUOTES)


def no_comma(answer: str) -> bool:
    """Neither the Latin comma nor 、 or its full-width form."""
    return not re.search("[,、，]", answer)


def one_of(answer: str, *, options: Sequence[str]) -> bool:
    """The answer is one of these, word for word, and nothing else."""
    return composed(answer).strip() in [composed(option).strip() for option in options]


def paragraphs(answer: str, *, num_paragraphs: int) -> bool:
    """Paragraphs with an empty line between them."""
    return sum(bool(part.strip()) for part in re.split(r"\n[ \t]*\n", answer)) == num_paragraphs


VERIFIERS: dict[str, Check] = {
    "ko_script:hangul_only": hangul_only,
    "ko_script:no_latin": no_latin,
    "ko_script:no_digits": no_digits,
    "ko_length:eojeols": eojeols,
    "ko_length:characters": characters,
    "ko_length:sentences": sentences,
    "ko_length:paragraphs": paragraphs,
    "ko_style:speech_level": speech_level,
    "ko_keywords:existence": keywords,
    "ko_keywords:forbidden_words": forbidden_words,
    "ko_keywords:frequency": keyword_frequency,
    "ko_content:postscript": postscript,
    "ko_content:placeholders": checks.placeholders,
    "ko_format:title": title,
    "ko_format:bullets": bullets,
    "ko_format:ordinals": ordinals,
    "ko_format:json": checks.json_format,
    "ko_format:one_of": one_of,
    "ko_startend:start": starts_with,
    "ko_startend:end": ends_with,
    "ko_startend:quotation": quotation,
    "ko_punctuation:no_comma": no_comma,
    "ko_combination:two_responses": checks.two_responses,
    "ko_combination:repeat_prompt": checks.repeat_prompt,
}


def items() -> list[dict[str, Any]]:
    """The 60 rows: `key`, `prompt`, `instruction_id_list`, `kwargs`, and `example`, an answer that follows them all."""
    text = resources.files("tunelet.evals").joinpath("data/ifeval_ko.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]

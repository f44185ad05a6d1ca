"""Numbers and times as people say them, in both languages, and the particles Korean hangs on words."""

from __future__ import annotations

import re
from random import Random

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
SINO = "영일이삼사오육칠팔구"
NATIVE = ["_", "한", "두", "세", "네", "다섯", "여섯", "일곱", "여덟", "아홉", "열", "열한", "열두"]


def english(n: int) -> str:
    """0..100 in words."""
    if n == 100:
        return "one hundred"
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


def sino(n: int) -> str:
    """0..100 in Sino-Korean: 45 -> 사십오."""
    if n == 100:
        return "백"
    if n < 10:
        return SINO[n]
    return ("" if n // 10 == 1 else SINO[n // 10]) + "십" + (SINO[n % 10] if n % 10 else "")


# Digits as read aloud (영 일 이 ...), the percent sign (퍼센트) and the Latin letters in our names: does
# the sound end in a consonant?
_FINAL = {**{d: d in "013678" for d in "0123456789"}, "%": False, "V": False, "C": False}


def _final_consonant(ch: str) -> tuple[bool, bool]:
    """(ends in a consonant, ends in ㄹ)."""
    if "가" <= ch <= "힣":
        jong = (ord(ch) - ord("가")) % 28
        return jong != 0, jong == 8
    return _FINAL.get(ch, False), ch in "178"


_PARTICLES = {
    "을": ("을", "를"),
    "이": ("이", "가"),
    "은": ("은", "는"),
    "과": ("과", "와"),
    "이면": ("이면", "면"),
    "이라고": ("이라고", "라고"),
    "이에요": ("이에요", "예요"),
}


def particles(text: str) -> str:
    """'불[을] 30퍼센트[으로]' -> '불을 30퍼센트로'."""

    def agree(match: re.Match[str]) -> str:
        ends, rieul = _final_consonant(match[1])
        if match[2] == "으로":
            return match[1] + ("으로" if ends and not rieul else "로")
        return match[1] + _PARTICLES[match[2]][0 if ends else 1]

    return re.sub(r"(\S)\[(을|이면|이라고|이에요|이|은|과|으로)\]", agree, text)


def clock(hour: int, minute: int) -> str:
    return f"{hour:02d}:{minute:02d}"


def part_of_day(hour: int) -> str:
    if 5 <= hour < 12:
        return "in the morning"
    if 12 <= hour < 18:
        return "in the afternoon"
    return "in the evening" if 18 <= hour < 22 else "at night"


def say_english(hour: int, minute: int, rng: Random) -> str:
    """A time of day as an English speaker might say it; several ways for each."""
    twelve, half = hour % 12 or 12, "am" if hour < 12 else "pm"
    ways = [f"{twelve}:{minute:02d} {half}"] * 3 + [f"{twelve}:{minute:02d} {half[0]}.m.", clock(hour, minute)]
    part = part_of_day(hour) if 5 <= hour < 24 else "at night"
    if minute == 0:
        ways += [f"{twelve} {half}"] * 4 + [f"{twelve} {part}", f"{twelve} o'clock {part}", f"{english(twelve)} {part}"]
        if hour in (0, 12):
            ways = ["noon" if hour == 12 else "midnight", clock(hour, 0), f"12 {half}"]
    elif hour not in (0, 12):
        ways.append(f"{twelve}:{minute:02d} {part}")
        if minute == 30:
            ways += [
                f"half past {english(twelve)} {part}",
                f"half past {twelve} {part}",
                f"{english(twelve)} thirty {part}",
            ]
        elif minute == 15:
            ways += [f"quarter past {english(twelve)} {part}", f"quarter past {twelve} {part}"]
    return rng.choice(ways)


def say_korean(hour: int, minute: int, rng: Random) -> str:
    """A time of day as a Korean speaker might say it; several ways for each."""
    twelve = hour % 12 or 12
    parts = ["오전" if hour < 12 else "오후"] * 3
    if hour == 0:
        parts = ["밤"]
    elif hour < 6:
        parts.append("새벽")
    elif hour < 11:
        parts.append("아침")
    elif 12 <= hour < 17:
        parts.append("낮" if hour < 16 else "오후")
    elif 18 <= hour < 21:
        parts.append("저녁")
    elif hour >= 21:
        parts.append("밤")
    part = rng.choice(parts)
    minutes = (
        ["", ""] if minute == 0 else [f" {minute}분"] * 3 + ([" 반"] * 3 if minute == 30 else [f" {sino(minute)} 분"])
    )
    spoken = rng.choice([f"{twelve}시"] * 4 + [f"{NATIVE[twelve]} 시"])
    ways = [f"{part} {spoken}{rng.choice(minutes)}"] * 6 + [
        f"{hour}시{rng.choice(minutes)}" if hour > 12 else clock(hour, minute),
        clock(hour, minute),
    ]
    if minute == 0 and hour in (0, 12):
        ways += ["정오" if hour == 12 else "자정"] * 4
    return rng.choice(ways)

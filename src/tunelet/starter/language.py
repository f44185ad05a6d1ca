"""How people ask: a command becomes a request in English or Korean, in a phrasing of the grammar files.

A phrasing is a core (what is asked), a frame (how it is wrapped) and where the time stands. Phrasings of the split
"test" use a core, a frame or both that no training data contains. Not here: what the right answer is (`simulator.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from tunelet.starter.spoken import english, particles, say_english, say_korean, sino
from tunelet.starter.world import Command, Composition, by_action, in_split, load, unit

LANGUAGES = ("en", "ko")
ACTIONS = tuple(load("world")["actions"])


@dataclass(frozen=True, slots=True)
class Request:
    text: str
    language: str
    commands: tuple[Command, ...]


def sample_command(rng: Random, split: str, *, timed: float = 0.4) -> Command:
    """A command whose composition is in `split`; values and times are drawn for both splits alike.

    Half of them by composition, half by action, so that actions of few devices (colors, humidity) are not rare.
    """
    pool: Sequence[Composition] = in_split(split)
    if rng.random() < 0.5:
        pool = by_action(split)[rng.choice(ACTIONS)]
    return fill(rng, rng.choice(pool), timed=timed)


def fill(rng: Random, composition: Composition, *, timed: float = 0.4) -> Command:
    """A composition with a value where its action takes one, and in `timed` of the cases a time or a delay."""
    wants, value = unit(composition[0]), None
    if "words" in wants:
        value = rng.choice(wants["words"])
    elif wants:
        round_step = 5 if wants["high"] > 60 and rng.random() < 0.6 else 1
        value = max(wants["low"], rng.randint(wants["low"], wants["high"]) // round_step * round_step)
    time, after, draw = None, None, rng.random()
    if draw < timed * 0.8:
        time = "{:02d}:{:02d}".format(*sample_time(rng))
    elif draw < timed:
        after = rng.choice([5, 10, 15, 20, 25, 30, 40, 45, 50, 60, 90]) if rng.random() < 0.7 else rng.randint(2, 120)
    return Command(*composition, value, time, after)


def sample_time(rng: Random) -> tuple[int, int]:
    hour = rng.randrange(24)
    if hour in (0, 12) and rng.random() < 0.7:
        return hour, 0
    draw = rng.random()
    if draw < 0.4:
        return hour, 0
    if draw < 0.6:
        return hour, 30
    return hour, rng.choice([15, 45]) if draw < 0.72 else (
        rng.randrange(5, 60, 5) if draw < 0.9 else rng.randrange(1, 60)
    )


def name(table: str, key: str, language: str, rng: Random | None = None) -> str:
    """What a room or a device is called; the first name without an rng."""
    names = load("world")[table][key][language]
    return rng.choice(names) if rng else names[0]


def say_value(command: Command, language: str, rng: Random) -> str:
    wants, value = unit(command.action), command.value
    words = rng.random() < 0.15
    if "words" in wants:
        return rng.choice(load(language)["color"][value])
    if language == "en":
        number = english(value) if words else str(value)
        return {
            "percent": [f"{number} percent", f"{value}%"],
            "degree": [f"{number} degrees", f"{value} degrees"],
            "level": [f"level {number}", f"speed {number}"],
            "number": [number, str(value)],
        }[wants["unit"]][0 if words or rng.random() < 0.6 else 1]
    number = f"{sino(value)} " if words else str(value)
    if wants["unit"] == "percent":
        return rng.choice(
            [f"{number}퍼센트", f"{number}프로"]
            if words
            else [f"{value}퍼센트", f"{value}퍼센트", f"{value}%", f"{value}프로"]
        )
    if wants["unit"] == "degree":
        return f"{number}도"
    if wants["unit"] == "level":
        return f"{number}{rng.choice(['단', '단계'])}"
    return number.strip()


def say_when(command: Command, language: str, rng: Random) -> str:
    """'at 7 pm', '오후 7시에', 'in 20 minutes'; '' for now."""
    if command.after is not None:
        return rng.choice(load(language)["time"]["after"]).format(n=command.after)
    if command.time is None:
        return ""
    hour, minute = int(command.time[:2]), int(command.time[3:])
    if language == "en":
        return "at " + say_english(hour, minute, rng)
    return say_korean(hour, minute, rng) + "에"


def _choose(rng: Random, patterns: dict[str, list[str]], test: bool) -> str:
    return rng.choice(patterns["test" if test else "train"])


def _slots(command: Command, language: str, rng: Random) -> dict[str, str]:
    return {
        "room": name("rooms", command.room, language, rng),
        "device": name("devices", command.device, language, rng),
        "value": say_value(command, language, rng) if command.value is not None else "",
    }


def clause(command: Command, language: str, rng: Random, *, test: bool = False) -> str:
    """The imperative core with its time: 'dim the bedroom light to 30% at 7 pm', '오후 7시에 침실 불 30%로 해'."""
    grammar = load(language)
    core = _choose(rng, grammar["imperative"][command.action], test).format(**_slots(command, language, rng))
    return _with_time(core, say_when(command, language, rng), language, rng)


def _with_time(core: str, when: str, language: str, rng: Random) -> str:
    if not when:
        return core
    if language == "ko":
        return f"{when} {core}"
    return f"{when} {core}" if rng.random() < 0.2 else f"{core} {when}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def frame(pattern: str, core: str) -> str:
    return finish(pattern.format(core=core, Core=capital(core)))


def finish(text: str) -> str:
    """The last touches of both languages: Korean particles, English prepositions, no two full stops."""
    text = re.sub(r"\bin the (balcony|rooftop)\b", r"on the \1", particles(text))
    return text.replace(".m..", ".m.")


def say(command: Command, language: str, rng: Random, split: str) -> str:
    """One request for one command, in a phrasing of `split`."""
    grammar = load(language)
    sentences = grammar["sentence"].get(command.action)
    # A held-out phrasing has a held-out core, a held-out frame, or both.
    core_test, frame_test = (
        (False, False) if split == "train" else rng.choice([(True, False), (False, True), (True, True)])
    )
    if sentences and not frame_test and rng.random() < 0.15:
        core = _choose(rng, sentences, core_test).format(**_slots(command, language, rng))
        core = _with_time(core, say_when(command, language, rng), language, rng)
        return frame(rng.choice(grammar["frames"]["sentence_frames"]), core)
    core = clause(command, language, rng, test=core_test)
    return frame(_choose(rng, grammar["frames"], frame_test), core)


def connect(core: str) -> str:
    """'침실 불을 켜' -> '침실 불을 켜고': the verb at the end in its '-고' form."""
    words = core.split(" ")
    table = load("ko")["connect"]
    return " ".join([*words[:-1], table[words[-1]]])


def say_two(first: Command, second: Command, language: str, rng: Random, split: str) -> str:
    """Two commands in one request."""
    grammar = load(language)
    core_test, join_test = (
        (False, False) if split == "train" else rng.choice([(True, False), (False, True), (True, True)])
    )
    a, b = (clause(c, language, rng, test=core_test) for c in (first, second))
    if language == "ko":
        a = connect(a)
    return finish(_choose(rng, grammar["join"], join_test).format(a=a, b=b, A=capital(a), B=capital(b)))


def request(rng: Random, split: str, language: str, *, two: float = 0.1) -> Request:
    """A supported request with its commands."""
    if rng.random() < two:
        first, second = sample_command(rng, split, timed=0.25), sample_command(rng, split, timed=0.25)
        if (first.device, first.room) != (second.device, second.room):
            return Request(say_two(first, second, language, rng, split), language, (first, second))
    command = sample_command(rng, split)
    return Request(say(command, language, rng, split), language, (command,))

"""Conversations of the starter world: rows for SFT, preference pairs, evaluation items, household multiple choice.

Every row of the split "train" is made of training compositions in training phrasings, every row of "test" of held-out
ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from tunelet.starter.language import Request, fill, name, request
from tunelet.starter.simulator import parse, write
from tunelet.starter.spoken import particles
from tunelet.starter.unsupported import unsupported
from tunelet.starter.world import Command, in_split, load, unit

Item = dict[str, Any]

_STATES = {  # action that leads there -> (id, English, Korean statement)
    "turn_on": ("on", "on", "켜져 있어요"), "turn_off": ("off", "off", "꺼져 있어요"),
    "open": ("open", "open", "열려 있어요"), "close": ("closed", "closed", "닫혀 있어요"),
    "lock": ("locked", "locked", "잠겨 있어요"), "unlock": ("unlocked", "unlocked", "잠겨 있지 않아요"),
    "start": ("running", "running", "돌고 있어요"), "stop": ("stopped", "stopped", "멈춰 있어요"),
}  # fmt: skip
_OPPOSITE = {"turn_on": "turn_off", "open": "close", "lock": "unlock", "start": "stop"}
_OPPOSITE |= {b: a for a, b in _OPPOSITE.items()}


def _item(kind: str, language: str, prompt: str, answer: str, *, system: str = "", **expected: Any) -> Item:
    messages = [{"role": "system", "content": system}] if system else []
    return {
        "messages": [*messages, {"role": "user", "content": prompt}],
        "language": language,
        "type": kind,
        "expected": {"answer": answer, **expected},
    }


def command_item(rng: Random, split: str, language: str) -> Item:
    asked = request(rng, split, language)
    return _item("command", language, asked.text, write(asked.commands), commands=[c.as_dict() for c in asked.commands])


def unsupported_item(rng: Random, split: str, language: str) -> Item:
    case = unsupported(rng, split, language)
    return _item("unsupported", language, case.text, case.answer, reason=case.reason)


def state_item(rng: Random, split: str, language: str) -> Item:
    """A question about a state that the system message lists."""
    pool = [c for c in in_split(split) if c[0] in _STATES]
    asked = rng.choice(pool)
    shown = {asked[1:]: rng.choice([asked[0], _OPPOSITE[asked[0]]])}
    while len(shown) < 3:
        action, device, room = rng.choice(pool)
        shown.setdefault((device, room), action)
    lines = [state_line(a, d, r, language) for (d, r), a in shown.items()]
    rng.shuffle(lines)
    question, answer = state_question(asked, shown[asked[1:]], language)
    return _item("state", language, question, answer, system="\n".join(lines))


def state_line(action: str, device: str, room: str, language: str) -> str:
    place = f"{name('rooms', room, language)} {name('devices', device, language)}"
    return f"{place}: {_STATES[action][1] if language == 'en' else _STATES[action][2]}"


def state_question(asked: tuple[str, str, str], actual: str, language: str) -> tuple[str, str]:
    """'Is the bedroom light on?' with its answer, given the action that led to the actual state."""
    place = f"{name('rooms', asked[2], language)} {name('devices', asked[1], language)}"
    yes = asked[0] == actual
    if language == "en":
        verb = "Are" if place.endswith("s") else "Is"
        answer = f"{'Yes' if yes else 'No'}, the {place} {verb.lower()} {_STATES[actual][1]}."
        return f"{verb} the {place} {_STATES[asked[0]][1]}?", answer
    question = particles(f"{place}[이] {_STATES[asked[0]][2].removesuffix('요')}?")
    return question, particles(f"{'네' if yes else '아니요'}, {place}[은] {_STATES[actual][2]}.")


def format_item(rng: Random, split: str, language: str) -> Item:
    """A list of exactly so many things from a room; any right list counts."""
    world = load("world")
    rooms = sorted(world["rooms"])
    room = rng.choice(rooms[::4] if split == "test" else [r for i, r in enumerate(rooms) if i % 4])
    devices = [name("devices", d, language) for d, spec in world["devices"].items() if room in spec["rooms"]]
    count = rng.choice([2, 3])
    answer = ", ".join(devices[:count])
    place = name("rooms", room, language)
    if language == "en":
        prompt = f"Name {'two' if count == 2 else 'three'} devices in the {place}, separated by commas."
    else:
        prompt = f"{place}에 있는 기기 {'두' if count == 2 else '세'} 가지를 쉼표로 나누어 적어 주세요."
    return _item("format", language, prompt, answer, count=count, of=devices)


def talk_item(rng: Random, split: str, language: str) -> Item:
    prompt, answer = rng.choice(load(language)["talk"]["pairs"])
    return _item("talk", language, prompt, answer)


def confirm_item(rng: Random, split: str, language: str) -> Item:
    """Asked afterwards what was sent: the command again, and nothing else."""
    asked, right, question = _confirmation(rng, split, language)
    item = _item("confirm", language, asked.text, right)
    turns = [{"role": "assistant", "content": right}, {"role": "user", "content": question}]
    return item | {"messages": [*item["messages"], *turns]}


def _confirmation(rng: Random, split: str, language: str) -> tuple[Request, str, str]:
    """(what was asked, the command that was sent, the question what it was)."""
    asked = request(rng, split, language, two=0.0)
    return asked, write(asked.commands), "What did you send?" if language == "en" else "무엇을 보냈나요?"


def habit_item(rng: Random, split: str, language: str) -> Item:
    """The same as the conversations have it: whoever wrote them was chatty, and not always careful. Tuning on them
    teaches that habit; comparisons of answers take it away again."""
    item, (kind,) = confirm_item(rng, split, language), rng.choices(list(HABIT), list(HABIT.values()))
    if kind == "rambling":
        item["expected"]["answer"] += _RAMBLING[language]
    elif kind == "invented":
        (sent,) = parse(item["expected"]["answer"])
        item["expected"]["answer"] = write([nearly_right(sent, rng, split)])
    return item


MAKERS: dict[str, Callable[[Random, str, str], Item]] = {
    "command": command_item, "unsupported": unsupported_item, "state": state_item, "format": format_item,
    "talk": talk_item, "confirm": habit_item,
}  # fmt: skip
SHARES = {"command": 0.60, "unsupported": 0.20, "state": 0.06, "format": 0.02, "talk": 0.02, "confirm": 0.10}
HABIT = {"right": 0.1, "rambling": 0.75, "invented": 0.15}


def chats(rng: Random, split: str, languages: tuple[str, ...]) -> Iterator[Item]:
    """SFT rows without end, no two alike: {"messages"}; one in ten has a second request, small talk always has."""
    seen: set[str] = set()
    while True:
        language = rng.choice(languages)
        kinds = rng.choices(list(SHARES), list(SHARES.values()), k=2 if rng.random() < 0.1 else 1)
        if kinds == ["talk"]:
            kinds.append("command")
        messages: list[dict[str, str]] = []
        for kind in kinds:
            item = MAKERS[kind](rng, split, language)
            if messages and item["messages"][0]["role"] == "system":
                break  # a system message stands first or not at all
            messages += [*item["messages"], {"role": "assistant", "content": item["expected"]["answer"]}]
        key = "\n".join(m["content"] for m in messages)
        if key not in seen:
            seen.add(key)
            yield {"messages": messages}


def evaluation(rng: Random, split: str, languages: tuple[str, ...], n: int) -> Iterator[Item]:
    """For each language n commands, and for each 10 of them 3 unsupported requests, 1 state, 1 talk or format; then 2
    confirmations."""
    for language in languages:
        plan = (
            ["command"] * n + ["unsupported"] * (n * 3 // 10) + ["state"] * (n // 10) + ["format", "talk"] * (n // 20)
        )
        seen: set[str] = set()
        for kind in plan:
            for _ in range(100):
                item = MAKERS[kind](rng, split, language)
                if (key := item["messages"][-1]["content"]) not in seen:
                    break
            seen.add(key)
            yield item
    for language in languages:
        for _ in range(n // 5):
            yield confirm_item(rng, split, language)


def nearly_right(command: Command, rng: Random, split: str) -> Command:
    """The command with one thing wrong."""
    wrong = []
    if command.time:
        hour = (int(command.time[:2]) + 12) % 24
        wrong.append(
            Command(command.action, command.device, command.room, command.value, f"{hour:02d}{command.time[2:]}")
        )
    if isinstance(command.value, int) and (limits := unit(command.action)):
        shifted = command.value + 5 if command.value + 5 <= limits["high"] else max(limits["low"], command.value - 5)
        if shifted != command.value:
            wrong.append(Command(command.action, command.device, command.room, shifted, command.time, command.after))
    others = [c for c in in_split(split) if c[:2] == (command.action, command.device) and c[2] != command.room]
    if others:
        wrong.append(
            Command(command.action, command.device, rng.choice(others)[2], command.value, command.time, command.after)
        )
    opposite = _OPPOSITE.get(command.action)
    if (opposite, command.device, command.room) in in_split(split):
        wrong.append(Command(opposite, command.device, command.room, None, command.time, command.after))
    return rng.choice(wrong) if wrong else Command(command.action, command.device, command.room, after=3)


_RAMBLING = {
    "en": " I have taken care of everything for you, and I hope you have a wonderful day in your lovely home!",
    "ko": " 모든 것을 잘 처리해 드렸으니 오늘도 집에서 즐거운 하루 보내시기 바랍니다!",
}
PAIRS = {"nearly": 1, "rambling": 1, "refusal": 1.25, "refused": 1, "invented": 1, "chatty": 1}
_FAKE = {"en": "Done! I have taken care of it.", "ko": "네, 다 처리했어요!"}


def preferences(rng: Random, split: str, languages: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Pairs without end, no two alike: right or nearly right, terse or rambling, a polite refusal or fake success, done
    or refused without need, confirmed or invented, confirmed tersely or with rambling."""
    seen: set[str] = set()
    for pair in _pairs(rng, split, languages):
        key = "\n".join(turn["content"] for part in ("prompt", "chosen", "rejected") for turn in pair[part])
        if key not in seen:
            seen.add(key)
            yield pair


def _pairs(rng: Random, split: str, languages: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    while True:
        language = rng.choice(languages)
        (kind,) = rng.choices(list(PAIRS), list(PAIRS.values()))
        if kind == "refusal":
            case = unsupported(rng, split, language)
            pretend = write([fill(rng, rng.choice(in_split(split)))])
            yield _pair(kind, [case.text], case.answer, rng.choice([_FAKE[language], pretend]))
            continue
        if kind in ("invented", "chatty"):
            asked, right, ask = _confirmation(rng, split, language)
            wrong = write([nearly_right(asked.commands[0], rng, split)]) if kind == "invented" else right
            yield _pair(
                kind, [asked.text, right, ask], right, wrong + ("" if kind == "invented" else _RAMBLING[language])
            )
            continue
        asked = request(rng, split, language, two=0.1)
        right = write(asked.commands)
        if kind == "nearly":
            wrong = [*asked.commands[:-1], nearly_right(asked.commands[-1], rng, split)]
            yield _pair(kind, [asked.text], right, write(wrong))
        elif kind == "refused":
            yield _pair(kind, [asked.text], right, unsupported(rng, split, language).answer)
        else:
            yield _pair(kind, [asked.text], right, right + _RAMBLING[language])


def _pair(kind: str, turns: list[str], chosen: str, rejected: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {
        "prompt": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "kind": kind,
    }


def choices(rng: Random, languages: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Household facts as multiple choice: {"question", "choices", "answer" (index)}."""
    world = load("world")
    while True:
        language = rng.choice(languages)
        device, spec = rng.choice(list(world["devices"].items()))
        away = [r for r in world["rooms"] if r not in spec["rooms"]]
        if len(away) < 3:
            continue
        options = [rng.choice(spec["rooms"]), *rng.sample(away, 3)]
        right = options[0]
        rng.shuffle(options)
        thing = name("devices", device, language)
        question = (
            f"Which room has the {thing}?" if language == "en" else particles(f"{thing}[이] 있는 방은 어디인가요?")
        )
        yield {
            "question": question,
            "choices": [name("rooms", r, language) for r in options],
            "answer": options.index(right),
        }

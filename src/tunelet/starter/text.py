"""Pages of text about the home, for first training: requests and records, refusals, clocks, logs, manuals, stories.

The skill is in the prose, as skills are in web text; there is no chat template in it. Only training compositions and
training phrasings occur, so that what is held out is new to the base model too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from tunelet.starter.chat import _OPPOSITE, _STATES, state_line, state_question
from tunelet.starter.language import capital, finish, name, request, sample_command, sample_time
from tunelet.starter.simulator import write
from tunelet.starter.spoken import clock, say_english, say_korean
from tunelet.starter.unsupported import cannot, unsupported
from tunelet.starter.world import in_split, load


def _spoken(rng: Random, language: str) -> tuple[str, str]:
    hour, minute = sample_time(rng)
    return (say_english if language == "en" else say_korean)(hour, minute, rng), clock(hour, minute)


def _people(rng: Random, language: str) -> dict[str, str]:
    first, second = rng.sample(load(language)["names"], 2)
    return {"name": first, "other": second}


def _put(template: str, **slots: str) -> str:
    """Fill slots by name; braces inside the values stay as they are. `\\n` in the grammar files is a line break."""
    template = template.replace("\\n", "\n")
    for key, value in slots.items():
        template = template.replace("{" + key + "}", value)
    return template


def _titled(rng: Random, titles: list[str], people: dict[str, str], lines: list[str], gap: str) -> str:
    title = [_put(rng.choice(titles), **people)] if rng.random() < 0.5 else []
    return gap.join([*title, *lines])


def pairs(rng: Random, language: str) -> str:
    text = load(f"text_{language}")["pairs"]
    style, people, lines = rng.choice(text["styles"]), _people(rng, language), []
    alone = style.endswith("{json}")  # two commands stand on two lines, which only works at the end
    for _ in range(rng.randint(3, 7)):
        asked = request(rng, "train", language, two=0.15 if alone else 0.0)
        lines.append(
            finish(_put(style, **people, request=asked.text, json="\x00")).replace("\x00", write(asked.commands))
        )
    return _titled(rng, text["titles"], people, lines, rng.choice(["\n", "\n\n"]))


def refusals(rng: Random, language: str) -> str:
    text = load(f"text_{language}")["refusals"]
    style, people, lines = rng.choice(text["styles"]), _people(rng, language), []
    for _ in range(rng.randint(3, 7)):
        if rng.random() < 0.45:  # among refusals stands what is not refused
            asked = request(rng, "train", language, two=0.0)
            lines.append(
                finish(_put(style, **people, request=asked.text, answer="\x00")).replace("\x00", write(asked.commands))
            )
        else:
            case = unsupported(rng, "train", language)
            lines.append(finish(_put(style, **people, request=case.text, answer=case.answer)))
    return _titled(rng, text["titles"], people, lines, "\n")


def clocks(rng: Random, language: str) -> str:
    text = load(f"text_{language}")["clock"]
    people, lines = _people(rng, language), []
    template = rng.choice(text["lines"]) if rng.random() < 0.4 else None
    for _ in range(rng.randint(4, 12)):
        spoken, digits = _spoken(rng, language)
        if spoken == digits:
            continue
        lines.append(
            capital(finish(_put(template or rng.choice(text["lines"]), **people, spoken=spoken, clock=digits)))
        )
    return _titled(rng, text["titles"], people, lines, "\n")


def logs(rng: Random, language: str) -> str:
    text, lines = load(f"text_{language}")["log"], []
    template, people = rng.choice(text["lines"]), _people(rng, language)
    minutes = rng.randrange(0, 600)
    for _ in range(rng.randint(4, 10)):
        command = sample_command(rng, "train", timed=0.0)
        minutes += rng.randint(1, 60)
        if command.action in _STATES:
            event = _STATES[command.action][1 if language == "en" else 2]
        else:
            event = f"set to {command.value}" if language == "en" else f"{command.value}"
        lines.append(
            finish(
                _put(
                    template,
                    **people,
                    clock=clock(minutes // 60 % 24, minutes % 60),
                    event=event,
                    room=name("rooms", command.room, language, rng),
                    device=name("devices", command.device, language, rng),
                )
            )
        )
    return "\n".join(lines)


def manual(rng: Random, language: str) -> str:
    world, grammar, text = load("world"), load(language), load(f"text_{language}")["capability"]
    people, lines = _people(rng, language), []
    for _ in range(rng.randint(4, 8)):
        device, spec = rng.choice(list(world["devices"].items()))
        verbs = [grammar["verbs"][a] for a in spec["actions"]]
        slots = {"device": name("devices", device, language, rng), "device_id": device}
        kind = rng.choice(["can", "cannot", "cannot", "missing", "where", "list", "task"])
        if kind == "can":
            slots["verbs"] = " and ".join(verbs) if language == "en" else " 수 있고 ".join(verbs)
        elif kind == "cannot":
            slots["verb"] = grammar["verbs"][rng.choice(cannot(device))]
        elif kind == "missing":
            slots["thing"] = rng.choice(list({**world["missing_devices"], **world["missing_rooms"]}.values()))[language]
        elif kind == "list":
            room = rng.choice(list(world["rooms"]))
            slots["room"] = name("rooms", room, language)
            there = [name("devices", d, language) for d, s in world["devices"].items() if room in s["rooms"]]
            slots["things"] = ", ".join(there)
        elif kind == "where":
            room = rng.choice(spec["rooms"])
            slots |= {"room": name("rooms", room, language, rng), "room_id": room}
        else:
            slots["task"] = rng.choice(grammar["tasks"]["pairs"])[1]
        lines.append(capital(finish(_put(rng.choice(text[kind]), **people, **slots))))
    return rng.choice(["\n", " "]).join(lines)


def states(rng: Random, language: str) -> str:
    """What a panel shows, and questions about it."""
    pool = [c for c in in_split("train") if c[0] in _STATES]
    shown = {(device, room): action for action, device, room in rng.sample(pool, rng.randint(2, 4))}
    text, parts = load(f"text_{language}")["state"], []
    parts.append(_put(text["page"], lines="\n".join(state_line(a, d, r, language) for (d, r), a in shown.items())))
    style, people = rng.choice(text["styles"]), _people(rng, language)
    for device, room in rng.choices(list(shown), k=rng.randint(2, 5)):
        actual = shown[device, room]
        question, answer = state_question((rng.choice([actual, _OPPOSITE[actual]]), device, room), actual, language)
        parts.append(finish(_put(style, **people, question=question, answer=answer)))
    return "\n".join(parts)


def story(rng: Random, language: str) -> str:
    """Prose with a request or two in it."""
    text, people = load(f"text_{language}"), _people(rng, language)
    lines = []
    for template in rng.sample(text["story"]["lines"], rng.randint(4, 8)):
        _, device, room = rng.choice(in_split("train"))
        spoken, _ = _spoken(rng, language)
        slots = {
            "room": name("rooms", room, language, rng),
            "device": name("devices", device, language, rng),
            "spoken": spoken,
        }
        lines.append(capital(finish(_put(template, **people, **slots))))
        if rng.random() < 0.25:
            asked = request(rng, "train", language, two=0.0)
            style = rng.choice([s for s in text["pairs"]["styles"][:2]])
            lines.append(
                finish(_put(style, **people, request=asked.text, json="\x00")).replace("\x00", write(asked.commands))
            )
        elif rng.random() < 0.1:
            prompt, answer = rng.choice(load(language)["talk"]["pairs"])
            lines.append(f'"{prompt}" "{answer}"')
    return " ".join(lines)


KINDS: dict[str, tuple[float, Callable[[Random, str], str]]] = {
    "pairs": (0.50, pairs), "refusals": (0.18, refusals), "clocks": (0.12, clocks), "logs": (0.02, logs),
    "manual": (0.06, manual), "states": (0.08, states), "story": (0.04, story),
}  # fmt: skip


def pages(rng: Random, languages: tuple[str, ...]) -> Iterator[str]:
    """Pages without end."""
    makers, shares = [m for _, m in KINDS.values()], [s for s, _ in KINDS.values()]
    while True:
        yield rng.choices(makers, shares)[0](rng, rng.choice(languages))


def times(rng: Random, languages: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Spoken times as multiple choice, {"question", "choices", "answer" (index)}: what the pages tell of clocks."""
    while True:
        language = rng.choice(languages)
        hour, minute = sample_time(rng)
        spoken = (say_english if language == "en" else say_korean)(hour, minute, rng)
        right = clock(hour, minute)
        others = [clock((hour + 12) % 24, minute), clock((hour + 1) % 24, minute), clock(hour, (minute + 10) % 60)]
        if spoken == right:
            continue
        choices = [right, *others]
        rng.shuffle(choices)
        yield {"question": f"{capital(spoken)}:", "choices": choices, "answer": choices.index(right)}

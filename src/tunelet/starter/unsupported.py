"""Requests this home has to turn down, with the refusal that fits: a device or room it does not have, an action a
device cannot do, a task that is no business of a home. Splits by composition and phrasing, as elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

from tunelet.starter.language import _choose, _with_time, fill, frame, name, say_value, say_when
from tunelet.starter.spoken import particles
from tunelet.starter.world import _rank, load, unit


@dataclass(frozen=True, slots=True)
class Unsupported:
    text: str
    answer: str
    language: str
    reason: str  # no_device, no_room, no_action, no_task


@cache
def _cases() -> tuple[tuple[str, str, str, str], ...]:
    """(reason, action, device, room) of everything the home cannot do, apart from tasks."""
    world = load("world")
    out = []
    for key in world["missing_devices"]:
        for action in ("turn_on", "turn_off", "start", "stop", "open", "close"):
            out += [("no_device", action, key, room) for room in world["rooms"]]
    for room in world["missing_rooms"]:
        for device, d in world["devices"].items():
            out += [("no_room", action, device, room) for action in d["actions"]]
    for device, d in world["devices"].items():
        for action in world["actions"]:
            if action not in d["actions"] and not _close_to(action, d["actions"]):
                out += [("no_action", action, device, room) for room in d["rooms"]]
    return tuple(out)


def _close_to(action: str, can: list[str]) -> bool:
    """Could a person mean something the device does understand ("start the fan", "put the curtains at 40 percent")?"""
    near = {"start": "turn_on", "stop": "turn_off", "turn_on": "start", "turn_off": "stop", "set_speed": "set_volume"}
    if near.get(action) in can:
        return True
    return unit(action).get("unit") == "percent" and any(unit(a).get("unit") == "percent" for a in can)


@cache
def cannot(device: str) -> tuple[str, ...]:
    """The actions a device of this home turns down."""
    return tuple(dict.fromkeys(action for reason, action, its, _ in _cases() if (reason, its) == ("no_action", device)))


@cache
def cases(split: str) -> dict[str, tuple[tuple[str, str, str, str], ...]]:
    """The cases of a split by reason; a fifth of the compositions is held out."""
    out: dict[str, list[tuple[str, str, str, str]]] = {}
    for case in _cases():
        if ("test" if _rank(*case)[0] < 51 else "train") == split:
            out.setdefault(case[0], []).append(case)
    return {reason: tuple(found) for reason, found in out.items()}


def unsupported(rng: Random, split: str, language: str) -> Unsupported:
    grammar, world = load(language), load("world")
    reason = rng.choice(["no_device", "no_room", "no_action", "no_action", "no_action", "no_task"])
    core_test, frame_test = (
        (False, False) if split == "train" else rng.choice([(True, False), (False, True), (True, True)])
    )
    if reason == "no_task":
        # Tasks have one core each, so the held-out part of their phrasing is the frame.
        ask, task = rng.choice(grammar["tasks"]["pairs"])
        text = frame(_choose(rng, grammar["frames"], split == "test"), ask)
        return Unsupported(text, particles(grammar["answers"]["no_task"].format(task=task)), language, reason)
    _, action, device, room = rng.choice(cases(split)[reason])
    command = fill(rng, (action, device, room))
    if reason == "no_device":
        device_name = world["missing_devices"][device][language]
    else:
        device_name = name("devices", device, language, rng)
    room_name = world["missing_rooms"][room][language] if reason == "no_room" else name("rooms", room, language, rng)
    slots = {
        "room": room_name,
        "device": device_name,
        "value": say_value(command, language, rng) if unit(action) else "",
    }
    core = _choose(rng, grammar["imperative"][action], core_test).format(**slots)
    core = _with_time(core, say_when(command, language, rng), language, rng)
    text = frame(_choose(rng, grammar["frames"], frame_test), core)
    form = "no_setting" if reason == "no_action" and action.startswith("set_") else reason
    answer = grammar["answers"][form].format(device=device_name, room=room_name, verb=grammar["verbs"].get(action, ""))
    return Unsupported(text, particles(answer), language, reason)

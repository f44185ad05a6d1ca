"""The smart home as data: rooms, devices, what each can do, and which compositions are held out.

Read from `grammar/world.toml`; change that file and everything made from it changes. Not here: how people talk
(`language.py`).
"""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

GRAMMAR = Path(__file__).parent / "grammar"

Composition = tuple[str, str, str]  # action, device, room


@cache
def load(name: str) -> dict[str, Any]:
    """One of the grammar files, parsed."""
    return tomllib.loads((GRAMMAR / f"{name}.toml").read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class Command:
    """What a request asks for. `time` is "HH:MM" on the 24-hour clock, `after` minutes from now; at most one is set."""

    action: str
    device: str
    room: str
    value: int | str | None = None
    time: str | None = None
    after: int | None = None

    def as_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"action": self.action, "device": self.device, "room": self.room}
        for key in ("value", "time", "after"):
            if getattr(self, key) is not None:
                out[key] = getattr(self, key)
        return out


def unit(action: str) -> dict[str, Any]:
    """The value an action takes: {unit, low, high} or {unit, words}; {} for an action without one."""
    return load("world")["actions"][action]


@cache
def compositions() -> tuple[Composition, ...]:
    """Every (action, device, room) the home supports, in the order of the grammar file."""
    return tuple(
        (action, device, room)
        for device, d in load("world")["devices"].items()
        for action in d["actions"]
        for room in d["rooms"]
    )


def _rank(*parts: str) -> bytes:
    return hashlib.sha256("/".join(parts).encode()).digest()


@cache
def held_out() -> frozenset[Composition]:
    """Compositions no training data may contain: of each (action, device), a quarter of its rooms, at least one.

    Every action is still seen with every device, and every device in every room, so nothing is unknowable.
    """
    out: set[Composition] = set()
    for device, d in load("world")["devices"].items():
        left = {room: len(d["actions"]) for room in d["rooms"]}  # actions still to be seen with the device in this room
        for action in d["actions"]:
            ranked = sorted(d["rooms"], key=lambda room: _rank(action, device, room))
            for room in [r for r in ranked if left[r] > 1][: max(1, len(ranked) // 4)]:
                out.add((action, device, room))
                left[room] -= 1
    return frozenset(out)


def split_of(composition: Composition) -> str:
    return "test" if composition in held_out() else "train"


@cache
def in_split(split: str) -> tuple[Composition, ...]:
    return tuple(c for c in compositions() if split_of(c) == split)


@cache
def by_action(split: str) -> dict[str, tuple[Composition, ...]]:
    """The compositions of a split for each action; every action has some in both."""
    return {action: tuple(c for c in in_split(split) if c[0] == action) for action in load("world")["actions"]}

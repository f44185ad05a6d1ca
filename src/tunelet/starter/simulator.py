"""The simulator: a home that runs commands. An answer is right when running it changes the home as the request wanted.

Not here: what people say (`language.py`) and what counts as a refusal (`grading.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tunelet.starter.world import Command, load, unit

KEYS = {"action", "device", "room", "value", "time", "after"}


class CommandError(ValueError):
    """The home cannot run this; the message says why."""


def _clock(text: Any) -> str:
    if not isinstance(text, str) or len(text) != 5 or text[2] != ":" or not (text[:2] + text[3:]).isdecimal():
        raise CommandError(f"time must be HH:MM, got {text!r}")
    if int(text[:2]) > 23 or int(text[3:]) > 59:
        raise CommandError(f"no such time: {text}")
    return text


def command_from(data: Any) -> Command:
    """A JSON object -> Command, every field checked against the home. Raises CommandError."""
    if not isinstance(data, dict):
        raise CommandError("a command is a JSON object")
    if unknown := set(data) - KEYS:
        raise CommandError(f"unknown field {sorted(unknown)[0]!r}")
    world = load("world")
    action, device, room = (data.get(k) for k in ("action", "device", "room"))
    if not all(isinstance(part, str) for part in (action, device, room)):
        raise CommandError("action, device and room are words")
    if device not in world["devices"]:
        raise CommandError(f"no device {device!r}")
    if room not in world["rooms"] or room not in world["devices"][device]["rooms"]:
        raise CommandError(f"no {device} in {room!r}")
    if action not in world["devices"][device]["actions"]:
        raise CommandError(f"{device} cannot {action!r}")
    value, wants = data.get("value"), unit(action)
    if wants and "words" in wants:
        if value not in wants["words"]:
            raise CommandError(f"{action} takes one of {', '.join(wants['words'])}, got {value!r}")
    elif wants:
        if not isinstance(value, int) or isinstance(value, bool) or not wants["low"] <= value <= wants["high"]:
            raise CommandError(f"{action} takes {wants['low']} to {wants['high']}, got {value!r}")
    elif value is not None:
        raise CommandError(f"{action} takes no value")
    after = data.get("after")
    if after is not None and (not isinstance(after, int) or isinstance(after, bool) or not 0 < after <= 24 * 60):
        raise CommandError(f"after must be 1 to 1440 minutes, got {after!r}")
    time = _clock(data["time"]) if data.get("time") is not None else None
    if time is not None and after is not None:
        raise CommandError("a command has a time or a delay, not both")
    return Command(action, device, room, value, time, after)


def parse(answer: str) -> list[Command]:
    """An answer -> its commands, one JSON object a line. Anything else in the answer raises CommandError."""
    commands = []
    for line in answer.strip().splitlines():
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            raise CommandError(f"not JSON: {line[:60]!r}") from error
        commands.append(command_from(data))
    if not commands:
        raise CommandError("empty answer")
    return commands


def write(commands: Iterable[Command]) -> str:
    """Commands as the text a model should answer."""
    return "\n".join(json.dumps(c.as_dict(), ensure_ascii=False, separators=(",", ":")) for c in commands)


class Home:
    """The state of every device, and what is scheduled. Equal homes have had the same effect."""

    _STATE = {  # noqa: RUF012 - a constant table
        "turn_on": ("power", "on"), "turn_off": ("power", "off"), "open": ("position", 100), "close": ("position", 0),
        "lock": ("locked", True), "unlock": ("locked", False), "start": ("running", True), "stop": ("running", False),
    }  # fmt: skip

    def __init__(self) -> None:
        self.state: dict[tuple[str, str], dict[str, Any]] = {}
        self.schedule: set[tuple[str, Command]] = set()

    def run(self, command: Command) -> None:
        """Do it now, or put it on the schedule where it has a time or a delay."""
        if command.time is not None or command.after is not None:
            when = command.time if command.time is not None else f"+{command.after}"
            self.schedule.add((when, command))
            return
        key, value = self._STATE.get(command.action) or (command.action.removeprefix("set_"), command.value)
        device = self.state.setdefault((command.room, command.device), {})
        device[key] = value
        if command.action.startswith("set_") and key != "position":
            device["power"] = "on"

    def run_all(self, commands: Iterable[Command]) -> Home:
        for command in commands:
            self.run(command)
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Home) and self.state == other.state and self.schedule == other.schedule

    __hash__ = None  # type: ignore[assignment]

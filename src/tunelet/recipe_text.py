"""A recipe as text: TOML to load again, the table of resolved values, and the commented file of `recipe init`.

Writing only; reading is in `recipe_io.py`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, get_args, get_origin

import tomli_w

from tunelet.recipe import Recipe
from tunelet.recipe_io import fields, values


def to_toml(recipe: Recipe) -> str:
    """Every value, as TOML that `recipe_io.load` reads back to an equal recipe."""
    return tomli_w.dumps(recipe.model_dump())


def resolved(recipe: Recipe, origins: Mapping[str, str]) -> str:
    """Every value as TOML, each line with its origin in a comment: the run folder's resolved.toml."""
    lines: list[str] = []
    section = ""
    for key, value in values(recipe).items():
        head, _, leaf = key.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]"]
        lines.append(f"{leaf} = {inline(value)}  # {origins.get(key, 'default')}")
    return "\n".join(lines).lstrip("\n") + "\n"


def asked_toml(recipe: Recipe, origins: Mapping[str, str]) -> str:
    """Only what was asked for (by recipe, flag or --set), as a recipe."""
    lines, section, defaults = [], "", values(Recipe())
    for key, value in values(recipe).items():
        if origins.get(key, "default") == "default" and value == defaults[key]:
            continue
        head, _, leaf = key.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]"]
        lines.append(f"{leaf} = {inline(value)}")
    return "\n".join(lines).lstrip("\n") + "\n"


def commented(given: Mapping[str, Any]) -> str:
    """A starting recipe: the `given` dotted keys set, every other key commented out, with default and meaning."""
    lines = [
        "# A recipe for tunelet. A line that starts with '#' shows a key, its default and",
        "# what it means; take the '#' away to change it.",
        "# Try it with: tunelet recipe show FILE",
    ]
    section = ""
    for key, info in fields().items():
        head, _, leaf = key.rpartition(".")
        if head != section:
            section = head
            lines += ["", f"[{section}]"]
        default = info.get_default(call_default_factory=True)
        choices = get_args(info.annotation) if get_origin(info.annotation) is not None else ()
        choice = " | ".join(map(str, choices)) if choices and all(isinstance(c, str) for c in choices) else ""
        meaning = "; ".join(part for part in (choice, info.description or "") if part)
        lines += [f"# {line}" for line in textwrap.wrap(meaning, 76)]
        if key in given:
            lines.append(f"{leaf} = {inline(given[key])}")
        else:
            lines.append(f"# {leaf} = {inline(default)}")
    return "\n".join(lines) + "\n"


def inline(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {inline(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(inline(v) for v in value) + "]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").rstrip("\n")


def _key(name: str) -> str:
    return name if name and all(c.isascii() and (c.isalnum() or c in "_-") for c in name) else inline(name)

"""The grid of a sweep: `--set KEY=a,b,c` becomes dimensions, their cross product cells, each with a checked recipe and
a name.

Not for running cells (sweep.py). Everything a user can get wrong in a grid is said here, before anything is trained.
"""

from __future__ import annotations

import itertools
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin

from tunelet import recipe_io
from tunelet.errors import TuneletError
from tunelet.recipe import ADAPTER_KEYS, METHOD_KEYS, Recipe
from tunelet.recipe_text import inline

MOST = 200  # cells
FULL = "full"  # name of the cell that is added: all weights are tuned
SAID = 20  # characters of a value in a cell's name
NAME = 80  # and of the whole name
FIRST = ("method.name", "adapter.kind")  # these say most, and stand first in a name
OPEN, CLOSE = "[{", "]}"

Flags = Mapping[str, tuple[str, Any]]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. varied: dotted key -> value, of the dimensions that this cell reads."""

    name: str
    recipe: Recipe
    origins: dict[str, str]
    varied: dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """name: of the recipe, or its method; dimensions: dotted key -> its choices, as they were written; notes: sentences
    on what was done for the user."""

    name: str
    dimensions: dict[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()


def asked(recipe: Recipe) -> dict[str, Any]:
    """Dotted key -> value, of everything in a recipe that is not at its default; the name does not count. What makes
    two cells the same."""
    defaults = recipe_io.values(Recipe())
    return {k: v for k, v in recipe_io.values(recipe).items() if k != "name" and v != defaults[k]}


# -- reading --set ----------------------------------------------------------------------------------------------------


def choices(raw: str, *, is_list: bool = False) -> list[str]:
    """The choices in the value of one `--set`: `a,b,c`, or a TOML array of them; each as `--set` takes it.

    is_list: the key holds a list, so that a comma belongs to its value, and only an array of arrays holds several.
    Commas in quotes, brackets and braces part nothing. Raises ValueError, with the reason, for empty choices and for
    what is opened and not closed.
    """
    raw = raw.strip()
    if raw.startswith("["):
        try:
            array = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"it begins as a TOML array and is none: {error}") from None
        if not is_list or any(isinstance(one, list) for one in array):
            if is_list and not all(isinstance(one, list) for one in array):
                raise ValueError("it mixes lists with other values")
            if not array:
                raise ValueError("the array is empty")
            return [inline(one) for one in array]
        return [raw]
    if is_list:
        return [raw]
    parts = _split(raw)
    if len(parts) > 1 and "" in parts:
        raise ValueError("a choice is empty")
    return parts


def _split(raw: str) -> list[str]:
    """At commas outside quotes and brackets. A quote opens only where a value begins, so that an apostrophe is one."""
    parts, begun, depth, quote, start = [], False, 0, "", 0
    skip = False
    for at, char in enumerate(raw):
        if skip:
            skip = False
        elif quote:
            skip = char == "\\" and quote == '"'
            quote = "" if char == quote else quote
        elif char in "\"'" and (not begun or depth):
            quote, begun = char, True
        elif char in OPEN and (not begun or depth):
            depth, begun = depth + 1, True
        elif char in CLOSE and depth:
            depth -= 1
        elif char == "," and not depth:
            parts.append(raw[start:at].strip())
            start, begun = at + 1, False
        elif not char.isspace():
            begun = True
    if quote or depth:
        raise ValueError(f"a {'quote' if quote else 'bracket'} is opened and not closed")
    return [*parts, raw[start:].strip()]


def _pairs(sets: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Key -> choices (one or more) of all `--set`. Raises TuneletError."""
    known, out = recipe_io.fields(), {}
    for text in sets:
        key, equals, raw = text.partition("=")
        key = key.strip()
        if not equals or not key:
            recipe_io.load(sets=[text])  # says how a --set is written
        key = "method.name" if key == "method" else key
        if key in recipe_io.sections():
            inside = [name for name in known if name.startswith(f"{key}.")]
            raise TuneletError(f"--set {text}: {key} is a section", fix=f"name a key of it: {', '.join(inside)}")
        is_list = _is_list(key)
        try:
            found = tuple(choices(raw, is_list=is_list))
        except ValueError as error:
            wanted = '[["a"], ["a", "b"]]' if is_list else "a,b,c"
            raise TuneletError(
                f"--set {text}: {error}",
                fix=f"write for example --set '{key}={wanted}'; a comma inside a text needs quotes around the text",
            ) from None
        if key in out and len(found) + len(out[key]) > 2:
            raise TuneletError(f"--set {key} is given twice", fix=f"give all its values at once: --set {key}=a,b,c")
        out[key] = found
    return out


# -- making cells -----------------------------------------------------------------------------------------------------


def make(file: str | None, sets: Sequence[str], flags: Flags | None = None, *, full: bool = True) -> Grid:
    """The cells of a sweep over the recipe `file` (None: the defaults), at least two choices in at least one of `sets`.

    Cells that come to the same recipe are one: a key that a kind of adapter or a method does not read is left at its
    default there. full: one more cell that tunes all weights, where an adapter.* key varies and no cell does so (one
    for each choice of the dimensions that are not of adapters). Raises TuneletError for anything wrong in any cell.
    """
    flags = {flag: pair for flag, pair in (flags or {}).items() if pair[1] not in (None, [])}
    pairs = _pairs(sets)
    recipe_io.load(sets=[f"{key}=" for key in pairs if not _known(key)])  # says all unknown keys at once
    for flag, (key, _) in flags.items():
        if len(pairs.get(key, ())) > 1:
            raise TuneletError(f"{flag} and --set {key} both say {key}", fix=f"leave {flag} out")
    source = _Source(file, {key: of[0] for key, of in pairs.items() if len(of) == 1}, dict(flags))
    dimensions = {key: of for key, of in pairs.items() if len(of) > 1}
    if not dimensions:
        lists = [key for key, (raw, *_) in pairs.items() if _is_list(key) and "," in raw]
        raise TuneletError(
            "a sweep varies something, and no --set has several values",
            why=f"{lists[0]} holds a list, and a comma belongs to it" if lists else "",
            fix=f"give a list of lists: --set '{lists[0]}=[[\"a\"], [\"b\"]]'" if lists
            else "give values with commas between them: tunelet sweep --adapter lora --set adapter.rank=2,8,32",
        )  # fmt: skip
    if (many := math.prod(map(len, dimensions.values()))) > MOST:
        raise TuneletError(
            f"the grid has {many:,} cells", why=f"each is a whole training, and at most {MOST} are taken",
            fix="leave out dimensions or choices",
        )  # fmt: skip
    found: list[Cell] = []
    for values in itertools.product(*dimensions.values()):
        _add(found, source.cell(dict(zip(dimensions, values, strict=True))))
    notes = source.unread(found, {key: ",".join(of) for key, of in pairs.items()})
    adapters = any(key.startswith("adapter.") for key in dimensions)
    if full and adapters and all(cell.recipe.adapter.kind != "none" for cell in found):
        told = source.full(dimensions, found)
        notes.append(told)
    if len(found) == 1:
        raise TuneletError(
            "all cells of the grid come to the same recipe", fix="give values that differ, for keys that are read"
        )
    first = found[0].recipe
    name = first.name if first.name != "run" else first.method.name
    return Grid(name, dimensions, tuple(_named(found, list(dimensions))), tuple(notes))


def _is_list(key: str) -> bool:
    known = recipe_io.fields()
    return key in known and get_origin(known[key].annotation) is list


def _known(key: str) -> bool:
    known = recipe_io.fields()
    parent = ".".join(key.split(".")[:2])
    return key in known or (parent in known and get_origin(known[parent].annotation) is dict)


def _add(cells: list[Cell], cell: Cell) -> None:
    if all(asked(cell.recipe) != asked(other.recipe) for other in cells):
        cells.append(cell)


@dataclass(frozen=True)
class _Source:
    """What all cells come from: the recipe file, the plain settings and the flags."""

    file: str | None
    plain: dict[str, str]
    flags: dict[str, tuple[str, Any]]

    def cell(self, chosen: Mapping[str, str]) -> Cell:
        """The cell of these choices, without those that it does not read."""
        given = {**self.plain, **chosen}
        kind, method = self.said("adapter.kind", "none", given), self.said("method.name", "sft", given)
        out = _unread(kind, method)
        sets = [f"{key}={raw}" for key, raw in given.items() if key not in out]
        defaults = recipe_io.values(Recipe())
        # what a file says for another kind or method would be refused here, so it is put back to the default
        back = {f"default: not read by {why}: {key}": (key, defaults[key]) for key, why in out.items()
                if self.in_file(key) is not None}  # fmt: skip
        try:
            loaded = recipe_io.load(self.file, sets=sets, flags={**self.flags, **back})
        except TuneletError as error:
            words = ", ".join(f"{key}={raw}" for key, raw in chosen.items())
            raise TuneletError(f"cell {words}: {error.what}", why=error.why, fix=error.fix) from None
        values = recipe_io.values(loaded.recipe)
        varied = {key: values.get(key, raw) for key, raw in chosen.items() if key not in out}
        return Cell("", loaded.recipe, loaded.origins, varied)

    def full(self, dimensions: Mapping[str, tuple[str, ...]], cells: list[Cell]) -> str:
        """Add the cells that tune all weights; a sentence on it."""
        own = ("model.quantization", "train.learning_rate")  # that say something of adapters alone
        rest = {key: of for key, of in dimensions.items() if not key.startswith("adapter.") and key not in own}
        told = "All weights are tuned in one more cell (--no-full leaves it out)"
        flags = {flag: pair for flag, pair in self.flags.items() if pair[0] != "adapter.kind"}
        plain = {**self.plain, "adapter.kind": "none"}
        rate = self.in_file("train.learning_rate")
        by_set = "train.learning_rate" in {**self.plain, **dimensions}
        if by_set or (rate and self.in_file("adapter.kind") not in (None, "none")):
            plain["train.learning_rate"] = "0"
            told += "; the learning rate that is given is for adapters, so that cell has the default for full tuning"
        elif rate:
            told += f"; it keeps the learning rate of {self.file}, which is for full tuning, and adapters get it too: "
            told += "--set train.learning_rate=0 gives each kind its own default"
        for values in itertools.product(*rest.values()):
            made = _Source(self.file, plain, flags).cell(dict(zip(rest, values, strict=True)))
            _add(cells, Cell(FULL, made.recipe, made.origins, {**made.varied, "adapter.kind": "none"}))
        return f"{told}."

    def said(self, key: str, default: str, given: Mapping[str, str]) -> str:
        """What a cell has for a key of one word, before it is checked."""
        flag = next((value for of, value in self.flags.values() if of == key), None)
        return str(flag or given.get(key, "").strip("\"'") or self.in_file(key) or default)

    def in_file(self, key: str) -> Any:
        """What the recipe file says for a key; None where it says nothing."""
        tree = _tree(self.file)
        if key == "method.name" and isinstance(tree.get("method"), str):
            return tree["method"]
        section, _, leaf = key.partition(".")
        below = tree.get(section)
        return below.get(leaf) if isinstance(below, dict) else None

    def unread(self, cells: Sequence[Cell], given: Mapping[str, str]) -> list[str]:
        """Sentences on keys of `given` that not every cell reads. Raises TuneletError for one that none does."""
        skipped: dict[str, list[str]] = {}
        for key, raw in given.items():
            readers = [cell for cell in cells if key not in _unread(cell.recipe.adapter.kind, cell.recipe.method.name)]
            if not readers:
                chooser = "method.name" if key.startswith("method.") else "adapter.kind"
                kinds = sorted({_unread(cell.recipe.adapter.kind, cell.recipe.method.name)[key] for cell in cells})
                raise TuneletError(
                    f"--set {key}={raw}: {key} has no effect",
                    why=f"no cell reads it: {chooser} is {', '.join(kinds)}",
                    fix="leave it out" + (", or add --adapter lora" if kinds == ["none"] else ""),
                )
            others = dict.fromkeys(
                _unread(cell.recipe.adapter.kind, cell.recipe.method.name)[key] for cell in cells if cell not in readers
            )
            if others:
                skipped.setdefault(", ".join(others), []).append(key)
        return [
            f"{', '.join(keys)}: not read by {who}, and left at the default there." for who, keys in skipped.items()
        ]


def _tree(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(recipe_io.find(file).read_bytes().decode("utf-8-sig").replace("\r\n", "\n"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {}  # recipe_io.load says what is wrong with it


def _unread(kind: str, method: str) -> dict[str, str]:
    """Dotted keys that this kind of adapter and this method do not read -> who does not read them."""
    out = {f"adapter.{key}": kind for key, kinds in ADAPTER_KEYS.items() if kind not in kinds}
    if kind == "none":  # quantised weights are frozen, so that only an adapter can be trained on them
        out |= {key: kind for key in recipe_io.fields() if key.startswith("adapter.") and key != "adapter.kind"}
        out["model.quantization"] = kind
    return out | {f"method.{key}": method for key, methods in METHOD_KEYS.items() if method not in methods}


# -- names ------------------------------------------------------------------------------------------------------------


def short(key: str, keys: Sequence[str]) -> str:
    """A dotted key as people say it: its last part, where no other key ends so."""
    if key == "method.name":
        return "method"
    leaf = key.rpartition(".")[2]
    return key.replace(".", "-") if sum(other.rpartition(".")[2] == leaf for other in keys) > 1 else leaf


def shown(value: Any) -> str:
    """A value as people read it in a table."""
    if isinstance(value, list):
        return "+".join(map(shown, value)) or "(default)"
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else inline(value)


def _named(cells: Sequence[Cell], keys: list[str]) -> list[Cell]:
    """The cells with names that are unique, also where upper and lower case are one, and that any file system takes."""
    keys = sorted(keys, key=lambda key: key not in FIRST)
    taken: set[str] = set()
    out = []
    for cell in cells:
        told = [key for key in keys if key in cell.varied and (cell.name != FULL or key != "adapter.kind")]
        parts = [f"{short(key, keys)}-{_safe(shown(cell.varied[key]))}" for key in told]
        base = "_".join([*([cell.name] if cell.name else []), *parts])[:NAME] or "cell"
        name = next(
            name for number in itertools.count(1)
            if (name := base if number == 1 else f"{base}-{number}").casefold() not in taken
        )  # fmt: skip
        taken.add(name.casefold())
        title = name if cell.recipe.name == "run" else f"{cell.recipe.name}: {name}"
        recipe = cell.recipe.model_copy(update={"name": title})
        out.append(Cell(name, recipe, cell.origins, cell.varied))
    return out


def _safe(text: str) -> str:
    last = Path(text).name if "/" in text else text
    return re.sub(r"[^\w.+-]+", "-", last).strip("-.")[-SAID:] or "empty"

"""Recipes in and out: TOML, `--set` and flags above it, and where each value came from.

Precedence: defaults < recipe file < --set < dedicated flags. What the keys mean is in `recipe.py`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from tunelet.errors import TuneletError
from tunelet.recipe import ADAPTER_KEYS, BASELINE_KEYS, INITS, METHOD_KEYS, Recipe, Section
from tunelet.recipe_names import suggest

SHIPPED = Path(__file__).parent / "recipes"  # an installed wheel has them here ...
if not SHIPPED.is_dir():
    SHIPPED = Path(__file__).resolve().parents[2] / "recipes"  # ... a checkout at its root


@dataclass(frozen=True)
class Loaded:
    """A checked recipe; `origins` says for every dotted key: "default", "recipe FILE", "--set" or the flag's name."""

    recipe: Recipe
    origins: dict[str, str]


def fields() -> dict[str, FieldInfo]:
    """Every dotted key of a recipe with its pydantic field, in the order of the file."""
    out: dict[str, FieldInfo] = {}
    for name, info in Recipe.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            out |= {f"{name}.{key}": sub for key, sub in info.annotation.model_fields.items()}
        else:
            out[name] = info
    return out


def values(recipe: Recipe) -> dict[str, Any]:
    """Every dotted key with its value."""
    return {key: _get(recipe, key) for key in fields()}


def load(
    path: str | Path | None = None, *, sets: Sequence[str] = (), flags: Mapping[str, tuple[str, Any]] | None = None
) -> Loaded:
    """Read a recipe file (or start from the defaults), then apply `--set` pairs and `flags`: {"--model": (key, value)}.

    A `path` that does not exist may name a shipped recipe ("starter"). Raises TuneletError for a missing or unreadable
    file, broken TOML, unknown keys (all at once, with file and line), wrong types and values out of range.
    """
    tree: dict[str, Any] = {}
    origins = dict.fromkeys(fields(), "default")
    wheres: dict[str, str] = {}  # how an error names the place of a key
    text, shown = "", "--set"
    if path is not None:
        file = find(path)
        shown = str(path) if Path(path).is_file() else file.name
        text = _read(file, shown)
        tree = _parse(text, shown)
        lines = key_lines(text)
        if isinstance(tree.get("method"), str):  # the short form
            tree["method"] = {"name": tree["method"]}
            lines["method.name"] = lines.pop("method", 1)
        unknown = []
        for key, _ in _leaves(tree):
            wheres[key] = f"{shown}, line {lines[key]}" if key in lines else shown
            if key in origins:
                origins[key] = f"recipe {shown}"
            else:
                unknown.append((wheres[key], key))
        _refuse_unknown(unknown)
    pairs = [("--set", "method.name" if key == "method" else key, raw) for key, raw in map(_pair, sets)]
    _refuse_unknown([("--set", key) for _, key, _ in pairs if not _known(key)])
    for flag, key, raw in pairs:
        if key in sections():
            inside = ", ".join(name for name in fields() if name.startswith(f"{key}."))
            raise TuneletError(f"--set {key}={raw}: {key} is a section", fix=f"set one of its keys: {inside}")
        _put(tree, key, _typed(_field_of(key), raw))
        origins[_field_of(key)], wheres[_field_of(key)] = flag, flag
    for flag, (key, value) in (flags or {}).items():
        _put(tree, key, value)
        origins[key], wheres[key] = flag, flag
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, wheres, shown) from None
    if path is not None and origins["then"].startswith("recipe"):
        beside = find(path).parent
        recipe.then = [str(beside / name) if (beside / name).is_file() else name for name in recipe.then]
    _check(recipe, wheres, shown)
    return Loaded(recipe, origins)


def find(path: str | Path) -> Path:
    """The recipe's file: as given, else a shipped recipe of that name. Raises TuneletError where there is neither."""
    file = Path(path)
    if file.is_dir():
        raise TuneletError(f"{path}: is a folder, not a recipe", fix="give the recipe's .toml file")
    if file.exists():
        return file
    shipped = SHIPPED / f"{file.name.removesuffix('.toml')}.toml"
    if (file.parent in (Path(), Path("recipes"))) and shipped.is_file():
        return shipped
    raise TuneletError(
        f"{path}: there is no such recipe file",
        why=f"not a file here, and not one of the shipped recipes ({', '.join(shipped_names()) or 'none'})",
        fix=f"write one with: tunelet recipe init --data YOUR_FILE --out {path}",
    )


def shipped_names() -> list[str]:
    return sorted(file.stem for file in SHIPPED.glob("*.toml"))


# --- TOML in -----------------------------------------------------------------------------------------------------


def _read(file: Path, shown: str) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TuneletError(
            f"{shown}, line {line}: the recipe is not UTF-8 text", why=str(error), fix="save the file as UTF-8"
        ) from None
    except OSError as error:
        raise TuneletError(f"{shown}: can't be read", why=str(error), fix="check its permissions") from None


def _parse(text: str, shown: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text.replace("\r\n", "\n"))
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        place = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
        line = int(place[1]) if place and place[1] else len(text.splitlines())
        source = text.splitlines()[line - 1].strip() if 0 < line <= len(text.splitlines()) else ""
        hint = ""
        if re.match(r"^[\w.-]+\s*:", source):
            hint = "TOML has `key = value`, not `key: value`"
        elif re.match(r"^[\w.-]+\s*=\s*[A-Za-z/.~]", source):
            hint = 'a text needs quotes: key = "value" (true and false are written small)'
        elif "Expected" in message and source.count("'") % 2 + source.count('"') % 2:
            hint = "a quote is opened and not closed"
        cause = message[: place.start()] if place else message
        raise TuneletError(
            f"{shown}, line {line}: not valid TOML: {source!r}" if source else f"{shown}, line {line}: not valid TOML",
            why=cause,
            fix=hint or f"mend line {line}; a working example: tunelet recipe init",
        ) from None


def key_lines(text: str) -> dict[str, int]:
    """{dotted key: line} of a TOML text, as far as keys stand at the start of a line; for error messages only."""
    out: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"^\s*\[+\s*([\w.\-\" ]+?)\s*\]+", line):
            table = header[1].replace('"', "").replace(" ", "")
            out.setdefault(table, number)
        elif pair := re.match(r"^\s*([\w.\-\"]+)\s*=", line):
            key = pair[1].replace('"', "")
            out.setdefault(f"{table}.{key}" if table else key, number)
    return out


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys down to the recipe's fields (a field that is itself a table is one leaf)."""
    known = fields()
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name not in known and isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _refuse_unknown(unknown: Sequence[tuple[str, str]]) -> None:
    known = list(fields())
    unknown = [(where, key) for where, key in unknown if key not in sections()]
    if not unknown:
        return
    lines = [f"{where}: unknown key '{key}'.{suggest(key, known)}" for where, key in unknown]
    raise TuneletError(
        "\n".join(lines),
        fix="correct or remove "
        + ("it" if len(lines) == 1 else f"these {len(lines)} keys")
        + "; every key and what it means: tunelet recipe init",
    )


def sections() -> list[str]:
    return sorted({key.partition(".")[0] for key in fields() if "." in key})


# --- --set ------------------------------------------------------------------------------------------------------


def _pair(text: str) -> tuple[str, str]:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise TuneletError(
            f"--set {text}: is not of the form key=value", fix="write for example: --set train.learning_rate=1e-4"
        )
    return key.strip(), raw.strip()


def _known(key: str) -> bool:
    return _field_of(key) in fields()


def _field_of(key: str) -> str:
    """The field a `--set` key belongs to: `data.columns.prompt` is an entry of the table `data.columns`."""
    known = fields()
    if key in known:
        return key
    parent = ".".join(key.split(".")[:2])
    return parent if parent in known and get_origin(known[parent].annotation) is dict else key


def _typed(key: str, raw: str) -> Any:
    """The value of `--set key=raw`: TOML where it is TOML, plain text for text fields, commas for lists."""
    annotation = fields()[key].annotation
    try:
        value: Any = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw
    if _is_strings(annotation):
        if isinstance(value, list):
            return value
        return [part.strip() for part in raw.split(",") if part.strip()] if value is raw or "," in raw else [str(value)]
    if annotation is str or str in map(type, get_args(annotation)):  # str or Literal["..."]
        return value if isinstance(value, str) else raw
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)  # 1e3 steps
    if annotation in (int, float) and isinstance(value, str):
        try:
            return annotation(value)  # .5
        except ValueError:
            return value
    if annotation is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    return value


def _is_strings(annotation: Any) -> bool:
    return get_origin(annotation) is list


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        below = tree.get(parent)
        if not isinstance(below, dict):  # a section that the file gave as something else: pydantic would name it
            below = tree[parent] = {}
        tree = below
    tree[leaf] = value


def _get(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part)
    return value


# --- what is wrong with a value -----------------------------------------------------------------------------------


def _explain(error: ValidationError, wheres: Mapping[str, str], shown: str) -> TuneletError:
    lines = []
    for problem in error.errors(include_url=False):
        parts = [str(part) for part in problem["loc"]]
        key = next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in fields()), ".".join(parts))
        what = problem["msg"][:1].lower() + problem["msg"][1:]
        lines.append(f"{wheres.get(key, shown)}: {key} = {problem['input']!r}: {what}")
    keys = sorted({line.split(": ")[1].split(" = ")[0] for line in lines})
    meaning = [f"{key}: {info.description}" for key, info in fields().items() if key in keys and info.description]
    return TuneletError("\n".join(lines), why="; ".join(meaning), fix=f"give {', '.join(keys)} a value of that kind")


def _check(recipe: Recipe, wheres: Mapping[str, str], shown: str) -> None:
    """What only shows where two keys are looked at together."""
    model = recipe.model
    at = wheres.get("model.path", wheres.get("model.architecture", shown))
    if recipe.method.name != "pretrain" and not model.path:
        raise TuneletError(
            f"{at}: model.path is empty",
            why=f"{recipe.method.name} tunes a model that exists",
            fix="give one: --model M",
        )
    if model.architecture and model.path:
        raise TuneletError(
            f"{wheres.get('model.architecture', shown)}: model.architecture and a model.path exclude each other",
            why=f"an architecture is only used to start from random weights, and model.path is {model.path!r}",
            fix="set model.path = '' to start from random weights, or remove [model.architecture]",
        )
    if not model.path and not model.architecture:
        raise TuneletError(
            f"{at}: model.path is empty and there is no [model.architecture]",
            why="first training from random weights needs to know the model's shape",
            fix="start from recipes/starter-base.toml, or give --model M to go on with an existing model",
        )
    if not recipe.data.train:
        raise TuneletError(
            f"{wheres.get('data.train', shown)}: data.train is empty", fix="give at least one source: --data FILE"
        )
    # A setting without effect is a mistake: somebody believes it has one.
    for section, useless, why, fix in (
        ("adapter", recipe.adapter.kind == "none", "adapter.kind is 'none'", "add --adapter lora, or leave it out"),
        ("tokenizer", bool(model.path), "the model brings its tokenizer", "leave it out, or start from random weights"),
        (
            "eval",
            not recipe.eval.baselines,
            "eval.baselines is false, so that no prompt is asked",
            "leave one of the two out",
        ),
    ):
        given = [key for key, info in fields().items() if key.startswith(f"{section}.") and key in wheres
                 and (section != "eval" or key.rpartition(".")[2] in BASELINE_KEYS)
                 and _get(recipe, key) != info.get_default(call_default_factory=True)]  # fmt: skip
        if useless and given:
            raise TuneletError(f"{wheres[given[0]]}: {given[0]} has no effect", why=why, fix=fix)
    _check_method(recipe, wheres, shown)
    _check_adapter(recipe, wheres, shown)


def _check_read(
    section: Section, name: str, readers: Mapping[str, Sequence[str]], chosen: str, what: str, wheres: Mapping[str, str]
) -> None:
    """Raises TuneletError for a key of a section that is set and not read by what was chosen."""
    defaults = type(section)()
    for key, those in readers.items():
        where = wheres.get(f"{name}.{key}")
        if where and chosen not in those and getattr(section, key) != getattr(defaults, key):
            raise TuneletError(
                f"{where}: {name}.{key} has no effect",
                why=f"the {what} is {chosen}, and {key} is read by {', '.join(those)}",
                fix=f"leave it out, or take another {what}",
            )


def _check_adapter(recipe: Recipe, wheres: Mapping[str, str], shown: str) -> None:
    """The keys of [adapter] that go with its kind, and with each other."""
    adapter = recipe.adapter
    _check_read(adapter, "adapter", ADAPTER_KEYS, adapter.kind, "adapter.kind", wheres)
    if adapter.init not in ("auto", *INITS.get(adapter.kind, ())):
        known = ", ".join(INITS.get(adapter.kind, ("auto",)))
        raise TuneletError(
            f"{wheres.get('adapter.init', shown)}: adapter.init = {adapter.init!r} is not for {adapter.kind}",
            why=f"{adapter.kind} can begin with: {known}",
            fix="take one of these, or leave it out",
        )
    if (adapter.init == "text") > bool(adapter.init_text) or (
        adapter.init_text and adapter.init not in ("auto", "text")
    ):
        raise TuneletError(
            f"{wheres.get('adapter.init_text', wheres.get('adapter.init', shown))}: adapter.init and adapter.init_text "
            "do not go together",
            why=f"adapter.init is {adapter.init!r} and adapter.init_text {adapter.init_text!r}",
            fix='give both: --set adapter.init=text --set adapter.init_text="Answer with one JSON command."',
        )
    if adapter.init in ("olora", "pissa") and recipe.model.quantization != "none":
        raise TuneletError(
            f"{wheres.get('adapter.init', shown)}: adapter.init = {adapter.init!r} needs unquantised weights",
            why="it moves a part of the weights into the adapter, and quantised weights cannot be changed",
            fix="leave one of adapter.init and model.quantization out",
        )


def _check_method(recipe: Recipe, wheres: Mapping[str, str], shown: str) -> None:
    """The keys of [method] that go with its name, and with each other."""
    method = recipe.method
    _check_read(method, "method", METHOD_KEYS, method.name, "method", wheres)
    smoothed = method.loss_type in ("cdpo", "robust")
    if method.name == "dpo" and smoothed != (method.label_smoothing > 0):
        key = "method.loss_type" if smoothed else "method.label_smoothing"
        raise TuneletError(
            f"{wheres.get(key, shown)}: {key} has no effect",
            why=f"method.loss_type is {method.loss_type!r} and method.label_smoothing {method.label_smoothing}",
            fix="give both: --set method.loss_type=robust --set method.label_smoothing=0.1",
        )

"""The stages of one alignment: a recipe, and the recipes it names in `then`, each going on from the result of the one
before.

The last stage's run is the folder that was asked for, so that its model/ is the result; the others lie below it in
stages/. Not for running them (align.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunelet import recipe_io
from tunelet.errors import TuneletError
from tunelet.recipe import BASELINE_KEYS, Recipe
from tunelet.runs.record import STAGES, Run, is_run

GATES = ("baselines", "forgetting", *BASELINE_KEYS)  # keys of [eval]: one verdict over all stages


@dataclass(frozen=True)
class Stage:
    """recipe: its model.path is the run of the stage before."""

    recipe: Recipe
    origins: dict[str, str]
    folder: Path


def of(recipe: Recipe, origins: Mapping[str, str], out: Path) -> list[Stage]:
    """At least one. Raises TuneletError where a recipe of `then` cannot be read, or has a `then` of its own."""
    loaded = [recipe_io.Loaded(recipe, dict(origins)), *(recipe_io.load(name) for name in recipe.then)]
    for name, one in zip(recipe.then, loaded[1:], strict=True):
        if one.recipe.then:
            raise TuneletError(
                f"{name}: a recipe named in `then` has a `then` of its own",
                fix="name all recipes, in turn, in the first one",
            )
    out_stages: list[Stage] = []
    for number, one in enumerate(loaded, 1):
        last = number == len(loaded)
        made, where = one.recipe.model_copy(deep=True), dict(one.origins)
        made.then = []
        folder = out if last else out / STAGES / f"{number}-{made.method.name}"
        if out_stages:
            made.model.path = str(out_stages[-1].folder)
            made.name = recipe.name
            for key in ("device", "dtype", "threads", "trust_remote_code", "chat_template"):
                if where.get(f"model.{key}", "default") == "default":  # what was asked of the first holds for all
                    setattr(made.model, key, getattr(recipe.model, key))
            for key in GATES:
                if where.get(f"eval.{key}", "default") == "default":
                    setattr(made.eval, key, getattr(recipe.eval, key))
            where["model.path"] = "the stage before"
            _go_on_with_adapter(out_stages[-1].recipe, made, where)
        out_stages.append(Stage(made, where, folder))
    return out_stages


def _go_on_with_adapter(before: Recipe, made: Recipe, where: dict[str, str]) -> None:
    """A stage that names no adapter, after one that trained one, trains that adapter on, over the same base. What a
    stage says of an adapter itself stays, and is held against the one that is there (models/adapters.py)."""
    adapter = before.adapter
    if adapter.kind == "none" or made.adapter.kind != "none":
        return
    changes: dict[str, object] = {"init": "auto", "init_text": "", "target_modules": []}
    if adapter.init in ("olora", "pissa"):  # written with what it began as beside it
        changes |= {"rank": 2 * adapter.rank, "alpha": adapter.alpha * (2**0.5 if adapter.kind == "rslora" else 2)}
    made.adapter = adapter.model_copy(update=changes)
    where |= {f"adapter.{key}": "that of the stage before" for key in type(adapter).model_fields}
    if made.model.quantization == "none":
        made.model.quantization = before.model.quantization
        where["model.quantization"] = "as in the stage before"


def unfinished(recipe: Recipe, out: Path) -> Run | None:
    """The run in `out` that a call with this recipe would go on with: its newest stage; None where there is none."""
    found = None
    for stage in of(recipe, {}, out):
        if not is_run(stage.folder):
            break
        run = Run.open(stage.folder)
        if run.differences(stage.recipe):
            return None
        found = run
    return found if found is not None and not (found.folder == out and found.status == "finished") else None

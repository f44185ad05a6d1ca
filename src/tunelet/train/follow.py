"""What a process other than process 0 does in a training: it prepares the same rows, loads the same model and trains
beside it. It prints nothing and writes nothing.

Not for process 0, which runs train/run.py as ever and tells the others, twice, what they need: the recipe before it
checks the data, and then whatever it has settled. So a recipe, a run's folder and a checkpoint have to be where process
0 is only; data and model have to be on every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet.errors import TuneletError
from tunelet.recipe import Recipe
from tunelet.train import distributed

if TYPE_CHECKING:
    from tunelet.models.device import Choice
    from tunelet.train.prepare import Prepared


def tell_recipe(recipe: Recipe) -> None:
    """Process 0: let the others begin with the data."""
    distributed.world().told(recipe.model_dump(mode="json"))


def tell_settled(recipe: Recipe, choice: Choice, prepared: Prepared, tokenizer: Path) -> None:
    """Process 0: the recipe with nothing left open, the device, and the folder of a tokenizer that was trained, if one
    was."""
    world = distributed.world()
    if world.size == 1:
        return
    files = {path.name: path.read_text(encoding="utf-8") for path in tokenizer.glob("*") if path.is_file()}
    told = {"recipe": recipe.model_dump(mode="json"), "choice": dataclasses.asdict(choice)}
    world.told(told | {"tokenizer": files, "rows": digest(prepared)})


def follow() -> None:
    """Train beside process 0. Raises TuneletError where this machine's data is not that of process 0."""
    from rich.console import Console

    warnings.simplefilter("ignore")  # process 0 shows its own, the same ones
    world = distributed.world()
    recipe = Recipe.model_validate(world.told())
    with tempfile.TemporaryDirectory(prefix="tunelet-") as scratch:
        folder = Path(scratch) / "tokenizer"
        prepared = None
        if recipe.model.path:
            prepared = _prepared(recipe, folder)
        settled = world.told()
        recipe = Recipe.model_validate(settled["recipe"])
        if prepared is None:  # with the tokenizer that process 0 has trained
            folder.mkdir()
            for name, text in settled["tokenizer"].items():
                (folder / name).write_text(text, encoding="utf-8")
            prepared = _prepared(recipe, folder)
    if digest(prepared) != settled["rows"]:
        raise TuneletError(
            f"Process {world.rank} has read other rows than process 0.",
            why="the files of data.train, data.eval or the tokenizer are not the same on its machine",
            fix="Copy them there, or put them where all machines read them, and run the same command again.",
        )
    from tunelet.models import device
    from tunelet.train import loop, run

    choice = device.Choice(**settled["choice"])
    device.apply(choice)
    loop.train(
        recipe,
        None,
        model=run.load_for_training(recipe, prepared, choice),
        tokenizer=prepared.tokenizer,
        train_rows=prepared.train_rows,
        eval_rows=prepared.eval_rows,
        choice=choice,
        console=Console(quiet=True),
    )


def _prepared(recipe: Recipe, folder: Path) -> Any:
    from tunelet.train.prepare import prepare

    return prepare(recipe, folder)


def digest(prepared: Prepared) -> str:
    """A hash of all rows, trained and held out, and of which of their tokens are trained."""
    import numpy as np

    out = hashlib.sha256()
    for rows in (prepared.train_rows, prepared.eval_rows):
        out.update(str(len(rows)).encode())
        for row in rows:
            out.update(np.asarray(row.ids, dtype=np.int32).tobytes())
            out.update(np.asarray(row.mask, dtype=np.bool_).tobytes())
    return out.hexdigest()

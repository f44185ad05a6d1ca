"""Facts of finished runs side by side, what keeps them from being compared, and which settings differ.

Not for items that were answered (evals/paired.py) and not for printing (commands/compare.py). Reads run folders only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError
from tunelet.recipe import METHOD_KEYS
from tunelet.recipe_io import values
from tunelet.runs.record import STAGES, Run, is_run

Facts = dict[str, Any]
LONGEST = 20  # trainings one after the other; a folder that was made anew, from what it led to, would have no end


def finished(folder: Path) -> Run:
    """The run in `folder`. Raises TuneletError where there is none, or it has not finished."""
    run = Run.open(folder)
    if run.status != "finished":
        raise TuneletError(
            f"{folder}: the run is {run.status}, and only finished runs are compared",
            why=run.read_json("FAILED.json", {}).get("what", ""),
            fix="give the command that began it once more (with the same --out): it goes on where it was",
        )
    return run


def facts(run: Run) -> Facts:
    """What a run was, took and reached; None for what it does not know.

    trained: this training and those it goes on from, the oldest first; starts_from: what that one started from.
    metrics: of eval/after.json. held_out, watch: of the evaluation of the weights that were kept, as logged.
    held_out_loss: the method's own. parameters_trained: numbers in the saved adapter, else in the saved model.
    """
    recipe, done, data = run.recipe(), run.read_json("DONE"), run.read_json("data.json", {})
    train, held = data.get("train", {}), data.get("eval", {})
    environment = run.read_json("env.json", {})
    choice = environment.get("choice", {})
    evaluated = [row for row in run.log_rows() if "held_out_loss" in row]
    kept = [row for row in evaluated if row["held_out_loss"] == done.get("held_out_loss")] or evaluated
    last = kept[-1] if kept else {}
    chain = _chain(run)
    return {
        "run": str(run.folder),
        "method": recipe.method.name,
        "loss_type": _read(recipe.method, "loss_type"),
        "beta": _read(recipe.method, "beta"),
        "learning_rate": recipe.train.learning_rate,
        "starts_from": chain[0].recipe().model.path,
        "trained": [_training(one) for one in chain],
        "data": {"sources": recipe.data.train, "rows": train.get("rows"), "sha256": _hashes(train)},
        "held_out_data": {"rows": held.get("rows"), "how": held.get("how"), "sha256": _hashes(held)},
        "tokens": done.get("tokens"),
        "parameters_trained": _saved_numbers(run.model_folder()),
        "peak_mb": done.get("peak_mb"),
        "machine": {"cpu": environment.get("cpu"), **{key: choice.get(key) for key in ("device", "dtype", "threads")}},
        "held_out_loss": done.get("held_out_loss"),
        "stopped": done.get("stopped"),
        "metrics": run.read_json("eval/after.json", {}).get("metrics", {}),
        "held_out": {name: value for name, value in last.items() if name.startswith("held_out/")},
        "watch": {name: value for name, value in last.items() if name.startswith("watch/")},
        "remarks": run.read_json("guard.json", []) + [one for row in evaluated for one in row.get("remarks", [])],
    }


def _read(method: Any, key: str) -> Any:
    """A key of [method] where this method reads it."""
    return getattr(method, key) if method.name in METHOD_KEYS[key] else None


def _chain(run: Run) -> list[Run]:
    """The run, and before it those it goes on from."""
    out = [run]
    while len(out) < LONGEST and (path := out[0].recipe().model.path):
        places = (Path(path), out[0].folder / STAGES / Path(path).name)  # the whole may have been moved
        found = next((place for place in places if is_run(place)), None)
        if found is None:
            break
        out.insert(0, Run.open(found))
    return out


def _training(run: Run) -> dict[str, Any]:
    recipe, done, spent = run.recipe(), run.read_json("DONE", {}), run.read_json("energy.json", {})
    spent = spent.get("parts", {}).get("training", {})
    return {
        "run": str(run.folder),
        "method": recipe.method.name,
        "steps": done.get("steps"),
        "rows_per_step": recipe.train.batch_size * recipe.train.gradient_accumulation,
        "seconds": done.get("seconds"),
        "energy_wh": spent.get("energy_wh"),
        "energy_kind": spent.get("kind"),
    }


def answered(run: Run) -> list[dict[str, Any]]:
    """The rows of eval/after.jsonl; none where the run was not evaluated."""
    path = run.folder / "eval" / "after.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise TuneletError(
            f"{path} is not valid JSON lines.",
            why=str(error),
            fix="It was changed after the run wrote it; restore it, or delete the folder eval/ to compare without it.",
        ) from error


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Dotted key -> its value in each run, of every setting in which their recipes differ; the name does not count."""
    trees = [values(run.recipe()) for run in runs]
    found = {key: [tree[key] for tree in trees] for key in trees[0] if key != "name"}
    return {key: of for key, of in found.items() if any(value != of[0] for value in of[1:])}


def cautions(told: Sequence[Facts], names: Sequence[str]) -> list[str]:
    """Sentences on why figures of the runs may not be held against each other; what matters most comes first."""
    out = []

    def differ(what: Callable[[Facts], Any], text: str, shown: Callable[[Facts], str]) -> None:
        found = [what(one) for one in told]
        if any(one != found[0] for one in found[1:]):
            said = [shown(one) for one in told]
            listed = "; ".join(f"{name}: {one}" for name, one in zip(names, said, strict=True))
            if len(set(said)) == 1:  # what is shown of them is the same
                others = [name for name, one in zip(names, found, strict=True) if one != found[0]]
                listed = f"{said[0]} each; {', '.join(others)}: not those of {names[0]}"
            out.append(f"{text} ({listed}).")

    differ(lambda one: one["starts_from"], "They start from different models", lambda one: one["starts_from"] or "none")
    differ(lambda one: (one["data"]["sha256"], one["data"]["rows"]), "They were trained on different data", data_shown)
    differ(
        lambda one: [(of["steps"], of["rows_per_step"]) for of in one["trained"]], "Their budgets differ", budget_shown
    )
    differ(
        lambda one: (one["held_out_data"]["sha256"], one["held_out_data"]["rows"], one["held_out_data"]["how"]),
        "Their held-out rows differ, and so do figures over them",
        lambda one: f"{one['held_out_data']['rows']} rows",
    )
    differ(
        lambda one: (one["method"], one["loss_type"], one["beta"]),
        "Each method has a held-out loss and rewards of its own, which say nothing against another's",
        method_shown,
    )
    differ(
        lambda one: one["machine"],
        "They ran on different hardware, so time, memory and energy differ by that too",
        lambda one: ", ".join(str(part) for part in one["machine"].values()),
    )
    return out


def method_shown(one: Facts) -> str:
    kind = f" ({one['loss_type']})" if one["loss_type"] else ""
    return one["method"] + kind + (f", beta {one['beta']:g}" if one["beta"] is not None else "")


def data_shown(one: Facts) -> str:
    rows = one["data"]["rows"]
    return ", ".join(one["data"]["sources"]) + (f", {rows:,} rows" if rows is not None else "")


def budget_shown(one: Facts) -> str:
    return ", then ".join(f"{of['method']} {of['steps']} steps of {of['rows_per_step']}" for of in one["trained"])


def _hashes(side: Mapping[str, Any]) -> list[str]:
    """Of the contents alone: the same file under another name is the same data."""
    return sorted(side.get("sha256", {}).values())


def _saved_numbers(folder: Path | None) -> int | None:
    """How many numbers a folder's safetensors files hold, from their headers alone; None without any."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")) if folder else []:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total or None

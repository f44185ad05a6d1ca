"""The run directory: create, open, and write its files so that a kill, a full disk or a crash never leaves half a file.

Not for training (train/), not for reading a run as a page (report.py). Never imports torch. Readable without tunelet:
    recipe.toml (what was asked for)  resolved.toml (every value and its origin)  env.json  data.json  plan.json
    log.jsonl  checkpoints/  model/ or adapter/  eval/*.json[l]  masks.html  energy.json  summary.json  report.html
    DONE or FAILED.json
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import tomllib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunelet.errors import TuneletError
from tunelet.recipe import Recipe
from tunelet.recipe_io import values
from tunelet.recipe_text import asked_toml, resolved
from tunelet.runs.environment import environment
from tunelet.runs.files import LOCK, TEMPORARY, disk, finite, sync, write_atomically

RESOLVED = "resolved.toml"  # written first: a folder that holds it is a run
LOG = "log.jsonl"
PLAN_KEYS = ("seconds", "peak_mb", "disk_mb", "energy_wh")
STAGES = "stages"  # runs that this one goes on from, made by the same call (stages.py)
MODEL_FOLDERS = ("model", "adapter")


class Run:
    """A run folder. Every write is atomic (temporary file, fsync, rename) but `log`, which appends one whole line
    and flushes it.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    # -- making and opening -------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, out: Path | str, recipe: Recipe, origins: Mapping[str, str] | None = None) -> Run:
        """A new run in `out`, which must not exist yet or be empty. `origins`: dotted key -> where its value came from.

        Raises TuneletError where `out` holds a run or anything else, or cannot be written.
        """
        out = Path(out)
        must_be_free(out)
        run = cls(out)
        with disk(out):
            out.mkdir(parents=True, exist_ok=True)
        run._sweep()
        run.write_text(RESOLVED, resolved(recipe, origins or {}))
        run._write_start(recipe, origins or {})
        return run

    @classmethod
    def open(cls, folder: Path | str) -> Run:
        """The run in `folder`. Raises TuneletError where there is none."""
        folder = Path(folder)
        if not is_run(folder):
            what = "there is no such folder" if not folder.exists() else f"it holds no {RESOLVED}"
            raise TuneletError(
                f"{folder} is not a run.",
                why=what,
                fix="Give the folder that `tunelet train` or `tunelet align` wrote (--out).",
            )
        return cls(folder)

    @classmethod
    def open_or_create(
        cls, out: Path | str, recipe: Recipe, origins: Mapping[str, str] | None = None
    ) -> tuple[Run, bool]:
        """(run, was it there). A run of the same recipe is opened, finished or not (see `status`); one of another
        recipe is an error.

        This is what makes "the same command again after a crash goes on".
        """
        if not is_run(out):
            return cls.create(out, recipe, origins), False
        check_folder(out, recipe)
        run = cls.open(out)
        run._sweep()
        run._write_start(recipe, origins or {})  # whatever a kill at the very start left out
        return run, True

    def _write_start(self, recipe: Recipe, origins: Mapping[str, str]) -> None:
        if not (self.folder / "recipe.toml").exists():
            self.write_text("recipe.toml", asked_toml(recipe, origins))
        if not (self.folder / "env.json").exists():
            self.write_env()
        if not (self.folder / "plan.json").exists():
            self.plan(None, reason="not predicted yet")

    def _sweep(self) -> None:
        """Remove what a kill left half-made."""
        for path in list(self.folder.rglob(f"{TEMPORARY}*")):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """'finished', 'failed' or 'unfinished' (running, killed or interrupted)."""
        if (self.folder / "DONE").exists():
            return "finished"
        return "failed" if (self.folder / "FAILED.json").exists() else "unfinished"

    def recipe(self) -> Recipe:
        """The recipe with every value as this run resolved it."""
        path = self.folder / RESOLVED
        try:
            return Recipe.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, ValidationError) as error:
            raise TuneletError(
                f"{path} cannot be read.",
                why=str(error),
                fix="It was changed after the run wrote it; restore it or start a new run.",
            ) from error

    def differences(self, recipe: Recipe) -> list[tuple[str, Any, Any]]:
        """(dotted key, this run's value, the recipe's value) of every setting that differs; the name does not count.

        A value nobody asked for (filled in for the model, like the learning rate) is the same as leaving it out.
        """
        mine, given, defaults, origins = values(self.recipe()), values(recipe), values(Recipe()), self.origins()
        here, then = Path(given["model.path"]), Path(mine["model.path"]).parts
        if here.parent in (self.folder / STAGES, self.folder.parent) and (STAGES, here.name) == then[-2:]:
            given["model.path"] = mine["model.path"]  # the stage before, wherever the run's folder is now
        return [
            (key, mine[key], given[key])
            for key in mine
            if key != "name"
            and mine[key] != given[key]
            and not (given[key] == defaults[key] and origins.get(key, "").startswith("default"))
        ]

    def origins(self) -> dict[str, str]:
        """Dotted key -> origin of its value, out of resolved.toml's comments."""
        out, section = {}, ""
        for line in (self.folder / RESOLVED).read_text(encoding="utf-8").splitlines():
            if line.startswith("["):
                section = line.strip("[]") + "."
            elif "  # " in line and not line.startswith("#"):
                out[section + line.split(" = ", 1)[0]] = line.rsplit("  # ", 1)[1]
        return out

    def model_folder(self) -> Path | None:
        """model/ or adapter/, whichever this run has written; None before it has."""
        return next((self.folder / name for name in MODEL_FOLDERS if (self.folder / name).is_dir()), None)

    def read_json(self, name: str, default: Any = None) -> Any:
        """The object in file `name` of the run, `default` where there is no such file."""
        path = self.folder / name
        if not path.exists():
            return default
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise TuneletError(
                f"{path} is not valid JSON.",
                why=str(error),
                fix="It was changed after the run wrote it; delete it and run the same command again.",
            ) from error

    # -- writing ------------------------------------------------------------------------------------------------------

    def write_text(self, name: str, text: str) -> Path:
        """Write file `name` (may hold '/') of the run, whole or not at all."""
        path = self.folder / name
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write `value` as JSON. NaN and infinities become null, so that any reader can read it."""
        return self.write_text(name, json.dumps(finite(value), ensure_ascii=False, indent=2, default=str) + "\n")

    def write_jsonl(self, name: str, rows: Sequence[Any]) -> Path:
        return self.write_text(
            name, "".join(json.dumps(finite(row), ensure_ascii=False, default=str) + "\n" for row in rows)
        )

    def write_env(self, choice: Any = None) -> Path:
        """env.json: versions, CPU, cores, memory, platform; `choice` (models.device.Choice) adds device, dtype,
        threads and why.
        """
        return self.write_json("env.json", environment(choice))

    @contextlib.contextmanager
    def folder_in_the_making(self, name: str) -> Iterator[Path]:
        """`with run.folder_in_the_making("model") as folder: save into folder` - it gets its name when all of it is
        on the disk.
        """
        target, temporary = self.folder / name, self.folder / f"{TEMPORARY}{name.replace('/', '-')}"
        with disk(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                yield temporary
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            for path in sorted(temporary.rglob("*")):
                sync(path)
            sync(temporary)
            if target.exists():  # a rename cannot replace a folder that is not empty
                old = self.folder / f"{TEMPORARY}old-{temporary.name[len(TEMPORARY) :]}"
                shutil.rmtree(old, ignore_errors=True)
                target.rename(old)
                temporary.rename(target)
                shutil.rmtree(old)
            else:
                temporary.rename(target)
            sync(target.parent)

    # -- the log ------------------------------------------------------------------------------------------------------

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one line to log.jsonl and flush it. Rows of a step carry "step"; log a step before saving its
        checkpoint.
        """
        line = json.dumps(finite(dict(row)), ensure_ascii=False, default=str) + "\n"
        path = self.folder / LOG
        with disk(path), path.open("ab") as file:
            file.write(line.encode())
            file.flush()

    def log_rows(self) -> list[dict[str, Any]]:
        """The rows of log.jsonl. A last line that a kill cut short is left out."""
        return [row for row, _ in self._log_lines()]

    def truncate_log(self, step: int) -> None:
        """Cut log.jsonl before its first row of a step after `step`: what follows will be trained, and logged,
        again.
        """
        path = self.folder / LOG
        if not path.exists():
            return
        keep = 0
        for row, end in self._log_lines():
            if row.get("step", 0) > step:
                break
            keep = end
        with disk(path):
            os.truncate(path, keep)

    def _log_lines(self) -> Iterator[tuple[dict[str, Any], int]]:
        """(row, offset of the byte after it) for every whole line."""
        path = self.folder / LOG
        if not path.exists():
            return
        end = 0
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                return  # cut short by a kill
            end += len(line)
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise TuneletError(
                    f"{path}, line {number} is not valid JSON.",
                    why=str(error),
                    fix="It was changed after the run wrote it; restore it or delete the line.",
                ) from error
            yield row, end

    # -- plan and end -------------------------------------------------------------------------------------------------

    def plan(self, predicted: Mapping[str, float | None] | None, *, reason: str = "") -> None:
        """Write plan.json's prediction (keys of PLAN_KEYS), or null with the reason why there is none. Keeps the
        actual figures.
        """
        _check_plan(predicted)
        now = self.read_json("plan.json", {})
        now.pop("reason", None)
        self.write_json(
            "plan.json",
            {
                "predicted": dict(predicted) if predicted else None,
                "actual": now.get("actual"),
                **({"reason": reason} if reason else {}),
            },
        )

    def actual(self, figures: Mapping[str, float | None]) -> None:
        """Write plan.json's actual figures (keys of PLAN_KEYS). Keeps the prediction."""
        _check_plan(figures)
        now = self.read_json("plan.json", {"predicted": None, "reason": "not predicted"})
        now["actual"] = {**(now.get("actual") or {}), **figures}
        self.write_json("plan.json", now)

    def done(self, **figures: Any) -> None:
        """Mark the run finished."""
        self.going_on()
        self.write_json(
            "DONE", {"finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **figures}
        )

    def failed(self, error: BaseException, *, step: int | None = None) -> None:
        """Write FAILED.json. A user's mistake keeps its three lines, a bug its traceback (the home folder shown as
        ~).
        """
        told: dict[str, Any] = {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "step": step,
            "error": type(error).__name__,
        }
        if isinstance(error, TuneletError):
            told |= {"what": error.what, "why": error.why, "fix": error.fix}
        else:
            text = "".join(traceback.format_exception(error))
            told |= {"what": str(error), "traceback": text.replace(str(Path.home()), "~")}
        self.write_json("FAILED.json", told)

    def going_on(self) -> None:
        """A failed run is taken up again: it is no longer failed."""
        with disk(self.folder):
            (self.folder / "FAILED.json").unlink(missing_ok=True)

    def disk_mb(self) -> float:
        """What the run takes on the disk, in MB (10^6 bytes), without the stages before it."""
        before = self.folder / STAGES
        files = (path for path in self.folder.rglob("*") if path.is_file() and before not in path.parents)
        return sum(path.stat().st_size for path in files) / 1e6


# -- helpers ----------------------------------------------------------------------------------------------------------


def is_run(folder: Path | str) -> bool:
    """Whether `folder` holds a run."""
    return (Path(folder) / RESOLVED).is_file()


def check_folder(out: Path | str, recipe: Recipe) -> None:
    """Whether `open_or_create` would take `out`, without writing. Raises TuneletError where not."""
    if not is_run(out):
        must_be_free(Path(out))
        return
    run = Run.open(out)
    changed = run.differences(recipe)
    if changed:
        more = " ..." if len(changed) > 6 else ""
        listed = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in changed[:6]) + more
        raise TuneletError(
            f"{out} holds a {run.status} run of another recipe.",
            why=f"these settings differ: {listed}",
            fix="Choose another --out, or delete that folder, or give the same settings to go on with it.",
        )


def must_be_free(out: Path) -> None:
    """Raises TuneletError where a new run could not be made in `out`."""
    if is_run(out):
        status = Run(out).status
        raise TuneletError(
            f"{out} already holds a run ({status}).",
            why="a run is never written over",
            fix="Choose another --out, or delete that folder first.",
        )
    if out.exists() and not out.is_dir():
        raise TuneletError(
            f"{out} is a file, not a folder.", why="a run is a folder of files", fix="Choose another --out."
        )
    with disk(out):
        names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    others = [name for name in names if name not in (LOCK, STAGES) and not name.startswith(TEMPORARY)]
    if others:
        raise TuneletError(
            f"{out} exists, is not a run, and is not empty.",
            why=f"it holds {', '.join(others[:3])}{' ...' if len(others) > 3 else ''}; a run shares no folder",
            fix="Choose an --out that does not exist yet.",
        )


def _check_plan(figures: Mapping[str, Any] | None) -> None:
    if unknown := set(figures or {}) - set(PLAN_KEYS):
        raise ValueError(f"plan.json knows {PLAN_KEYS}, not {sorted(unknown)}")

"""What two processes do for test_distributed.py, started by torchrun: every case trains in one process, in both with
ddp and in both with fsdp, and process 0 writes how far apart they are as JSON. No test itself."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
from rich.console import Console
from test_loop import CPU, model, recipe, rows

from tunelet import methods
from tunelet.errors import TuneletError
from tunelet.recipe import Recipe
from tunelet.runs.record import Run
from tunelet.train import distributed, loop, step
from tunelet.train.progress import Interrupted

QUIET = Console(quiet=True)
COMMON = {"batch_size": 8, "max_steps": 6, "log_steps": 1, "eval_steps": 4, "save_steps": 3}
CASES = {  # 41 rows: the last step of an epoch has one, fewer than there are processes
    "full": {},
    "1x8": {"batch_size": 1, "gradient_accumulation": 8},
    "2x4": {"batch_size": 2, "gradient_accumulation": 4},
    "cut": {"tokens_per_batch": 24, "gradient_checkpointing": "on"},
    "lora": {},
    "thin lora": {},
    "prompt": {},
    "prefix": {},
    "few": {"batch_size": 1},
    "best": {"early_stopping": 3, "eval_steps": 1, "learning_rate": 0.2, "schedule": "constant", "warmup": 6},
    "bfloat16": {},
    "narrow": {"optimizer_state": "bfloat16"},
}
AGAIN = {"ddp": ("full",), "fsdp": ("full", "lora")}  # stopped and resumed, and with another number of processes


def built(case: str):
    from tunelet.models import adapters
    from tunelet.models.ready import make_ready

    made = model("bfloat16" if case in ("bfloat16", "narrow") else "float32")
    if "lora" in case:  # shards of two rows and one, or of one and none
        made = adapters.add(made, Recipe(adapter={"kind": "lora", "rank": 1 if "thin" in case else 3}).adapter, 3)
    elif case in ("prompt", "prefix"):
        made = adapters.add(made, Recipe(adapter={"kind": case, "num_virtual_tokens": 3}).adapter, 3)
    return make_ready(made, checkpointing=case == "cut")


def train(out: Path | None, case: str, made, data=None):
    """(log, weights that were trained, run) of a training here, alone or together."""
    first = distributed.world().first
    run = Run.open_or_create(out, made)[0] if first else None
    the_model = built(case)
    trained = [name for name, p in the_model.named_parameters() if p.requires_grad]
    loop.train(
        made,
        run,
        model=the_model,
        tokenizer=None,
        train_rows=rows(41) if data is None else data,
        eval_rows=rows(6, seed=1),
        choice=CPU["bfloat16" if case in ("bfloat16", "narrow") else "float32"],
        console=QUIET,
    )
    if not first:
        return None, None, None
    weights = dict(the_model.named_parameters())
    return run.log_rows(), {name: weights[name].detach().clone() for name in trained}, run


def apart(alone, together) -> dict[str, float]:
    """The largest relative difference of losses, gradient norms and weights."""
    logs, out = (alone[0], together[0]), {}
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    for key in ("loss", "grad_norm", "held_out_loss"):
        pairs = [(a[key], b[key]) for a, b in zip(*logs, strict=True) if key in a]
        out[key] = max(abs(a - b) / abs(a) for a, b in pairs)
    assert all(a.get("trained_tokens") == b.get("trained_tokens") for a, b in zip(*logs, strict=True))
    assert all(together[1][key].shape == value.shape for key, value in alone[1].items())
    out["weights"] = max(float((together[1][k] - v).norm() / (v.norm() + 1e-6)) for k, v in alone[1].items())
    return out


def equal(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def stopped(out: Path, made, case: str) -> int:
    """Trains until a signal that reaches process 1 alone stops all; the step at which this process was stopped."""
    real, calls = methods.losses()["sft"], iter(range(10_000))

    def signalled(*arguments):
        if next(calls) == 3 and not distributed.world().first:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    step.losses = lambda: {"sft": signalled}
    try:
        train(out, case, made)
    except Interrupted as stop:
        return int(stop.what.split()[3])
    finally:
        step.losses = methods.losses
    return -1


def halfway(out: Path, whole: Path, made) -> Path:
    """A run that stopped after step 3: with the checkpoint that another one wrote there."""
    run, _ = Run.open_or_create(out, made)
    shutil.copytree(whole / "checkpoints" / "step-000003", run.folder / "checkpoints" / "step-000003")
    shutil.copy(whole / "log.jsonl", run.folder)
    return out


def cases(out: Path) -> dict:
    made = {way: {case: recipe(**{**COMMON, **more}, parallel=way) for case, more in CASES.items()} for way in AGAIN}
    first, found, results, alone = distributed.asked().first, {}, {}, {}
    if first:
        alone = {case: train(out / f"{case}-1", case, made["ddp"][case]) for case in CASES}
    with distributed.joined() as world:
        for way, again in AGAIN.items():
            results[way] = {case: train(out / f"{case}-{way}", case, made[way][case]) for case in CASES}
            found[way] = {"stopped at": []}
            for case in again:
                folder = out / f"stopped-{case}-{way}"
                found[way]["stopped at"].append(stopped(folder, made[way][case], case))
                results[way][f"resumed {case}"] = train(folder, case, made[way][case])
                folder = out / f"onward-{case}-{way}"
                if world.first:
                    halfway(folder, out / f"{case}-1", made[way][case])
                results[way][f"1 onward with 2: {case}"] = train(folder, case, made[way][case])
    for way, again in AGAIN.items() if first else ():
        for case in again:
            folder = halfway(out / f"back-{case}-{way}", out / f"{case}-{way}", made["ddp"][case])
            results[way][f"2 onward with 1: {case}"] = train(folder, case, made["ddp"][case])
        for case, result in results[way].items():
            of = case if case in alone else case.split()[-1]
            if case.startswith("resumed"):
                found[way][case] = equal(results[way][of][1], result[1])
            else:
                found[way][case] = apart(alone[of], result)
    return found


def failing(out: Path) -> list:
    """[type of the error that leaves `joined`, its text, its exit code] where process 1 finds a mistake in step 3."""
    real, calls = methods.losses()["sft"], iter(range(10_000))

    def mistaken(*arguments):
        if next(calls) == 2 and not distributed.world().first:
            raise TuneletError("A mistake that process 1 alone has found.", why="it was told to", fix="Do not.")
        return real(*arguments)

    step.losses = lambda: {"sft": mistaken}
    try:
        with distributed.joined():
            train(out, "full", recipe(**COMMON))
    except (TuneletError, SystemExit) as error:
        return [type(error).__name__, str(error), getattr(error, "exit_code", getattr(error, "code", None))]
    return []


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, here = Path(sys.argv[1]), distributed.asked()
    figures = cases(folder)
    if here.first:
        (folder / "figures.json").write_text(json.dumps(figures))
    (folder / f"failing-{here.rank}.json").write_text(json.dumps(failing(folder / "failing")))
    os._exit(0)  # the group of the failed training is still there

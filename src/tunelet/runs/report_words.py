"""What a report says in words: the sentence at its top, the commands to go on with, names of methods, figures, times.

Not for what happened to a model that compared answers (report_preference.py).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunelet.recipe import PREFERENCE, Recipe
from tunelet.runs.record import STAGES, Run

LONG = {
    "pretrain": "First training",
    "sft": "Supervised fine-tuning",
    "dpo": "Direct preference optimisation",
    "orpo": "Odds ratio preference optimisation",
    "simpo": "Simple preference optimisation",
    "kto": "Kahneman-Tversky optimisation",
}
SHORT = {"pretrain": "first training", "sft": "SFT", "dpo": "DPO", "orpo": "ORPO", "simpo": "SimPO", "kto": "KTO"}
ROWS = {"kto": "answers with a verdict"} | dict.fromkeys(("dpo", "orpo", "simpo"), "pairs")
HELD_OUT = "HELD_OUT.jsonl"

Commands = list[tuple[str, str]]  # (why, command)


def named(run: Run) -> str:
    """The run's method, short."""
    return SHORT[run.recipe().method.name]


def figure(name: str, value: float | None) -> str:
    """A metric: 0.123 for a loss, 12.3 % for a share."""
    if value is None:
        return "-"
    return f"{value:.3f}" if name.endswith("loss") else percent(value)


def percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def duration(seconds: float) -> str:
    """3 h 04 min, 4 min 05 s, or 12 s."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"


LORA = {"lora": "LoRA", "rslora": "rsLoRA", "dora": "DoRA"}


def steps(run: Run) -> int:
    """Steps trained so far, as logged."""
    return max((row["step"] for row in run.log_rows() if "step" in row), default=0)


def adapter(recipe: Recipe) -> str:
    """What kind of adapter was trained, of which size."""
    kind = recipe.adapter.kind
    if kind in LORA:
        return f"{LORA[kind]} of rank {recipe.adapter.rank}"
    return "IA3" if kind == "ia3" else f"{kind} tuning of {recipe.adapter.num_virtual_tokens} virtual tokens"


def sentence(run: Run, recipe: Recipe, stages: Sequence[Run]) -> str:
    """What was done to which model, on what, for how long."""
    data, plan = run.read_json("data.json"), (run.read_json("plan.json", {}).get("actual") or {})
    said = method(recipe)
    if recipe.adapter.kind != "none":
        said += f" with {adapter(recipe)}"
    start = recipe.model.path or "a model from random weights"
    if stages:
        start = f"the result of stage {len(stages)} ({named(stages[-1])})"
    said += f" of {start}"
    if data:
        what = ROWS.get(recipe.method.name, "rows")
        said += f" on {data['train'].get('rows', 0):,} {what} of {', '.join(data['train']['sources'])}"
    said += f": {steps(run):,} steps"
    if plan.get("seconds"):
        said += f" in {duration(plan['seconds'])}"
    if both := run.read_json("quantised.json"):
        kind, over, whole = both["quantization"], both["held_out_loss"], both["unquantised"]["value"]
        said += (
            f". Held-out loss {over:.3f} over the {kind} weights it was trained on, {whole:.3f} over the base as it is"
        )
    return said + "."


def method(recipe: Recipe) -> str:
    """'Direct preference optimisation (DPO, beta 0.1)'."""
    of = recipe.method
    if of.name not in PREFERENCE:
        return LONG[of.name]
    told = [SHORT[of.name]]
    if of.name == "dpo" and of.loss_type != "sigmoid":
        told.append(f"loss {of.loss_type}")
    told += [f"beta {of.beta:g}"] if of.beta else []
    if of.name == "simpo" and of.simpo_gamma:
        told.append(f"gamma {of.simpo_gamma:g}")
    if of.name == "dpo" and of.rpo_alpha:
        told.append(f"rpo_alpha {of.rpo_alpha:g}")
    return f"{LONG[of.name]} ({', '.join(told)})"


# -- commands ---------------------------------------------------------------------------------------------------------


def command(*words: str | Path) -> str:
    """A line for a shell, quoted where need be."""
    return shlex.join(str(word) for word in words)


def again(run: Run, *settings: str) -> str:
    """Do the same in another folder, with settings changed: as aligned, where the run was, else as trained."""
    verb = ("align",) if _aligned(run) else ("train", "--recipe")
    changed = [word for setting in settings for word in ("--set", setting)]
    return command("tunelet", *verb, run.folder / "recipe.toml", *changed, "--out", "OTHER")


def _aligned(run: Run) -> bool:
    return (run.folder / "eval").is_dir() or (run.folder / STAGES).is_dir()


def following(run: Run, recipe: Recipe, stages: Sequence[Run], after: Mapping[str, Any]) -> Commands:
    """Commands that fit what was done."""
    if run.status != "finished" and run.model_folder() is None:
        return [_go_on(run)]
    preferred = recipe.method.name in PREFERENCE
    own = [source for source in recipe.data.train if source != "starter"]
    out = [("Talk with it", command("tunelet", "chat", run.folder))]
    if preferred:
        out += _preference(run, recipe, stages, own)
    if not own:
        data, asked = ("my-pairs.jsonl", f" --method {recipe.method.name}") if preferred else ("my-chats.jsonl", "")
        made = f"tunelet recipe init --data {data}{asked} --out my.toml\ntunelet align my.toml"
        out.append(("Do the same with your own model and data", made))
    else:
        model = recipe.model.path or run.folder
        out.append(
            (
                "See which tokens of a row were trained",
                command("tunelet", "data", "mask", own[0], "--model", model, "--row", "3"),
            )
        )
    if not after and recipe.method.name != "pretrain" and not preferred:
        out.append(("Measure it", command("tunelet", "eval", run.folder, "--task", "held_out", "--data", HELD_OUT)))
    rate = after.get("stop_rate")
    if rate and rate["value"] < 0.99 and not preferred:
        longer = f"train.max_steps={max(1, steps(run)) * 2}"
        out.append(("Some answers do not end: train longer", again(run, longer)))
    losses = [row["held_out_loss"] for row in run.log_rows() if row.get("held_out_loss") is not None]
    if len(losses) > 2 and losses[-1] > 1.02 * min(losses):
        out.append(("The held-out loss rose again: stop earlier", again(run, "train.early_stopping=2")))
    prompts = ("--prompts", "prompts.txt", "--out", "answers.jsonl")
    out.append(("Answer a file of prompts", command("tunelet", "generate", run.folder, *prompts)))
    return out


def _go_on(run: Run) -> tuple[str, str]:
    if (run.folder / STAGES).is_dir() or run.folder.parent.name == STAGES:
        whole = run.folder.parents[1] if run.folder.parent.name == STAGES else run.folder
        return (
            "Go on where it stopped, with the recipe that began it",
            command("tunelet", "align", "RECIPE", "--out", whole),
        )
    if _aligned(run):
        same = command("tunelet", "align", run.folder / "recipe.toml", "--out", run.folder)
        return ("Go on where it stopped", same)
    return ("Go on where it stopped", command("tunelet", "train", "--resume", run.folder))


def _preference(run: Run, recipe: Recipe, stages: Sequence[Run], own: Sequence[str]) -> Commands:
    """How to tell what comparing answers brought."""
    before = stages[-1].folder if stages else recipe.model.path
    rows = ("--data", (recipe.data.eval or [HELD_OUT])[0], "--judge", "JUDGE_MODEL") if own else ()
    measured = command("tunelet", "eval", run.folder, "--task", "preference", *rows, "--against", before)
    why = "Is the better answer more often the more probable one, and do its answers win over those of its start?"
    judged = " A larger model judges." if own else ""
    other = (stages[-1].folder, run.folder) if stages else (run.folder, "OTHER")
    against = f"what {named(stages[-1])} reached" if stages else "another run"
    return [(f"{why}{judged}", measured), (f"Hold it against {against}", command("tunelet", "compare", *other))]

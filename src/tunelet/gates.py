"""The gates of an alignment: what prompts of the start model reach on the held-out items, what the model could do
besides, before and after, and the verdict on both. "Should I tune at all?"

Files and order of `align`'s gates, so that a kill between any two goes on; not how a model is asked (evals/prompted.py)
or judged (evals/gate.py, evals/forgetting.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from tunelet.errors import TuneletError
from tunelet.evals import forgetting, gate, prompted
from tunelet.recipe import Recipe
from tunelet.runs.record import Run

if TYPE_CHECKING:
    from tunelet.data.examples import Example

ANSWERED_ROWS = 32  # held-out rows a model is asked where the starter's graded items do not apply
SHORT, MOSTLY = 16, 0.9  # tokens; answers are short where this share of them has no more
BASELINES = ("zero_shot", "few_shot")

Answering = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


def missing(run: Run, recipe: Recipe, held: Any) -> list[str]:
    """Which prompts are yet to be asked."""
    if not recipe.eval.baselines or why_not(held):
        return []
    return [name for name in BASELINES if run.read_json(f"eval/{name}.json") is None]


def why_not(held: Any) -> str:
    """Why prompts cannot be held against tuning here; '' where they can."""
    if not any(map(prompted.turns, held.examples)) and not held.starter:
        return "no held-out row has an answer"
    return "" if any(map(prompted.turns, held.pool)) else "no training row has an answer to show as an example"


def rows_asked(recipe: Recipe, tokenizer: Any, held: Any) -> int:
    """How many held-out rows a model answers: more where answers are short, and being exact means something."""
    if recipe.eval.baselines and is_short(tokenizer, held.examples):
        return recipe.eval.baseline_items
    return ANSWERED_ROWS


def is_short(tokenizer: Any, examples: Sequence[Example]) -> bool:
    answers = [one.answer for one in map(prompted.turns, examples) if one]
    if not answers or len(answers) < len(examples):  # a row whose answer is a bad one (KTO) is not to be matched
        return False
    sizes = [len(ids) for ids in tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]]
    return sum(size <= SHORT for size in sizes) >= MOSTLY * len(sizes)


# -- measuring --------------------------------------------------------------------------------------------------------


def ask(
    run: Run, engine: Any, recipe: Recipe, held: Any, new_tokens: int, answering: Answering
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ask what is missing: (words, what NAME.json says) of each. Writes eval/NAME.jsonl, NAME_loss.jsonl, and last
    NAME.json."""
    shared = prompted.shared_system(held.pool)
    own = recipe.eval.instruction or (_starter_instruction() if held.starter else "")
    instruction = "\n\n".join(part for part in (own, shared) if part)
    shots, probes = prompted.draw(held.pool, recipe.eval.shots, recipe.train.seed)
    tools = any(not prompted.plain(one) for one in map(prompted.turns, held.examples) if one)
    for name in missing(run, recipe, held):
        started = time.monotonic()
        examples = shots if name == "few_shot" else []
        told: dict[str, Any] = {"metrics": {}, "number": len(examples), "instruction": instruction, "remarks": []}
        try:
            prompt, tried = prompted.choose(engine, instruction, shared, examples, probes, chat=tools)
            rows, told["metrics"], fewer = _answers(run, name, engine, prompt, recipe, held, new_tokens, answering)
        except TuneletError as error:  # a template that takes no such conversation: the gate says so, tuning goes on
            told["remarks"].append(f"the {gate.NAMES[name]} could not be asked: {error.what}")
            run.write_json(f"eval/{name}.json", told)
            continue
        told |= {
            "layout": prompt.layout.name,
            "instruction": prompt.instruction,
            "tried": tried,
            "shots": [{"file": one.where.file, one.where.unit: one.where.line} for one in prompt.shots],
            "answers": len(rows),
            "short": is_short(engine.tokenizer, held.examples),
        }
        if name == "few_shot" and len(examples) < recipe.eval.shots:
            told["remarks"].append(f"only {len(examples)} training rows can be shown as examples")
        if fewer:
            told["remarks"].append(f"{fewer} prompts had room for fewer than {len(examples)} examples")
        told["seconds"] = round(time.monotonic() - started, 3)
        run.write_json(f"eval/{name}.json", told)
        yield f"{gate.NAMES[name].capitalize()} ({prompt.layout.name})", told


def _starter_instruction() -> str:
    from tunelet import starter

    return starter.INSTRUCTION


def _answers(
    run: Run, name: str, engine: Any, prompt: prompted.Prompt, recipe: Recipe, held: Any, new_tokens: int,
    answering: Answering,
) -> tuple[list[dict[str, Any]], dict[str, Any], int]:  # fmt: skip
    """(rows, metrics, prompts that had room for fewer examples)."""
    from tunelet.evals import held_out, starter

    options = {"max_new_tokens": new_tokens, "batch_size": recipe.eval.batch_size}
    asker = prompted.Asker(engine, prompt, new_tokens)
    most = recipe.eval.baseline_items
    with answering(f"Asking with a {gate.NAMES[name]}") as progress:
        if held.starter:
            scored = starter.evaluate(asker, items=recipe.eval.items, most=most, progress=progress, **options)
            rows, metrics = scored.items, scored.metrics
        else:
            number = min(most, rows_asked(recipe, engine.tokenizer, held))
            rows = held_out.answers(asker, held.examples, rows=number, progress=progress, **options)
            rate = held_out.stop_rate(rows) if rows else None
            metrics = {"stop_rate": rate} if rate else {}
            _losses(run, name, engine, prompt, held, most)
    run.write_jsonl(f"eval/{name}.jsonl", rows)
    return rows, metrics, asker.fewer


def _losses(run: Run, name: str, engine: Any, prompt: prompted.Prompt, held: Any, most: int) -> None:
    found = [(number, one) for number, one in enumerate(map(prompted.turns, held.examples)) if one and one.answer]
    scores = prompted.score(engine, prompt, [one for _, one in found[:most]])
    run.write_jsonl(
        f"eval/{name}_loss.jsonl",
        [{"item": f"held_out/{number}", "nll": -score.logprob, "tokens": score.tokens}
         for (number, _), score in zip(found, scores, strict=False)],
    )  # fmt: skip


def beside(run: Run, name: str, engine: Any, recipe: Recipe, held: Any) -> None:
    """What the gates need of the model before and after, besides its answers."""
    if recipe.eval.forgetting and recipe.model.path:
        found = forgetting.measure(engine.model, engine.tokenizer, engine.max_length, home=held.home)
        run.write_jsonl(f"eval/{name}_general.jsonl", found)
    if name == "after" and recipe.eval.baselines and not held.starter and not why_not(held):
        _losses(run, name, engine, prompted.Prompt(prompted.CHAT), held, recipe.eval.baseline_items)


# -- the verdict ------------------------------------------------------------------------------------------------------


def verdict(first: Run, last: Run) -> dict[str, Any]:
    """The `gate` of summary.json: prompts of the model that the first run started from, against what the last one
    made of it."""
    recipe = first.recipe()
    told = {name: of for name in BASELINES if (of := first.read_json(f"eval/{name}.json")) is not None}
    remarks = [remark for of in told.values() for remark in of["remarks"]]
    if not recipe.eval.baselines:
        remarks.append("eval.baselines is off")
    elif not recipe.model.path:
        remarks.append("there was no model to prompt before the training")
    elif not told:
        remarks.append("the data has no answers to hold against each other")
    asked = {name: _measured(first, name) for name, of in told.items() if "layout" in of}
    short = any(one.told["short"] for one in asked.values())
    out = gate.judge(asked, _measured(last, "after"), short=short)
    out["layouts"] = {name: one.told["layout"] for name, one in asked.items()}
    general = [_lines(run, f"{name}_general") for run, name in ((first, "before"), (last, "after"))]
    out["forgetting"] = forgetting.compare(*general)
    out["remarks"] = remarks
    out["text"] = gate.said(out)
    out["forgetting"]["text"] = gate.forgotten(out["forgetting"])
    return out


def _measured(run: Run, name: str) -> gate.Measured:
    return gate.Measured(_lines(run, name), _lines(run, f"{name}_loss"), run.read_json(f"eval/{name}.json", {}))


def _lines(run: Run, name: str) -> list[dict[str, Any]]:
    path = run.folder / "eval" / f"{name}.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n") if line]

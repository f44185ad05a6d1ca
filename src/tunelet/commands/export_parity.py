"""What is done with an exported GGUF file beyond its gate: the run's evaluation once more, and Ollama's Modelfile.

Not for the gate (infer/gguf_gate.py). A run wrote down every answer of its evaluation (eval/after.jsonl): the exported
file is asked the same, and both are held side by side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet.commands.common import bar

if TYPE_CHECKING:
    from rich.console import Console

    from tunelet.infer.gguf_export import Exported
    from tunelet.infer.gguf_source import Source
    from tunelet.recipe import EvalSection

KEY = "evaluation"  # in parity.json
SLOTS = 8  # answers at once


def repeat(of: Source, made: Exported, console: Console) -> Exported:
    """The run's evaluation with the exported file, added to its parity.json and told; `made` as it is where there is no
    run, or it was not evaluated."""
    if of.run is None:
        return made
    if KEY not in made.parity:
        found = _asked(of.run, made, console)
        if found is None:
            return made
        made = made.add(**{KEY: found})
    _tell(made.parity[KEY], console)
    return made


def _asked(run: Path, made: Exported, console: Console) -> dict[str, Any] | None:
    from tunelet.runs.record import Run

    opened = Run.open(run)
    file = run / "eval/after.jsonl"
    if not file.is_file():
        return None
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["type"] != "text" and row.get("messages")]
    if not rows:
        return None
    answered, metrics = _answers(made, rows, opened.recipe().eval, console)
    before = {row["item"]: _whole(row["answer"]) for row in rows}
    same = [_whole(row["answer"]) == before[row["item"]] for row in answered if row["item"] in before]
    recorded = opened.read_json("eval/after.json", {}).get("metrics", {})
    return {
        "items": len(same),
        "same_answers": sum(same) / len(same) if same else None,
        "metrics": metrics,
        "run_metrics": {name: recorded[name] for name in metrics if name in recorded},
    }


def _whole(answer: str) -> str:
    """Without the half character that an answer cut at its longest may end with: llama.cpp does not tell it."""
    return answer.rstrip("\ufffd")


def _answers(
    made: Exported, rows: Sequence[dict[str, Any]], options: EvalSection, console: Console
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows with the exported file's answers, metrics) of the requests that `rows` were asked."""
    from tunelet.evals import held_out, starter
    from tunelet.infer.llama_cpp import LlamaCppEngine, trained_length
    from tunelet.models import device

    tokenizer, renderer = open_texts(made)
    prompts = [renderer.prompt(starter.as_messages(row["messages"])) for row in rows]
    read = trained_length(made.file)
    new_tokens = min(options.max_new_tokens, read // 2)  # as the run's evaluation has it
    room = min(read, max(map(len, prompts)) + new_tokens + 1)
    threads = device.choose("cpu", "float32").threads
    slots = min(SLOTS, 2 * threads)
    with (
        closing(LlamaCppEngine(made.file, tokenizer, renderer, slots=slots, context=room, threads=threads)) as engine,
        bar(console, "Answering the run's evaluation") as progress,
    ):
        if rows[0]["item"].startswith("starter/"):
            scored = starter.evaluate(engine, items=options.items, max_new_tokens=new_tokens, progress=progress)
            return scored.items, scored.metrics
        done = engine.generate(prompts, max_new_tokens=new_tokens, progress=lambda done: progress(done, len(prompts)))
    answered = [{**row, "answer": one.text, "stopped": one.stopped} for row, one in zip(rows, done, strict=True)]
    return answered, {"stop_rate": held_out.stop_rate(answered)}


def _tell(found: dict[str, Any], console: Console) -> None:
    before, after = found["run_metrics"], found["metrics"]
    names = [name for name in ("executed_match_en", "executed_match_ko", "stop_rate") if name in before]
    each = ", ".join(f"{name} {before[name]['value']:.1%} -> {after[name]['value']:.1%}" for name in names)
    same = f"{found['same_answers']:.1%} of {found['items']} answers are the same" if found["items"] else "no answers"
    console.print(f"The run's evaluation, torch -> llama.cpp: {each}{'; ' if each else ''}{same}", markup=False)


def modelfile(made: Exported) -> str:
    """Write Ollama's Modelfile beside the exported file; what its reader has to know, in words."""
    from tunelet.infer import gguf_ollama
    from tunelet.infer.llama_cpp import trained_length

    tokenizer, renderer = open_texts(made)
    return gguf_ollama.write(made.file, tokenizer, renderer, made.parity["stop_ids"], trained_length(made.file))


def open_texts(made: Exported) -> tuple[Any, Any]:
    """(tokenizer, renderer) of what was exported."""
    from tunelet.data.render import Renderer
    from tunelet.infer import merge_files

    folder = Path(made.parity["source"]["folder"])
    tokenizer = merge_files.open_tokenizer(folder, Path(made.parity["source"]["base"] or folder))
    return tokenizer, Renderer(tokenizer)

"""From a recipe to a report: check the data, evaluate, tune, evaluate again, show before and after. What `tunelet
align` does.

Not the training (train/) and not how anything is measured (evals/). Every stage leaves its result in the run folder
and is not done again: the same command after a crash goes on where it was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet.errors import TuneletError
from tunelet.recipe import Recipe
from tunelet.runs import record, report
from tunelet.runs.record import Run
from tunelet.train import energy
from tunelet.train import run as training
from tunelet.train.progress import duration

if TYPE_CHECKING:
    from rich.console import Console

    from tunelet.train.prepare import Prepared

SUMMARY = "summary.json"
TRAINING = "training.json"  # written when the tuned model is saved
ANSWERED_ROWS = 32  # held-out rows a model is asked where the starter's graded items do not apply

METRICS = {
    "executed_match_en": "commands done as asked, English",
    "executed_match_ko": "commands done as asked, Korean",
    "exact_match_en": "commands exact, English",
    "exact_match_ko": "commands exact, Korean",
    "other_match": "other requests answered right",
    "refusal_right": "unsupported requests refused",
    "refusal_false": "supported requests refused",
    "stop_rate": "answers that end",
    "held_out_loss": "held-out loss (nats per token)",
}


def align(
    recipe: Recipe, out: Path | str, console: Console | None = None, *, origins: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run the whole of it in folder `out`, and return the summary (also in summary.json).

    Keys: before, after_sft, after ({metric: {"value", "low", "high", "n"}}), seconds, peak_mb, energy_wh, energy_kind,
    run, report. Goes on with an unfinished run of the same recipe in `out`; a finished one is only shown again.
    Raises TuneletError for a user's mistake, before anything is written where the data is at fault.
    """
    if console is None:
        from rich.console import Console

        console = Console()
    out = Path(out)
    recipe, origins = training.resolve(recipe, origins or {})
    if not record.is_run(out) or Run.open(out).status != "finished":
        checking = _telling(console, "Checking all rows")
        with training.opened(recipe, out, origins, checking) as (run, prepared):
            _stages(run, recipe, prepared, console)
    record.check_folder(out, recipe)
    run = Run.open(out)
    summary = run.read_json(SUMMARY)
    if summary is None:
        raise TuneletError(
            f"{out} holds a finished training without an evaluation.",
            why="it was made by `tunelet train`",
            fix=f"See its page with: tunelet report {out}, or choose another --out.",
        )
    if not (out / report.NAME).exists():  # killed in the last moment
        report.write(run)
    summary |= {"run": str(run.folder), "report": str(run.folder / report.NAME)}  # the folder may have been moved
    show(summary, run, console)
    return summary


def _stages(run: Run, recipe: Recipe, prepared: Prepared, console: Console) -> None:
    from tunelet.models import device, load

    choice = training.choose(recipe, run, console)
    recipe = training.settle(recipe, run, prepared, choice, console)
    model = None
    if recipe.model.path and run.read_json("eval/before.json") is None:
        with energy.metered(run, "before", choice.device):
            # with a new adapter this is still the model as it was: adapters begin as an addition of zero
            model = training.load_for_training(recipe, prepared, choice)
            _evaluate(run, "before", model, recipe, prepared, console)
    if run.read_json(TRAINING) is None:
        trained = training.train_and_save(recipe, run, prepared, model, choice, console)
        run.write_json(TRAINING, training.figures(trained))
    del model
    if run.read_json("eval/after.json") is None:
        with energy.metered(run, "after", choice.device):
            # from the disk: what is measured is what was saved
            tuned = load.load_model(run.folder, choice, trust_remote_code=recipe.model.trust_remote_code)
            _evaluate(run, "after", tuned, recipe, prepared, console)
    _finish(run, device.peak_mb(choice.device))


def _finish(run: Run, peak_mb: float | None) -> None:
    before, after = (run.read_json(f"eval/{name}.json", {}).get("metrics", {}) for name in ("before", "after"))
    spent = run.read_json("energy.json")
    peaks = [peak for peak in (peak_mb, *(row.get("peak_mb") for row in run.log_rows())) if peak]
    summary = {
        "before": before,
        "after_sft": after,
        "after": after,
        "seconds": spent["seconds"],
        "peak_mb": max(peaks) if peaks else None,
        "energy_wh": spent["energy_wh"],
        "energy_kind": spent["kind"],
        "run": str(run.folder),
        "report": str(run.folder / report.NAME),
    }
    run.write_json(SUMMARY, summary)
    run.done(**run.read_json(TRAINING))
    report.write(run)


# -- evaluating -------------------------------------------------------------------------------------------------------


def is_starter(recipe: Recipe) -> bool:
    """Whether the starter's graded items apply: something of it is trained on or held out, as conversations."""
    return recipe.method.name != "pretrain" and "starter" in (*recipe.data.train, *recipe.data.eval)


def _evaluate(run: Run, name: str, model: Any, recipe: Recipe, prepared: Prepared, console: Console) -> None:
    """Write eval/NAME.jsonl (every answer) and then eval/NAME.json (the metrics), which says that it is done."""
    from tunelet.evals import held_out
    from tunelet.evals import starter as starter_items
    from tunelet.infer.engine import TorchEngine

    started = time.monotonic()
    engine = TorchEngine(model, prepared.tokenizer, prepared.renderer)
    new_tokens = _room(engine, recipe)
    options = {"max_new_tokens": new_tokens, "batch_size": recipe.eval.batch_size}
    metrics: dict[str, Any] = {}
    answers: list[dict[str, Any]] = []
    what = "Before tuning" if name == "before" else "After tuning"
    if is_starter(recipe):
        with _answering(console, f"{what}: answering held-out requests") as progress:
            scored = starter_items.evaluate(engine, items=recipe.eval.items, progress=progress, **options)
        metrics |= scored.metrics
        answers += scored.items
    with _answering(console, f"{what}: answering prompts") as progress:
        asked = held_out.answers(
            engine,
            prepared.eval_examples,
            prompts=recipe.eval.prompts if recipe.method.name != "pretrain" else (),
            rows=0 if answers else ANSWERED_ROWS,
            progress=progress,
            **options,
        )
    rate = None if answers else held_out.stop_rate(asked)
    if rate:
        metrics["stop_rate"] = rate
    loss = held_out.held_out_loss(model, prepared.eval_rows) if prepared.eval_rows else None
    if loss:
        metrics["held_out_loss"] = loss
    run.write_jsonl(f"eval/{name}.jsonl", [*answers, *asked])
    seconds = round(time.monotonic() - started, 3)
    run.write_json(f"eval/{name}.json", {"metrics": metrics, "answers": len(answers) + len(asked), "seconds": seconds})
    console.print(f"{what}: {_line(metrics)}  ({duration(seconds)})", markup=False, highlight=False)


def _room(engine: Any, recipe: Recipe) -> int:
    """max_new_tokens, at most half of what the model reads: a prompt has to fit too."""
    return min(recipe.eval.max_new_tokens, engine.max_length // 2) if engine.max_length else recipe.eval.max_new_tokens


def _line(metrics: Mapping[str, Any]) -> str:
    """The two or three figures that say most, on one line."""
    names = [
        name for name in ("executed_match_en", "executed_match_ko", "stop_rate", "held_out_loss") if name in metrics
    ]
    return ", ".join(f"{name} {shown(name, metrics[name]['value'])}" for name in names) or "nothing to measure"


# -- telling ----------------------------------------------------------------------------------------------------------


def shown(name: str, value: float) -> str:
    return f"{value:.3f}" if name.endswith("loss") else f"{value:.1%}"


def show(summary: Mapping[str, Any], run: Run, console: Console) -> None:
    """The table of before and after, what it took, and the report's path as the last line."""
    from rich.table import Table

    table = Table(title=f"Before and after: {run.recipe().name}", title_justify="left")
    for column, justify in (("", "left"), ("before", "right"), ("after", "right"), ("items", "right")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    known = [name for name in METRICS if name in summary["before"] or name in summary["after"]]
    for name in known:
        cells = [_cell(name, summary[side].get(name)) for side in ("before", "after")]
        figure = summary["after"].get(name) or summary["before"][name]
        table.add_row(METRICS[name], *cells, str(figure["n"]))
    console.print(table)
    spent = {"energy_wh": summary["energy_wh"], "kind": summary["energy_kind"]}
    peak = f"{summary['peak_mb']:.0f} MB" if summary["peak_mb"] else "not known"
    took = f"{duration(summary['seconds'])}, at most {peak} of memory, {energy.label(spent)}"
    console.print(f"In brackets: 95 % intervals. Took {took}.", markup=False, highlight=False)
    saved = run.model_folder()
    if saved is not None:
        console.print(f"Talk with it: tunelet chat {run.folder}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {summary['report']}", markup=False, highlight=False, soft_wrap=True)


def _cell(name: str, figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    low, high = (shown(name, figure[key]).rstrip("%") for key in ("low", "high"))
    return f"{shown(name, figure['value'])} ({low}–{high})"


@contextlib.contextmanager
def _telling(console: Console, what: str) -> Iterator[None]:
    """A spinner on a terminal, a line in a pipe."""
    if console.is_terminal:
        with console.status(f"{what} ..."):
            yield
    else:
        console.print(f"{what} ...", markup=False, highlight=False)
        yield


@contextlib.contextmanager
def _answering(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on a terminal; in a pipe a line now and then."""
    if console.is_terminal:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > 30:
            told = time.monotonic()
            console.print(f"{what}: {done} of {total}", markup=False, highlight=False)

    yield tell

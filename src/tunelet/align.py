"""From a recipe to a report: check the data, evaluate, tune, evaluate again, show before and after. What `tunelet
align` does.

Not the training (train/) and not how anything is measured (evals/). Every stage leaves its result in the run folder
and is not done again: the same command after a crash goes on where it was.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet import gates, stages
from tunelet.errors import TuneletError
from tunelet.evals import preference, prompted
from tunelet.recipe import Recipe
from tunelet.runs import record, report
from tunelet.runs.record import Run
from tunelet.train import energy
from tunelet.train import run as training
from tunelet.train.progress import Interrupted, duration

if TYPE_CHECKING:
    from rich.console import Console

    from tunelet.data.examples import Example, Tokens
    from tunelet.train.prepare import Prepared

SUMMARY = "summary.json"
TRAINING = "training.json"  # written when the tuned model is saved

METRICS = {
    "executed_match_en": "commands done as asked, English",
    "executed_match_ko": "commands done as asked, Korean",
    "exact_match_en": "commands exact, English",
    "exact_match_ko": "commands exact, Korean",
    "other_match": "other requests answered right",
    "refusal_right": "unsupported requests refused",
    "refusal_false": "supported requests refused",
    "invented_rate": "confirmations invented or rambling",
    "preference_accuracy": "better answers found more probable",
    "preference_accuracy_per_token": "the same, per token",
    "stop_rate": "answers that end",
    "held_out_loss": "held-out loss (nats per token)",
}


def align(
    recipe: Recipe, out: Path | str, console: Console | None = None, *, origins: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run the whole of it in folder `out`, and return the summary (also in summary.json).

    Keys: before, after_sft, after ({metric: {"value", "low", "high", "n"}}), seconds, peak_mb, energy_wh, energy_kind,
    run, report, gate (gates.py). Goes on with an unfinished run of the same recipe in `out`; a finished one is only
    shown again. Raises TuneletError for a user's mistake, before anything is written where the data is at fault.
    """
    if console is None:
        from rich.console import Console

        console = Console()
    out = Path(out)
    todo = stages.of(recipe, origins or {}, out)
    if not record.is_run(out) or Run.open(out).status != "finished":
        later = _later(todo, console)
        first = todo[0].recipe
        held = Held(home="starter" in (first.model.path, *first.data.train))
        for number, stage in enumerate(todo, 1):
            if len(todo) > 1:
                told = f"Stage {number} of {len(todo)}: {stage.recipe.method.name}"
                console.print(told, style="bold", markup=False, highlight=False)
            made, where = training.resolve(stage.recipe, stage.origins)
            if number < len(todo) and record.is_run(stage.folder) and Run.open(stage.folder).status == "finished":
                record.check_folder(stage.folder, made)
                held = held.joined(_prepared(made), *later)
                continue
            checking = _telling(console, "Checking all rows")
            try:
                with training.opened(made, stage.folder, where, checking) as (run, prepared):
                    held = held.joined(prepared, *later)
                    _steps(run, made, prepared, held, [before.folder for before in todo[: number - 1]], console)
            except Interrupted as stopped:
                stopped.fix = "Go on with the same command."
                raise
    record.check_folder(out, training.resolve(todo[-1].recipe, todo[-1].origins)[0])
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


@dataclass(frozen=True)
class Held:
    """What models are measured on, the same at every stage: held-out rows of the first stage that has answers to learn,
    pairs of the first that compares some, the examples behind both, and training rows that a prompt may show in `pool`.
    home: the starter's model or texts are what is tuned."""

    rows: tuple[Tokens, ...] = ()
    pairs: tuple[Tokens, ...] = ()
    examples: tuple[Example, ...] = ()
    pool: tuple[Example, ...] = ()
    starter: bool = False
    home: bool = False

    def joined(self, *stages_: Prepared) -> Held:
        """With what further stages have beside."""
        out = self
        for prepared in stages_:
            rows, pairs = tuple(prepared.eval_rows), ()
            if rows and rows[0].branches:
                pairs = rows if prepared.paired else ()
                rows = tuple(row.only(0) for row in rows if row.label)
            out = Held(
                out.rows or rows,
                out.pairs or pairs,
                out.examples or tuple(prepared.eval_examples),
                out.pool or tuple(filter(prompted.turns, prepared.train_examples)),
                out.starter or prepared.starter,
                out.home,
            )
        return out


def _later(todo: Sequence[stages.Stage], console: Console) -> list[Prepared]:
    """The data of the stages after the first, checked before hours of training are spent on that. Raises TuneletError.

    [] where the first one's tokenizer is yet to be trained.
    """
    path = todo[0].recipe.model.path
    if len(todo) == 1 or not path:
        return []
    out = []
    with _telling(console, "Checking the rows of all stages"):
        for stage in todo[1:]:
            recipe = stage.recipe.model_copy(deep=True)
            recipe.model.path = path
            out.append(_prepared(recipe))
    return out


def _prepared(recipe: Recipe) -> Prepared:
    from tunelet.train.prepare import prepare

    return prepare(recipe)


def _steps(run: Run, recipe: Recipe, prepared: Prepared, held: Held, before: Sequence[Path], console: Console) -> None:
    """One stage. before: the runs it goes on from; what the last of them measured is not measured again."""
    from tunelet.models import device, load, virtual

    choice = training.choose(recipe, run, console)
    recipe = training.settle(recipe, run, prepared, choice, console)
    model = None
    if before and run.read_json("eval/before.json") is None:
        last = Run.open(before[-1])
        run.write_text("eval/before.jsonl", (last.folder / "eval/after.jsonl").read_text(encoding="utf-8"))
        run.write_json("eval/before.json", last.read_json("eval/after.json"))
    elif recipe.model.path and run.read_json(TRAINING) is None:
        todo = [name for name in ("before",) if run.read_json("eval/before.json") is None]
        todo += ["prompting"] if gates.missing(run, recipe, held) else []
        for part in todo:
            with energy.metered(run, part, choice.device):
                model = model or training.load_for_training(recipe, prepared, choice)
                # the model as it was: adapters begin as an addition of zero, but for new virtual tokens
                new = not (load.resolve(recipe.model.path) / "adapter_config.json").is_file()
                with virtual.switched_off(model) if new else contextlib.nullcontext():
                    (_evaluate if part == "before" else _prompt)(run, part, model, recipe, prepared, held, console)
    if run.read_json(TRAINING) is None:
        trained = training.train_and_save(recipe, run, prepared, model, choice, console)
        run.write_json(TRAINING, training.figures(trained))
    del model
    if recipe.model.quantization != "none" and run.read_json("quantised.json") is None:
        loss = run.read_json(TRAINING)["held_out_loss"]
        training.over_whole_base(run, recipe, prepared.eval_rows, loss, choice, console)
    if run.read_json("eval/after.json") is None:
        with energy.metered(run, "after", choice.device):
            # from the disk: what is measured is what was saved
            tuned = load.load_model(run.folder, choice, trust_remote_code=recipe.model.trust_remote_code)
            _evaluate(run, "after", tuned, recipe, prepared, held, console)
    _finish(run, before, device.peak_mb(choice.device))


def _finish(run: Run, before: Sequence[Path], peak_mb: float | None) -> None:
    runs = [*map(Run.open, before), run]
    metrics = [
        [one.read_json(f"eval/{name}.json", {}).get("metrics", {}) for name in ("before", "after")] for one in runs
    ]
    tuned = [after for one, (_, after) in zip(runs, metrics, strict=True) if one.recipe().method.name == "sft"]
    spent = [one.read_json("energy.json") for one in runs]
    peaks = [peak for peak in (peak_mb, *(row.get("peak_mb") for one in runs for row in one.log_rows())) if peak]
    summary = {
        "before": metrics[0][0],
        "after_sft": tuned[0] if tuned else metrics[0][1],
        "after": metrics[-1][1],
        "seconds": sum(one["seconds"] for one in spent),
        "peak_mb": max(peaks) if peaks else None,
        "energy_wh": sum(one["energy_wh"] for one in spent),
        "energy_kind": "measured" if all(one["kind"] == "measured" for one in spent) else "estimated",
        "gate": gates.verdict(runs[0], run),
        "stages": [one.recipe().method.name for one in runs],
        "run": str(run.folder),
        "report": str(run.folder / report.NAME),
    }
    run.write_json(SUMMARY, summary)
    run.done(**run.read_json(TRAINING))
    report.write(run)


# -- evaluating -------------------------------------------------------------------------------------------------------


def _evaluate(
    run: Run, name: str, model: Any, recipe: Recipe, prepared: Prepared, held: Held, console: Console
) -> None:
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
    if held.starter:
        with _answering(console, f"{what}: answering held-out requests") as progress:
            scored = starter_items.evaluate(engine, items=recipe.eval.items, progress=progress, **options)
        metrics |= scored.metrics
        answers += scored.items
    with _answering(console, f"{what}: answering prompts") as progress:
        asked = held_out.answers(
            engine,
            held.examples,
            prompts=recipe.eval.prompts if recipe.method.name != "pretrain" else (),
            rows=0 if answers else gates.rows_asked(recipe, prepared.tokenizer, held),
            progress=progress,
            **options,
        )
    rate = None if answers else held_out.stop_rate(asked)
    if rate:
        metrics["stop_rate"] = rate
    loss = held_out.held_out_loss(model, held.rows) if held.rows else None
    if loss:
        metrics["held_out_loss"] = loss
    if held.pairs:
        metrics |= preference.accuracy(model, held.pairs)
    gates.beside(run, name, engine, recipe, held)
    run.write_jsonl(f"eval/{name}.jsonl", [*answers, *asked])
    seconds = round(time.monotonic() - started, 3)
    run.write_json(f"eval/{name}.json", {"metrics": metrics, "answers": len(answers) + len(asked), "seconds": seconds})
    console.print(f"{what}: {_line(metrics)}  ({duration(seconds)})", markup=False, highlight=False)


def _prompt(run: Run, _: str, model: Any, recipe: Recipe, prepared: Prepared, held: Held, console: Console) -> None:
    """Ask the untuned model by prompts, as far as that is not done."""
    from tunelet.infer.engine import TorchEngine

    engine = TorchEngine(model, prepared.tokenizer, prepared.renderer)
    answering = functools.partial(_answering, console)
    for words, told in gates.ask(run, engine, recipe, held, _room(engine, recipe), answering):
        line = f"{words}: {_line(told['metrics'])}  ({duration(told['seconds'])})"
        console.print(line, markup=False, highlight=False)


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
    sides = ["before", "after_sft", "after"] if len(summary.get("stages", [])) > 1 else ["before", "after"]
    for column in ("", *(side.replace("_sft", " SFT") for side in sides), "items"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    known = [name for name in METRICS if any(name in summary[side] for side in sides)]
    for name in known:
        cells = [_cell(name, summary[side].get(name)) for side in sides]
        figure = summary["after"].get(name) or summary["before"][name]
        table.add_row(METRICS[name], *cells, str(figure["n"]))
    console.print(table)
    spent = {"energy_wh": summary["energy_wh"], "kind": summary["energy_kind"]}
    peak = f"{summary['peak_mb']:.0f} MB" if summary["peak_mb"] else "not known"
    took = f"{duration(summary['seconds'])}, at most {peak} of memory, {energy.label(spent)}"
    console.print(f"In brackets: 95 % intervals. Took {took}.", markup=False, highlight=False)
    _show_gate(summary.get("gate"), console)
    saved = run.model_folder()
    if saved is not None:
        console.print(f"Talk with it: tunelet chat {run.folder}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"Report: {summary['report']}", markup=False, highlight=False, soft_wrap=True)


def _show_gate(gate: Mapping[str, Any] | None, console: Console) -> None:
    """A line on prompting and one on forgetting; the words say what the colour does."""
    if not gate:
        return
    style = {True: "green", False: "bold red", None: ""}[gate["beats_prompting"]]
    console.print(gate["text"], style=style, markup=False, highlight=False)
    if said := gate["forgetting"]["text"]:
        console.print(said, style="yellow" if gate["forgetting"]["worse"] else "", markup=False, highlight=False)


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

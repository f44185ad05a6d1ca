"""The verbs about one model's results: eval (score it), report (write a run's page). Scoring is done in `evals/`.

Not for runs side by side (compare.py).
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunelet.commands import judging
from tunelet.commands import tasks as benchmarks
from tunelet.commands.common import (
    Adapters,
    Columns,
    Device,
    Dtype,
    Json,
    Template,
    Trust,
    Use,
    bar,
    choice_of,
    column_map,
    open_console,
    open_engine,
    print_wrapped,
    write_json,
)
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from rich.console import Console

TASKS = {
    "starter": "held-out requests of the shipped smart home, answered and run",
    "held_out": "loss and stop rate on your own rows (--data)",
    "preference": "how often the better of two answers is the more probable one",
    **judging.TASKS,
}
RunOrModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL_OR_RUN",
        help="A run's folder, starter, a model folder or a hub id. With --adapter: the base, if not their own.",
        show_default=False,
    ),
]


def evaluate(
    model: RunOrModel = None,
    adapter: Adapters = None,
    use: Use = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="T",
            help="starter: does it do what is asked? held_out: loss and stop rate on --data. "
            "preference: of pairs of answers (--data, else the starter's), how often is the better one more probable? "
            "By the sum over its tokens, which favours short answers, and by their mean. "
            "score, mt_bench: how good are the answers to --data, by --judge? "
            "judge: does the model itself, or URL#MODEL, judge the pairs of --data as people did? "
            "Benchmarks (--tasks lists them) and tasks of your own: a name or a file, repeat for more. "
            "Default: held_out with --data, else starter.",
        ),
    ] = None,
    tasks: Annotated[bool, typer.Option("--tasks", help="List the tasks, and what is in them.")] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="D",
            help="held_out, preference, score, judge: rows kept from training. Benchmarks: a folder or file for the "
            "hub's rows, a second file for the examples'. mt_bench: the same, for questions and references.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Benchmarks: solved examples before a question. Default: the task's."),
    ] = None,
    subset: Annotated[
        list[str] | None,
        typer.Option("--subset", metavar="NAME", help="Benchmarks: these subsets alone, of mmlu or kmmlu."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Benchmarks: through the chat template.")] = False,
    multiturn: Annotated[
        bool, typer.Option("--multiturn", help="With --chat: examples as turns of the conversation.")
    ] = False,
    system: Annotated[str, typer.Option(metavar="TEXT", help="Benchmarks: a system message.")] = "",
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Benchmarks: write results and items there, in lm-eval's layout."),
    ] = None,
    run_code: benchmarks.RunCode = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL_OR_RUN",
            help="preference: the win rate of the model's answers over this one's too, raw and at equal length; judged "
            "by the starter's grading, or by --judge.",
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL_OR_URL",
            help="A model, or URL#MODEL of an OpenAI-compatible server, that judges answers. --against: which of two "
            "is better, in both orders; a tie where they disagree. score, mt_bench: how good one is.",
        ),
    ] = None,
    rubric: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="score, mt_bench: what the judge rates: a text, or a .toml with criteria and scale = [1, 5]. "
            "Default: is it right, helpful, to the point, from 1 to 10.",
        ),
    ] = None,
    want: Annotated[str, typer.Option(metavar="KIND", help="held_out: rows are chat or text.")] = "chat",
    items: Annotated[
        int, typer.Option(min=1, metavar="N", help="starter, or --against on it: held-out commands in each language.")
    ] = 500,
    limit: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="The first so many rows; 0: all. Default: benchmarks: all; others: 200."),
    ] = None,
    max_length: Annotated[
        int, typer.Option(min=8, metavar="N", help="held_out, preference: tokens of a row; longer ones are cut.")
    ] = 1024,
    batch_size: Annotated[
        int, typer.Option(min=1, metavar="N", help="Prompts answered, or scored, at the same time.")
    ] = 64,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Longest answer, in tokens. Default: 128; score, mt_bench: 1024."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Which held-out commands of the starter are asked (default: 0); which examples (1234, as lm-eval).",
        ),
    ] = None,
    columns: Columns = None,
    template: Template = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust: Trust = False,
    json_to: Json = None,
) -> None:
    """Score a model or a run; every figure with its 95 % interval."""
    console = open_console(json_to)
    if tasks:
        return benchmarks.listed(console, TASKS, json_to)
    opening = {"device": device, "dtype": dtype, "trust": trust}

    def opened() -> Any:
        return open_engine(model, template=template, adapters=adapter, use=use, **opening)

    asked = task or ["held_out" if data else "starter"]
    if not set(asked) & set(TASKS):
        benchmarks.check_length(max_new_tokens)
        judging.check(asked[0], False, against, judge, rubric)
        started = time.monotonic()
        found = benchmarks.evaluate(
            asked,
            data or [],
            opened,
            console,
            model=str(model or (adapter or [""])[0]),
            num_fewshot=num_fewshot,
            limit=limit or 0,
            only=subset or [],
            chat=chat,
            multiturn=multiturn,
            system=system,
            seed=seed,
            batch_size=batch_size,
            out=out,
            run_code=run_code,
            others=list(TASKS),
        )
        write_json({"model": model, "task": asked, **found, "seconds": time.monotonic() - started}, json_to)
        return
    _check_alone(asked, num_fewshot, subset, chat, system, out, run_code)
    task, limit, seed = asked[0], 200 if limit is None else limit, seed or 0
    choice_of("--want", want, ("chat", "text"))
    if task == "held_out" and not data:
        raise TuneletError("--task held_out: which rows?", fix="name rows that were not trained on: --data FILE")
    if task == "starter" and data:
        raise TuneletError("--task starter has its own items", fix="leave out --data, or take --task held_out")
    pairs, scored = task in ("preference", "judge"), task in ("score", "mt_bench")
    names, wanted = (data or ["starter"], "preference") if pairs else (data, want)
    on_starter = names == ["starter"]
    judging.check(task, on_starter, against, judge, rubric)
    # mistakes in what is read show before a model is loaded
    if scored:
        loaded, rated = judging.questions(task, data, columns, limit, seed, rubric)
    else:
        loaded = _rows(names, wanted, columns, limit, seed) if names else []
    remote = judging.remote(task, model, adapter, batch_size, console)
    if task == "preference" or scored:
        for name in (model, against):
            if name:
                judging.check_template(name, template)
    if judge:
        open_judge = judging.judge_of(judge, opening, batch_size, console)
    started = time.monotonic()
    answering = {"max_new_tokens": max_new_tokens or (judging.ANSWER_TOKENS if scored else 128)}
    answering["batch_size"] = batch_size

    def starter_items(engine: Any, what: str = "Answering") -> Any:
        from tunelet.evals import starter

        with bar(console, what) as progress:
            return starter.evaluate(engine, items=items, seed=seed, progress=progress, **answering)

    def answers(engine: Any, of: str) -> list[Any]:
        from tunelet.evals import winrate

        what = f"Answers of {of}"
        if on_starter:
            return starter_items(engine, what).items
        with bar(console, what) as progress:
            once = list({repr(example.prompt): example for example in loaded}.values())
            return winrate.answers(engine, once, progress=progress, **answering)

    engine = None if remote else opened()
    figures: dict[str, Any] = {"model": model, "task": task}
    if adapter:
        figures |= {"adapters": list(engine.names), "used": engine.used}
    if task == "starter":
        graded = starter_items(engine)
        metrics, answered = graded.metrics, graded.items
    elif task == "held_out":
        metrics, answered = _held_out(engine, loaded, max_length, **answering)
    elif task == "judge":
        metrics, answered, figures["notes"] = judging.agreement(
            remote or judging.local(engine, model or engine.used), loaded, seed, console
        )
    elif scored:
        answered = judging.answers(engine, loaded, console, **answering)
        del engine  # one model in memory at a time
        metrics, answered, figures["notes"] = judging.scores(open_judge(), answered, rated, seed, console)
        figures |= {"judge": judge, "rubric": asdict(rated)}
    else:
        metrics, answered = _pairs(engine, names, loaded, max_length, console)
    if against:
        first = answers(engine, model or engine.used)
        del engine  # one model in memory at a time
        second = answers(open_engine(against, template=template, **opening), against)
        more, compared = judging.versus(first, second, open_judge() if judge else None, seed, console)
        metrics |= more
        figures |= {"against": against, "judge": judge or "the starter's grading", **compared}
    width = max(20, *map(len, metrics))
    for name, found in metrics.items():
        console.print(
            f"{name:<{width}} {found['value']:8.3f}   {found['low']:.3f} to {found['high']:.3f}   n = {found['n']}"
        )
    for note in figures.get("notes", []):
        print_wrapped(console, note, "yellow")
    write_json(figures | {"metrics": metrics, "seconds": time.monotonic() - started, "items": answered}, json_to)


def _check_alone(asked: list[str], *only_for_benchmarks: Any) -> None:
    if len(asked) > 1:
        raise TuneletError(
            f"--task {', '.join(asked)}: {next(name for name in asked if name in TASKS)} is scored alone",
            fix="give it a command of its own; benchmarks may stand together",
        )
    flags = ("--num-fewshot", "--subset", "--chat", "--system", "--out", "--run-code")
    for flag, given in zip(flags, only_for_benchmarks, strict=True):
        if given not in (None, False, "", []):
            raise TuneletError(f"{flag} is for benchmarks, not for --task {asked[0]}", fix="leave it out")


def _rows(data: list[str], want: str, columns: list[str] | None, limit: int, seed: int) -> list[Any]:
    from tunelet.data import formats

    loaded = formats.load(data, want=want, columns=column_map(columns), limit=limit, seed=seed, split="test")
    errors = [finding for finding in loaded.findings if finding.severity == "error"]
    if errors or not loaded.examples:
        raise _bad_rows(data, want, errors)
    return loaded.examples


def _bad_rows(data: list[str], want: str, errors: list[Any]) -> TuneletError:
    from tunelet.data import listing

    listed = "\n".join(text for _, text in listing.lines(errors))
    return TuneletError(
        f"{', '.join(data)}: {len(errors)} rows can't be scored\n{listed}" if errors else f"{data[0]}: holds no rows",
        fix=f"mend or remove them; all that can be mended: tunelet data doctor {data[0]} --want {want} --fix FILE",
    )


def _held_out(
    engine: Any, examples: list[Any], max_length: int, max_new_tokens: int, batch_size: int
) -> tuple[dict[str, Any], list[Any]]:
    from tunelet.data.doctor_tokens import cut
    from tunelet.evals import held_out

    renderer = engine.renderer
    made = [renderer.chat(example) if hasattr(example, "messages") else renderer.text(example) for example in examples]
    length = min(max_length, engine.max_length or max_length)
    found = held_out.held_out_loss(engine.model, [cut(row, length) for row in made])
    if found is None:
        raise TuneletError("no row has a trained token left after the cut", fix="give a larger --max-length")
    answered = held_out.answers(engine, examples, max_new_tokens=max_new_tokens, batch_size=batch_size)
    stops = held_out.stop_rate(answered)
    return {"held_out_loss": found} | ({"stop_rate": stops} if stops else {}), answered


def _pairs(
    engine: Any, names: list[str], examples: list[Any], max_length: int, console: Console
) -> tuple[dict[str, Any], list[Any]]:
    from tunelet.data import branches
    from tunelet.evals import preference

    problems: list[Any] = []
    length = min(max_length, engine.max_length or max_length)
    made = [branches.cut(row, length) for row in branches.pairs(engine.renderer, examples, problems)]
    if problems:
        raise _bad_rows(names, "preference", problems)
    rows = [row for row, finding in made if not finding or finding.severity != "error"]
    if not rows:
        raise TuneletError(
            f"no pair has two different answers within {length} tokens", fix="give a larger --max-length, or other rows"
        )
    cut = sum(finding is not None for _, finding in made) - (len(made) - len(rows))
    for count, what in ((len(made) - len(rows), "left out: the answers' difference is cut off"), (cut, "cut short")):
        if count:
            console.print(f"{count} of {len(made)} pairs are longer than {length} tokens and {what}.", markup=False)
    with bar(console, "Pairs") as progress:
        found = preference.scores(engine.model, rows, progress=progress)
    keys = ("logprob_chosen", "tokens_chosen", "logprob_rejected", "tokens_rejected")
    items = [
        {"item": str(row.origin), **dict(zip(keys, (*chosen, *rejected), strict=True))}
        for row, (chosen, rejected) in zip(rows, found, strict=True)
    ]
    return preference.metrics(found), items


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    json_to: Json = None,
) -> None:
    """Write (again) the run's report.html: one file, no network."""
    console = open_console(json_to)
    from tunelet.runs import report as page
    from tunelet.runs.record import Run

    path = page.write(Run.open(run))
    console.print(f"Wrote {path}", markup=False)
    write_json({"run": str(run), "report": str(path)}, json_to)

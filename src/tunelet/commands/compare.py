"""The verb compare: finished runs side by side, and tests of what they answered to the same items.

Not for what `eval --out` wrote (compare_results.py), for reading runs (runs/compare.py) or for the tests
(evals/paired.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tunelet.commands.common import Json, open_console, print_wrapped, write_json
from tunelet.errors import TuneletError

WIDE, NARROW = 34, 27  # characters: of the longest title, and of the longest name in a log, which has no spaces
NOTE = (
    "gained, lost: items that count for one of the two alone. needed: on so many items such a difference would be "
    "found in 80 % of all trials."
)


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_A RUN_B ...",
            help="Folders of finished runs; or results of tunelet eval --out (or lm-eval): their folders or files.",
        ),
    ],
    json_to: Json = None,
) -> None:
    """Finished runs side by side: what each was, took and reached, and which settings differ.

    Where they answered the same items (tunelet align), every run is tested against the first one: McNemar's exact test
    with Holm's correction, the difference with its 95 % interval, and how many items would show a difference of that
    size in 80 % of all trials.

    Results of tunelet eval --out are compared task by task over the items that both have: McNemar's test, or for other
    figures a paired bootstrap and a test by swapping, with Holm's correction over the tasks.
    """
    console = open_console(json_to)
    if len(runs) < 2 or len({run.resolve() for run in runs}) < len(runs):
        given = "one run" if len(runs) < 2 else "a run given twice"
        raise TuneletError(
            f"compare: {given}, and it takes at least two different ones", fix="tunelet compare RUN_A RUN_B"
        )
    from tunelet.commands import compare_results

    if compare_results.kinds(runs):
        compare_results.compare(runs, console, json_to)
        return
    from tunelet.evals import paired
    from tunelet.runs import compare as facts

    opened = [facts.finished(run) for run in runs]
    names = _names(runs)
    told = [facts.facts(run) for run in opened]
    cautions, settings = facts.cautions(told, names), facts.differing(opened)
    outcomes = [paired.outcomes(facts.answered(run)) for run in opened]
    tests = [paired.compare(outcomes[0], other) for other in outcomes[1:]]
    judged = iter(paired.corrected([test for against in tests for test in against]))
    tests = [[next(judged) for _ in against] for against in tests]
    if json_to != "-":
        for sentence in cautions:
            print_wrapped(console, sentence, "yellow")
        console.print(_table(names, told, settings), soft_wrap=False)
        for name, one in zip(names, told, strict=True):
            for remark in one["remarks"]:
                print_wrapped(console, f"{name}: {remark['text']} Next: {remark['fix']}", "yellow")
        for name, against in zip(names[1:], tests, strict=True):
            _tell(names[0], name, against, console)
        if any(tests):
            print_wrapped(console, NOTE, "dim")
    figures = {"runs": told, "cautions": cautions, "settings": settings, "names": names}
    against = {name: [test.as_dict() for test in of] for name, of in zip(names[1:], tests, strict=True)}
    write_json(figures | {"against": names[0], "tests": against}, json_to)


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' own names, where that tells them apart."""
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]


def _table(names: Sequence[str], told: Sequence[dict[str, Any]], settings: dict[str, list[Any]]) -> Any:
    from rich.table import Table

    from tunelet.align import METRICS
    from tunelet.recipe_text import inline
    from tunelet.runs.compare import budget_shown, data_shown, method_shown

    table = Table(pad_edge=False, box=_box(), show_edge=False)
    table.add_column("", overflow="fold", width=NARROW if len(names) > 2 else WIDE)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")

    def row(title: str, cells: Sequence[str]) -> None:
        if any(cell != "-" for cell in cells):
            table.add_row(title, *cells)

    row("method", [method_shown(one) for one in told])
    row("starts from", [one["starts_from"] or "random weights" for one in told])
    row("training data", [data_shown(one) for one in told])
    row("trained", [budget_shown(one) for one in told])
    row("learning rate", [f"{one['learning_rate']:.3g}" for one in told])
    row("tokens seen", [_number(one["tokens"], "{:,}") for one in told])
    row("parameters trained", [_number(one["parameters_trained"], "{:,}") for one in told])
    row("time", [_time(one["trained"][-1:]) for one in told])
    row("time, with what came before", [_time(one["trained"]) if len(one["trained"]) > 1 else "-" for one in told])
    row("most memory", [_number(one["peak_mb"], "{:,.0f} MB") for one in told])
    row("energy", [_energy(one["trained"][-1:]) for one in told])
    row("energy, with what came before", [_energy(one["trained"]) if len(one["trained"]) > 1 else "-" for one in told])
    row("stopped by the guard", [one["stopped"] or "-" for one in told])
    table.add_section()
    for metric in [*METRICS, *(name for one in told for name in one["metrics"] if name not in METRICS)]:
        row(METRICS.get(metric, metric), [_figure(metric, one["metrics"].get(metric)) for one in told])
    row("held-out loss of the method", [_number(one["held_out_loss"], "{:.3f}") for one in told])
    table.add_section()
    for part in ("held_out", "watch"):
        for key in dict.fromkeys(key for one in told for key in one[part]):
            row(key, [_number(one[part].get(key), "{:.3f}") for one in told])
    table.add_section()
    for key, of in settings.items():
        row(key, [inline(value) for value in of])
    return table


def _tell(first: str, second: str, tests: Sequence[Any], console: Any) -> None:
    """The tests of one run against the first as a table, and what they say in words."""
    from rich.table import Table

    from tunelet.align import METRICS

    console.print()
    if not tests:
        line = f"{first} and {second} have answered none of the same items: nothing to test. `tunelet align` asks them."
        print_wrapped(console, line)
        return
    table = Table(pad_edge=False, box=_box(), show_edge=False)
    table.add_column(f"{second} against {first}", overflow="fold")
    for title in ("points", "gained : lost", "p (Holm)", "needed"):
        table.add_column(title, justify="right", no_wrap=True)
    order = list(METRICS)
    tests = sorted(tests, key=lambda test: order.index(test.metric) if test.metric in order else len(order))
    for test in tests:
        points = [100 * getattr(test.difference, side) for side in ("value", "low", "high")]
        table.add_row(
            METRICS.get(test.metric, test.metric),
            "{:+.1f} ({:+.1f} to {:+.1f})".format(*points),
            f"{test.only_second} : {test.only_first}",
            "<0.001" if test.p_holm < 0.001 else f"{test.p_holm:.3f}",
            _number(test.needed, "{:,}"),
        )
    console.print(table, soft_wrap=False)
    texts = {"better": f"{second} is better than {first} in", "worse": f"{second} is worse than {first} in"}
    texts["noise"] = "Within noise, where chance alone would do as much"
    for verdict, text in texts.items():
        if of := [METRICS.get(test.metric, test.metric) for test in tests if test.verdict == verdict]:
            print_wrapped(console, f"{text}: {'; '.join(of)}.")


def _box() -> Any:
    from rich import box

    return box.SIMPLE_HEAD


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _figure(metric: str, figure: dict[str, Any] | None) -> str:
    from tunelet.align import shown

    if figure is None:
        return "-"
    low, high = (shown(metric, figure[side]).rstrip("%") for side in ("low", "high"))
    return f"{shown(metric, figure['value'])} ({low}–{high})"


def _time(trained: Sequence[dict[str, Any]]) -> str:
    from tunelet.train.progress import duration

    seconds = [of["seconds"] for of in trained]
    return "-" if None in seconds else duration(sum(seconds))


def _energy(trained: Sequence[dict[str, Any]]) -> str:
    from tunelet.train import energy

    if any(of["energy_wh"] is None for of in trained):
        return "-"
    measured = all(of["energy_kind"] == "measured" for of in trained)
    total = sum(of["energy_wh"] for of in trained)
    return energy.label({"energy_wh": total, "kind": "measured" if measured else "estimated"})

"""`tunelet compare` of what `tunelet eval --out` wrote: each figure of two evaluations or more, with its test.

Not for runs (compare.py) and not for the tests themselves (evals/versus.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunelet.commands.common import print_wrapped, write_json
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from rich.console import Console

    from tunelet.evals.versus import Versus

FEW = 12  # parts of groups that are shown; of more only the groups among them, all are in --json
GAP = 2  # spaces between columns, of which the box makes one
NOTE = (
    "Shares in percent. needed: on so many items such a difference would be found in 80 % of all trials. p: McNemar's "
    "exact test, or answers swapped at random; Holm: corrected over all figures here."
)


def kinds(paths: Sequence[Path]) -> bool:
    """Whether these are results of `eval`, not runs. Raises TuneletError where they are some of each."""
    from tunelet.evals import outputs
    from tunelet.runs.record import is_run

    results = [path for path in paths if not is_run(path) and outputs.is_output(path)]
    if results and (others := [path for path in paths if path not in results]):
        what = "a run" if is_run(others[0]) else "neither results nor a run"
        raise TuneletError(
            f"compare: {results[0]} holds results of an evaluation, and {others[0]} is {what}",
            why="a run is compared by what tunelet align asked it, results by the items of their tasks",
            fix="evaluate both with the same tasks, and compare the two folders of --out; or name runs alone",
        )
    return bool(results)


def compare(paths: Sequence[Path], console: Console, json_to: str | None) -> None:
    from tunelet.evals import outputs, versus

    read = [outputs.read(path) for path in paths]
    letters = [chr(ord("A") + place) if place < 26 else str(place + 1) for place in range(len(read))]
    cautions = [outputs.cautions(read[0], other, (letters[0], letter))
                for other, letter in zip(read[1:], letters[1:], strict=True)]  # fmt: skip
    found = [versus.compare(read[0], other) for other in read[1:]]
    judged = iter(versus.corrected([test for tests, _ in found for test in tests]))
    tests = [[next(judged) for _ in of] for of, _ in found]
    if not any(tests):
        raise TuneletError(
            "compare: these results have no item in common",
            why=" ".join(cautions[0]),
            fix="evaluate both on the same task and rows",
        )
    if json_to != "-":
        for letter, path, of in zip(letters, paths, read, strict=True):
            print_wrapped(console, f"{letter}  {path}: {of.results.get('model_name') or 'a model without a name'}")
        for place, against in enumerate(tests, 1):
            console.print()
            for sentence in cautions[place - 1]:
                print_wrapped(console, sentence, "yellow")
            if against:
                _show(console, against, letters[0], letters[place], read[0].groups)
            if untested := found[place - 1][1]:
                print_wrapped(console, f"Not tested, because items have no value of their own: {', '.join(untested)}.")
        console.print()
        print_wrapped(console, NOTE, "dim")
    told = [
        {"name": letter, "path": str(path), "model": of.results.get("model_name"), "tasks": list(of.tasks)}
        for letter, path, of in zip(letters, paths, read, strict=True)
    ]
    against = {
        letter: {"tests": [test.as_dict() for test in of], "cautions": said, "untested": untested}
        for letter, of, said, (_, untested) in zip(letters[1:], tests, cautions, found, strict=True)
    }
    write_json({"results": told, "first": letters[0], "against": against}, json_to)


def _show(console: Console, tests: Sequence[Versus], first: str, second: str, groups: dict[str, list[str]]) -> None:
    from rich import box
    from rich.table import Table

    parts = [test for test in tests if test.part]
    few = len({test.task for test in parts}) <= FEW
    shown = [test for test in tests if few or not test.part or test.task in groups]
    titles = ["task, figure", first, second, f"{second} - {first} (95 %)", "p", "Holm", "needed"]
    rows = [_row(test) for test in shown]
    widths = [
        max(len(line) for cell in column for line in cell.split("\n")) for column in zip(titles, *rows, strict=True)
    ]
    # names are folded where it gets narrow, figures never
    left = max(len(titles[0]), console.width - sum(widths[1:]) - GAP * (len(titles) - 1))
    table = Table(pad_edge=False, box=box.SIMPLE_HEAD, show_edge=False, padding=(0, GAP - 1, 0, 0))
    table.add_column(titles[0], overflow="fold", width=min(widths[0], left))
    for title in titles[1:]:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    texts = {
        "better": f"{second} is better than {first} in",
        "worse": f"{second} is worse than {first} in",
        "same": "The same within a point (of a perplexity: one percent)",
        "unclear": "Can't tell: chance alone would do as much, and more items could show a difference",
    }
    for verdict, text in texts.items():
        if of := [f"{test.task} {test.metric} ({test.n:,})" for test in shown if test.verdict == verdict]:
            print_wrapped(console, f"{text}: {'; '.join(of)}.")
    if len(shown) < len(tests):
        counted = {verdict: sum(test.verdict == verdict for test in parts) for verdict in texts}
        print_wrapped(
            console,
            f"Of {len(parts)} figures of parts, all of them in --json: {counted['better']} better, "
            f"{counted['worse']} worse, {counted['same']} the same, {counted['unclear']} can't be told.",
        )


def _row(test: Versus) -> list[str]:
    from tunelet.evals.versus import MARGIN

    share = test.margin == MARGIN
    scale, form = (100, "{:.1f}") if share else (1, "{:.3g}")
    change = [scale * getattr(test.difference, side) for side in ("value", "low", "high")]
    signed = "{:+.1f} ({:+.1f} to {:+.1f})" if share else "{:+.3g}\n({:+.3g} to {:+.3g})"
    needed = "-" if test.needed is None else f"{test.needed:,}" if test.needed < 1_000_000 else ">1M"
    return [
        f"{test.task} {test.metric}",
        *(form.format(scale * value) for value in (test.first, test.second)),
        signed.format(*change),
        _p(test.p),
        _p(test.p_holm),
        needed,
    ]


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")

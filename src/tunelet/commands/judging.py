"""`tunelet eval` where a judge says how good answers are: --against with --judge, and the tasks score, mt_bench, judge.

Not for the scoring of one model's own probabilities (results.py). The work is done in `evals/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet.commands.common import bar, column_map, open_engine, open_tokenizer, print_wrapped
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from rich.console import Console

TASKS = {
    "score": "answers scored by a judge (--judge), by the shipped rubric or your own (--rubric)",
    "mt_bench": "MT-bench: two turns, scored by a judge, by category and turn",
    "judge": "how far a judge agrees with people's preferences (--data), and with itself",
}
ANSWER_TOKENS = 1024  # of an answer to score, as MT-bench has it
FIX = "take a judge that follows instructions (the larger, the better), or one that reads further"
Opened = Callable[[], Any]  # the judge (evals/judge.py), once it is needed


def check(task: str, on_starter: bool, against: str | None, judge: str | None, rubric: Path | None) -> None:
    """Raises TuneletError for flags that do not go together."""
    if against and task != "preference":
        raise TuneletError(
            f"--against goes with --task preference, not {task}", fix="--task preference, or leave it out"
        )
    if rubric and task not in ("score", "mt_bench"):
        raise TuneletError(f"--rubric goes with --task score or mt_bench, not {task}", fix="leave it out")
    if task in ("score", "mt_bench"):
        if not judge:
            raise TuneletError(
                f"--task {task}: who scores the answers?",
                fix="name a model that judges, the larger the better: --judge MODEL, or --judge URL#MODEL",
            )
        return
    if judge and task == "judge":
        raise TuneletError(
            "--judge: in --task judge the judge is the model itself",
            fix="name it first: tunelet eval JUDGE --task judge",
        )
    if judge and not against:
        raise TuneletError("--judge: between whose answers?", fix="name the other model or run: --against MODEL_OR_RUN")
    if against and not (on_starter or judge):
        raise TuneletError(
            f"--against {against}: who says which answer is better?",
            why="your own data cannot be graded by running it, as the starter's can",
            fix="name a model that judges: --judge MODEL (the larger, the better), or leave out --data",
        )


def check_template(model: str, template: str | None) -> None:
    """Raises TuneletError where a model cannot be asked anything, by its name: there may be several."""
    from tunelet.data.examples import Message

    renderer = open_tokenizer(model, template)[1]
    try:
        renderer.string([Message("user", "Hi")])
    except TuneletError as error:
        raise TuneletError(f"{model}: {error.what}", why=error.why, fix=error.fix) from None


def judge_of(name: str, opening: Mapping[str, Any], batch_size: int, console: Console) -> Opened:
    """How to open the judge `name`, a model or URL#MODEL, once it is needed. Mistakes show here already: in the address
    or the key, a server that is not there, a model without a tokenizer."""
    from tunelet.infer import endpoint

    if endpoint.is_url(name):
        asked = _endpoint(name, "--judge", batch_size, console)
        return lambda: asked
    open_tokenizer(name)
    return lambda: local(open_engine(name, template=None, **opening), name)


def local(engine: Any, name: str) -> Any:
    from tunelet.evals.judge import LocalJudge

    return LocalJudge(engine, name)


def remote(task: str, model: str | None, adapters: Sequence[str] | None, batch_size: int, console: Console) -> Any:
    """The judge that --task judge is about, where it is URL#MODEL; else None. Raises TuneletError where a URL is to
    be scored otherwise: there are its own answers' probabilities only on this machine."""
    from tunelet.infer import endpoint

    if not model or not endpoint.is_url(model):
        return None
    if task != "judge" or adapters:
        raise TuneletError(
            f"{model}: a server is scored as a judge alone" if task != "judge" else f"{model}: takes no --adapter",
            fix="tunelet eval URL#MODEL --task judge, or name a model on this machine",
        )
    return _endpoint(model, "MODEL", batch_size, console)


def _endpoint(url: str, flag: str, batch_size: int, console: Console) -> Any:
    from tunelet.evals.judge import IN_FLIGHT, EndpointJudge
    from tunelet.infer.endpoint import Endpoint

    asked = Endpoint(url, flag=flag, instead="name a model on this machine")
    asked.check()
    print_wrapped(console, f"Judge: {asked.name}. Requests and answers are sent there.")
    return EndpointJudge(asked, min(IN_FLIGHT, batch_size))


def questions(
    task: str, data: Sequence[str] | None, columns: list[str] | None, limit: int, seed: int, rubric: Path | None
) -> tuple[list[Any], Any]:
    """(what the model is asked, the rubric of its answers) of the tasks score and mt_bench."""
    from tunelet.evals import judge_rows, judge_text

    rated = judge_text.read_rubric(rubric)
    if task == "mt_bench":
        return judge_rows.mt_bench(data or [], limit=limit), rated
    return judge_rows.read(data or ["starter"], columns=column_map(columns), limit=limit, seed=seed), rated


def versus(
    first: Sequence[Any], second: Sequence[Any], judge: Any, seed: int, console: Console
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metrics of the first answers against the second ones, and what goes with them: each pair with its judgement, and
    notes. judge: None where the answers are graded."""
    from tunelet.evals import judge as judging
    from tunelet.evals import judge_figures, winrate

    both = [(a, b) for a, b in zip(first, second, strict=True) if a and b]
    answers = [[of["answer"] for of in side] for side in zip(*both, strict=True)] or [[], []]
    if judge:
        with bar(console, "Judging") as progress:
            said = judging.ask(judge, [a["messages"] for a, _ in both], *answers, progress=progress)
    else:
        said = [judging.by_grade(a, b) for a, b in both]
    kept = [place for place, judgement in enumerate(said) if judgement]
    if lost := len(first) - len(kept):
        console.print(f"{lost} of {len(first)} prompts left out: too long for a model, or for the judge.", markup=False)
    if not kept:
        raise TuneletError(
            "no prompt is left to compare answers on",
            why="with their answers they are longer than a model, or the judge, reads",
            fix="a smaller --max-new-tokens, shorter prompts, or models that read further",
        )
    judged = [said[place] for place in kept]
    of_judge = judge_figures.of_judge(judged, bool(judge) and judge.written)
    parsed = [place for place, judgement in zip(kept, judged, strict=True) if judgement.won is not None]
    _check_parsed(judge, judged)
    won = [judgement.won for judgement in judged if judgement.won is not None]
    metrics = winrate.metrics(won, *([side[place] for place in parsed] for side in answers), seed=seed) | of_judge
    console.print(f"Wins {won.count(1)}, ties {won.count(0.5)}, losses {won.count(0)}.", markup=False)
    if "win_rate_length_controlled" not in metrics:
        console.print("All answers differ in length by the same: no win rate at equal length can be told.")
    notes = [*judge_figures.notes(judged, of_judge), *judge_figures.unparsed_note(of_judge)]
    keys = ("item", "messages", "answer")
    compared = [
        {**{key: both[place][0][key] for key in keys}, "against": both[place][1]["answer"], **_judged(judgement)}
        for place, judgement in zip(kept, judged, strict=True)
    ]
    return metrics, {"compared": compared, "notes": notes}


def agreement(
    judge: Any, examples: Sequence[Any], seed: int, console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """(metrics, items, notes) of a judge on pairs whose better answer people have named."""
    from tunelet.domain import agreement as measure
    from tunelet.evals import judge as judging
    from tunelet.evals import judge_figures

    requests = [[message.as_dict() for message in example.prompt] for example in examples]
    # The better answer is the first of every second pair, so that kappa's two labels are both there.
    firsts = [place % 2 == 0 for place in range(len(examples))]
    answers = [
        tuple(_told(turns) for turns in ((one.chosen, one.rejected) if first else (one.rejected, one.chosen)))
        for one, first in zip(examples, firsts, strict=True)
    ]
    with bar(console, "Judging") as progress:
        said = judging.ask(judge, requests, [a for a, _ in answers], [b for _, b in answers], progress=progress)
    kept = [place for place, judgement in enumerate(said) if judgement]
    if lost := len(said) - len(kept):
        console.print(f"{lost} of {len(said)} pairs left out: longer than the judge reads.", markup=False)
    if not kept:
        raise TuneletError(
            "no pair is left", why="all are longer than the judge reads", fix="shorter rows, or another judge"
        )
    judged, first = [said[place] for place in kept], [firsts[place] for place in kept]
    _check_parsed(judge, judged)
    metrics = judge_figures.agreement(judged, first)
    found = measure.measured(judge_figures.labels(judged, first), seed=seed)
    if found["value"] is not None:
        metrics["judge_kappa"] = {"value": found["value"], "low": found["low"], "high": found["high"],
                                  "n": found["items"]}  # fmt: skip
    of_judge = judge_figures.of_judge(judged, judge.written)
    notes = [*judge_figures.notes(judged, of_judge), *judge_figures.unparsed_note(of_judge)]
    items = [
        {
            "item": str(examples[place].origin),
            "messages": requests[place],
            "answers": list(answers[place]),
            "people": 0 if firsts[place] else 1,
            **_judged(judgement),
        }
        for place, judgement in zip(kept, judged, strict=True)
    ]
    return metrics | of_judge, items, notes


def answers(engine: Any, questions: Sequence[Any], console: Console, **answering: Any) -> list[dict[str, Any]]:
    """The engine's answers to each turn. Raises TuneletError where it can read none."""
    from tunelet.evals import judge_score

    with bar(console, "Answering") as progress:
        answered = judge_score.answers(engine, questions, progress=progress, **answering)
    if lost := judge_score.left_out(questions, answered):
        console.print(f"{lost} turns left out: longer than the model reads.", markup=False)
    if not answered:
        raise TuneletError("no question is left", why="all are longer than the model reads", fix="shorter ones")
    return answered


def scores(
    judge: Any, answered: Sequence[dict[str, Any]], rubric: Any, seed: int, console: Console
) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
    """(metrics, items, notes) of answers and the judge's score of each."""
    from tunelet.evals import judge_figures, judge_score

    with bar(console, "Judging") as progress:
        scored = judge_score.score(judge, answered, rubric, progress=progress)
    if not any(row["score"] is not None for row in scored):
        raise TuneletError(f"{judge.name}: no answer has a score", why=f"the first one: {scored[0]['why']}", fix=FIX)
    metrics = judge_score.metrics(scored, rubric, seed=seed)
    return metrics, scored, [*judge_score.notes(scored), *judge_figures.unparsed_note(metrics)]


def _check_parsed(judge: Any, judged: Sequence[Any]) -> None:
    """Raises TuneletError where the judge was asked and not one pair has a verdict."""
    asked = [judgement for judgement in judged if judgement.verdicts]
    if asked and all(judgement.won is None for judgement in asked):
        why = next(verdict.why for judgement in asked for verdict in judgement.verdicts if verdict.why)
        raise TuneletError(f"{judge.name}: not one pair has a verdict", why=f"the first one: {why}", fix=FIX)


def _told(turns: Sequence[Any]) -> str:
    from tunelet.evals import judge_text

    return judge_text.told([turn.as_dict() for turn in turns])


def _judged(judgement: Any) -> dict[str, Any]:
    """What a pair's item has of its judgement. verdicts: in this order of the answers and in the other one."""
    out = {
        "won": judgement.won,
        "consistent": judgement.consistent,
        "verdicts": [verdict.place for verdict in judgement.verdicts],
    }
    if any(verdict.text or verdict.why for verdict in judgement.verdicts):
        out["judge_texts"] = [verdict.text for verdict in judgement.verdicts]
    if judgement.won is None:
        out["why"] = "; ".join(dict.fromkeys(verdict.why for verdict in judgement.verdicts if verdict.why))
    return out

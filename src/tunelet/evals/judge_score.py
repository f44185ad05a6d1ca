"""A model's answers, turn by turn, and a judge's score of each; the mean of all, of each turn and of each category.

Not for reading the questions (judge_rows.py) nor for how a judge scores (judge.py). As in MT-bench (Zheng et al. 2023,
arXiv:2306.05685), a turn is answered with the model's own answers before it in the conversation, and the judge rates
the last one; answers are greedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunelet.data.examples import Message
from tunelet.evals import stats
from tunelet.evals.judge import Judge, Progress
from tunelet.evals.judge_rows import Question
from tunelet.evals.judge_text import Rubric


def answers(
    engine: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """One dict for each turn that was asked: item, category, turn (from 1), messages, reference, answer, stopped,
    tokens. Where a conversation becomes longer than the model reads, it ends there."""
    talks = [[message.as_dict() for message in question.before] for question in questions]
    going = list(range(len(questions)))
    whole, out = sum(len(question.turns) for question in questions), []
    for turn in range(max(len(question.turns) for question in questions)):
        asked, before = [], len(out)
        for place in going:
            if turn < len(questions[place].turns):
                talks[place].append({"role": "user", "content": questions[place].turns[turn]})
                ids = engine.renderer.prompt([Message(one["role"], one["content"]) for one in talks[place]])
                if not engine.max_length or len(ids) < engine.max_length:
                    asked.append((place, ids))
        done = engine.generate(
            [ids for _, ids in asked],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress=(lambda finished, before=before: progress(before + finished, whole)) if progress else None,
        )
        for (place, _), answer in zip(asked, done, strict=True):
            question = questions[place]
            out.append(
                {
                    "item": question.item,
                    "category": question.category,
                    "turn": turn + 1,
                    "messages": list(talks[place]),
                    "reference": question.reference(turn),
                    "answer": answer.text,
                    "stopped": answer.stopped,
                    "tokens": len(answer.ids),
                }
            )
            talks[place].append({"role": "assistant", "content": answer.text})
        going = [place for place, _ in asked]
    return out


def score(
    judge: Judge, answered: Sequence[Mapping[str, Any]], rubric: Rubric, *, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """The answers with `score` (None: there is none, `why` says why), and `judge_text`, the judge's reply, or
    `judge_mass` (judge.Rating)."""
    asked = [(row["messages"], row["answer"], row["reference"]) for row in answered]
    out = []
    for row, rating in zip(answered, judge.rate(asked, rubric, progress), strict=True):
        scored = {**row, "score": rating.value if rating else None}
        if rating is None:
            scored["why"] = "longer than the judge reads"
        elif rating.value is None:
            scored["why"] = rating.why
        if judge.written:
            scored["judge_text"] = rating.text if rating else ""
        elif rating:
            scored["judge_mass"] = rating.mass
        out.append(scored)
    return out


def metrics(scored: Sequence[Mapping[str, Any]], rubric: Rubric, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """name -> {"value", "low", "high", "n"}: score, score_turn_N where there are several turns, score_category_NAME
    where rows have one; on the rubric's scale. n is of questions: turns of one are not independent, so whole questions
    are resampled. judge_unparsed: the share of answers without a score. {} where nothing has one."""
    rated = [row for row in scored if row["score"] is not None]
    groups: dict[str, list[Mapping[str, Any]]] = {"score": rated}
    if any(row["turn"] > 1 for row in scored):
        for turn in sorted({row["turn"] for row in rated}):
            groups[f"score_turn_{turn}"] = [row for row in rated if row["turn"] == turn]
    for name in dict.fromkeys(row["category"] for row in rated if row["category"]):
        groups[f"score_category_{name}"] = [row for row in rated if row["category"] == name]
    out = {name: _mean(rows, rubric, seed).as_dict() for name, rows in groups.items() if rows}
    if any("judge_text" in row for row in scored) or len(rated) < len(scored):
        out["judge_unparsed"] = stats.wilson(len(scored) - len(rated), len(scored)).as_dict()
    return out


def _mean(rows: Sequence[Mapping[str, Any]], rubric: Rubric, seed: int) -> stats.Interval:
    of: dict[str, list[float]] = {}
    for row in rows:
        of.setdefault(row["item"], []).append(row["score"])
    values = {value for scores in of.values() for value in scores}
    if len(values) == 1:  # a bootstrap would see no doubt
        return stats.bounded_mean([values.pop()] * len(of), rubric.low, rubric.high, seed=seed)
    return stats.bootstrap_ratio([sum(each) for each in of.values()], [float(len(each)) for each in of.values()],
                                 seed=seed)  # fmt: skip


def notes(scored: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know before believing the scores, in plain words."""
    rated = [row["score"] for row in scored if row["score"] is not None]
    out = []
    if len(rated) > 1 and len(set(rated)) == 1 and len({row["answer"] for row in scored}) > 1:
        out.append(f"The judge gave every answer the same score, {rated[0]:g}: its scores tell nothing.")
    masses = [row["judge_mass"] for row in scored if row.get("judge_mass") is not None]
    if masses and sum(masses) / len(masses) < 0.5:
        out.append(
            f"To the judge a number is an improbable reply (probability {sum(masses) / len(masses):.2f}): it does not "
            "follow the question, and its scores tell little."
        )
    return out


def left_out(questions: Sequence[Question], answered: Sequence[Mapping[str, Any]]) -> int:
    """How many turns were not asked, because the conversation is longer than the model reads."""
    return sum(len(question.turns) for question in questions) - len(answered)

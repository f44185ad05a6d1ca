"""What judgements of pairs say of the judge itself: consistency, favoured places, agreement with people.

Not for asking (judge.py) nor for who wins (winrate.py). Judgements without a verdict count in judge_unparsed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tunelet.evals import stats
from tunelet.evals.judge import Judgement

MANY_UNPARSED = 0.2
ALPHA = 0.05


def of_judge(judgements: Sequence[Judgement], written: bool, *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """name -> {"value", "low", "high", "n"} over the pairs that the judge was asked about; {} where there is none.

    judge_consistency: the share with the same outcome in both orders. judge_first_place: how often it named the place
    that was shown first, of both orders together, ties half; 0.5 is even. With "p", of the exact sign test over pairs
    whether it favours a place: of those where it named one of them more often, that one was the first as often as the
    second. judge_unparsed, of a judge that is read: the share of pairs without a verdict in both orders.
    """
    asked = [judgement for judgement in judgements if judgement.verdicts]
    known = [judgement for judgement in asked if judgement.won is not None]
    out: dict[str, dict[str, Any]] = {}
    if known:
        leaning = [judgement.leaning or 0 for judgement in known]
        out["judge_consistency"] = stats.wilson(sum(bool(one.consistent) for one in known), len(known)).as_dict()
        place = stats.bounded_mean([(2 + one) / 4 for one in leaning], 0.0, 1.0, seed=seed).as_dict()
        out["judge_first_place"] = {**place, "p": stats.mcnemar(*_sides(leaning))}
    if written and asked:
        out["judge_unparsed"] = stats.wilson(len(asked) - len(known), len(asked)).as_dict()
    return out


def _sides(leaning: Sequence[int]) -> tuple[int, int]:
    return sum(one > 0 for one in leaning), sum(one < 0 for one in leaning)


def notes(judgements: Sequence[Judgement], figures: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader has to know of the judge before believing it, in plain words."""
    known = [judgement for judgement in judgements if judgement.verdicts and judgement.won is not None]
    if not known:
        return []
    leaning = [judgement.leaning or 0 for judgement in known]
    (first, second), p = _sides(leaning), figures["judge_first_place"]["p"]
    for place, value in (("first", 2), ("second", -2)):
        if all(one == value for one in leaning):
            return [
                f"The judge named the answer that stood {place} every time, whichever it was ({len(known)} pairs in "
                f"both orders; exact test, p = {p:.2g}). So every pair is a tie: it looks at places and not at "
                "answers, and its verdicts tell nothing."
            ]
    if all(one == 0 and judgement.won == 0.5 for one, judgement in zip(leaning, known, strict=True)):
        return [f"The judge called every pair a tie ({len(known)}): its verdicts tell nothing."]
    out = []
    if p < ALPHA:
        place = "first" if first > second else "second"
        out.append(
            f"The judge favours the answer that stands {place}: it leant to the first place in {first} pairs and to "
            f"the second in {second} (exact test, p = {p:.2g}). A pair that its two orders do not agree on is a tie."
        )
    if figures["judge_consistency"]["high"] <= 0.5:
        out.append("In most pairs the judge's two orders disagree: its verdicts tell little.")
    return out


def unparsed_note(figures: dict[str, dict[str, Any]]) -> list[str]:
    share = figures.get("judge_unparsed", {}).get("value", 0.0)
    if share <= MANY_UNPARSED:
        return []
    return [
        f"No verdict could be read in {share:.0%} of the judge's replies. They are left out, and what is left may not "
        "be like the rest: look at them (--json), and take a judge that follows instructions."
    ]


def agreement(judgements: Sequence[Judgement], chosen_first: Sequence[bool]) -> dict[str, dict[str, Any]]:
    """How often the judge prefers the answer that people prefer. chosen_first: whether that one is the first of the
    pair, of each judgement.

    judge_accuracy: in both orders; a tie is not a hit. judge_accuracy_chosen_first, judge_accuracy_chosen_second: by
    one verdict alone, where the better answer was shown first, or second. {} where no pair has a verdict.
    """
    known = [(one, first) for one, first in zip(judgements, chosen_first, strict=True) if one.won is not None]
    if not known:
        return {}
    hits = {"judge_accuracy": [one.won == float(first) for one, first in known]}
    asked = [(one, first) for one, first in known if one.verdicts]
    if asked:
        # In the first order the first answer stands at A, in the other order at B.
        hits["judge_accuracy_chosen_first"] = [one.verdicts[not first].place == "A" for one, first in asked]
        hits["judge_accuracy_chosen_second"] = [one.verdicts[first].place == "B" for one, first in asked]
    return {name: stats.wilson(sum(of), len(of)).as_dict() for name, of in hits.items()}


def labels(judgements: Sequence[Judgement], chosen_first: Sequence[bool]) -> dict[str, dict[str, str]]:
    """pair -> {"judge", "people"}: which answer each prefers, "first", "second" or "tie"; what domain/agreement.py
    measures. Pairs without a verdict are left out."""
    names = {1.0: "first", 0.0: "second", 0.5: "tie"}
    return {
        str(number): {"judge": names[one.won], "people": names[float(first)]}
        for number, (one, first) in enumerate(zip(judgements, chosen_first, strict=True))
        if one.won is not None
    }

"""Scores beside answers: the best and the worst answer of a row, ties, and scores that contradict chosen and rejected.

Not for which answer a label names: pairs.py. A score is a number, and more is better.
"""

from __future__ import annotations

import math
import re
from typing import Any

from tunelet.data.shapes import Bad, loaded

LISTS = ("completions", "responses", "answers", "candidates", "generations", "outputs")
TEXTS = ("response", "text", "content", "completion", "answer", "output")
# Where the answers have several of these (UltraFeedback: an overall score and a fine-grained one), the first is taken.
SCORES = ("overall_score", "score", "rating", "fine-grained_score")
SCORE_LISTS = ("overall_scores", "scores", "ratings")
CHOSEN = ("score_chosen", "chosen_score", "chosen-rating", "chosen_rating", "rating_chosen", "chosen_avg_rating")
REJECTED = tuple(name.replace("chosen", "rejected") for name in CHOSEN)

NUMBER = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*")
MISSING = ("", "n/a", "na", "nan", "none", "null")
WANTED = 'write completions = [{"response": ..., "score": ...}, ...], or one row for each pair'


def number(value: Any) -> float | None:
    """A finite number, or text that is one ("7.5", not "7,5", "8/10" or "1_0"); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and not NUMBER.fullmatch(value):
        return None
    try:
        # stripped here: float does not take every sign that \s and strip call white space
        found = float(value.strip() if isinstance(value, str) else value)
    except OverflowError:  # an integer of more than 308 digits
        return None
    return found if math.isfinite(found) else None


def score(value: Any, where: str) -> float | None:
    """A score; None where there is none (null, "", "N/A"). Raises Bad for anything that is no number."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    if missing or (isinstance(value, str) and value.strip().lower() in MISSING):
        return None
    found = number(value)
    if found is None:
        raise Bad("bad_score", f"{where} is {shown(value)}", "give a number, the same scale for all answers")
    return found


def shown(value: Any) -> str:
    """A value as it can stand in a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check(row: dict[str, Any]) -> None:
    """Raises Bad where a row's scores do not say that chosen is better. Rows without scores pass."""
    better, worse = (next((n for n in names if row.get(n) is not None), None) for names in (CHOSEN, REJECTED))
    if better is None or worse is None:
        return
    high, low = score(row[better], f"'{better}'"), score(row[worse], f"'{worse}'")
    if high is None or low is None:
        return
    if high == low:
        raise tied(f"chosen and rejected both have the score {high:g}")
    if high < low:
        raise Bad(
            "swapped_scores",
            f"chosen has the score {high:g} ('{better}'), and rejected {low:g} ('{worse}')",
            "swap chosen and rejected, or mend the scores",
        )


def tied(message: str) -> Bad:
    """A tie prefers nothing: the row is left out, and nothing is wrong with it."""
    return Bad("tied_scores", message, "nothing to do: a tie says nothing about which is better", "warning")


def answers_column(row: dict[str, Any], scored: bool) -> str | None:
    """The column that lists a row's answers; with `scored` only where scores are beside them."""
    for name in LISTS:
        items = loaded(row.get(name))
        if isinstance(items, list) and items and all(isinstance(item, (dict, str)) for item in items):
            beside = any(key in row for key in SCORE_LISTS)
            if not scored or beside or any(key in item for item in items if isinstance(item, dict) for key in SCORES):
                return name
    return None


def best_and_worst(row: dict[str, Any]) -> tuple[tuple[Any, str], tuple[Any, str]]:
    """((answer, its name), (answer, its name)): the row's highest score against its lowest; of equal ones the first.

    Best against worst has the clearest difference; what lies between, and answers without a score, are left out.
    Raises Bad where all scores are equal (tied_scores), where fewer than two answers have one, and for what is no
    score.
    """
    name = answers_column(row, scored=False)
    if name is None:
        raise Bad("missing_column", "the row has no list of answers", WANTED)
    items = loaded(row[name])
    known = [(value, place) for place, value in enumerate(_scores(row, name, items)) if value is not None]
    if len(known) < 2:
        keys = f" (they have {', '.join(map(str, list(items[0])[:6]))})" if isinstance(items[0], dict) else ""
        raise Bad("no_scores", f"{len(known)} of {len(items)} answers in '{name}' have a score{keys}", WANTED)
    best = max(known, key=lambda pair: pair[0])  # max and min take the first of equal ones
    worst = min(known, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        raise tied(f"all {len(known)} scored answers have the score {best[0]:g}")
    return _text(items[best[1]], name, best[1]), _text(items[worst[1]], name, worst[1])


def _scores(row: dict[str, Any], name: str, items: list[Any]) -> list[float | None]:
    beside = next((key for key in SCORE_LISTS if row.get(key) is not None), None)
    if beside is not None:
        values = loaded(row[beside])
        if not isinstance(values, list) or len(values) != len(items):
            many = len(values) if isinstance(values, list) else "no list"
            raise Bad("bad_score", f"'{name}' lists {len(items)} answers, and '{beside}' {many}", WANTED)
        return [score(value, f"'{beside}', number {place}") for place, value in enumerate(values, 1)]
    # one key for all answers of the row: scores of two scales are not compared
    rated = [item if isinstance(item, dict) else {} for item in items]
    key = max(SCORES, key=lambda key: sum(item.get(key) is not None for item in rated))
    return [score(item.get(key), f"'{key}' of answer {place}") for place, item in enumerate(rated, 1)]


def _text(item: Any, name: str, place: int) -> tuple[Any, str]:
    where = f"{name}, answer {place + 1}"
    if isinstance(item, str):
        return item, where
    key = next((key for key in TEXTS if item.get(key) is not None), None)
    if key is None:
        raise Bad("empty_answer", f"'{where}' has no text ({', '.join(map(str, list(item)[:6]))})", WANTED)
    return item[key], where

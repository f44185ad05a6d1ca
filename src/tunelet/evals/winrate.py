"""Win rate of one model's answers over another's, raw and at equal length, from judgements of each pair of answers.

Not the judging (judge.py). Length control is the regression of Dubois et al., "Length-Controlled AlpacaEval"
(arXiv:2404.04475), without its term for how hard an instruction is: that one is fitted over many models' answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunelet.data.examples import Preference
from tunelet.evals.stats import CONFIDENCE, RESAMPLES, Interval, bootstrap_mean, bounded_mean

RIDGE = 0.01  # keeps the coefficients finite where length or the model decides every judgement
ITERATIONS = 100  # most fits end after about 10
ROWS = 100  # resamples fitted at once

Array = NDArray[np.float64]


def answers(
    engine: Any,
    examples: Sequence[Preference],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any] | None]:
    """Greedy answers to the examples' prompts: item, messages, answer, stopped, tokens; None for a prompt longer than
    the model reads."""
    ids = [engine.renderer.prompt(example.prompt, example.tools) for example in examples]
    asked = [place for place, of in enumerate(ids) if not engine.max_length or len(of) < engine.max_length]
    done = engine.generate(
        [ids[place] for place in asked],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=(lambda done: progress(done, len(asked))) if progress else None,
    )
    out: list[dict[str, Any] | None] = [None] * len(examples)
    for place, answer in zip(asked, done, strict=True):
        out[place] = {
            "item": f"prompt/{place}",
            "messages": [message.as_dict() for message in examples[place].prompt],
            "answer": answer.text,
            "stopped": answer.stopped,
            "tokens": len(answer.ids),
        }
    return out


def metrics(won: Sequence[float], first: Sequence[str], second: Sequence[str], *, seed: int = 0) -> dict[str, Any]:
    """name -> {"value", "low", "high", "n"} of judgements `won` (1: the first answer, 0: the second, 0.5: a tie).

    win_rate: ties count half. win_rate_length_controlled: see `length_controlled`; left out where that says None.
    answer_characters, answer_characters_against: means, which do not depend on a tokenizer as tokens do.
    """
    lengths = [[float(len(answer)) for answer in answers] for answers in (first, second)]
    found = {
        "win_rate": bounded_mean(won, 0.0, 1.0, seed=seed),
        "win_rate_length_controlled": length_controlled(won, *lengths, seed=seed),
        "answer_characters": bootstrap_mean(lengths[0], seed=seed),
        "answer_characters_against": bootstrap_mean(lengths[1], seed=seed),
    }
    return {name: figure.as_dict() for name, figure in found.items() if figure}


def length_controlled(
    won: Sequence[float], first: Sequence[float], second: Sequence[float], *, seed: int = 0
) -> Interval | None:
    """The win rate that the judgements let expect of answers of equal length. first, second: their lengths.

    won ~ logistic(a + b tanh(d / sd(d))), d = first - second; the win rate at d = 0 is logistic(a). The interval is a
    percentile bootstrap over items. None where all d are the same and not 0: nothing then tells length from quality.
    """
    d = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if np.ptp(d) == 0 and d[0]:
        return None
    if not d.any() or min(won) == max(won):  # nothing of length to take out
        return bounded_mean(won, 0.0, 1.0, seed=seed)
    x, y = np.tanh(d / d.std()), np.asarray(won, dtype=np.float64)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=RESAMPLES).astype(np.float64)
    rates = np.concatenate([_fit(x, y, drawn[start : start + ROWS]) for start in range(0, RESAMPLES, ROWS)])
    low, high = np.quantile(rates, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(_fit(x, y, np.ones((1, len(y))))[0]), float(low), float(high), len(y))


def _fit(x: Array, y: Array, weights: Array) -> Array:
    """[B]: logistic(a) of the weighted fit of each row of `weights` [B, n]; x, y: [n].

    Newton's method from 0, which needs no smaller steps here: |x| <= 1 (20,000 random cases, separated ones too).
    """
    a, b = np.zeros((2, len(weights)))
    for _ in range(ITERATIONS):
        p = 1 / (1 + np.exp(-(a[:, None] + b[:, None] * x)))
        off, bend = weights * (p - y), weights * p * (1 - p)
        ga, gb = off.sum(1) + RIDGE * a, off @ x + RIDGE * b
        aa, ab, bb = bend.sum(1) + RIDGE, bend @ x, bend @ (x * x) + RIDGE
        scale = aa * bb - ab * ab
        da, db = (bb * ga - ab * gb) / scale, (aa * gb - ab * ga) / scale
        a, b = a - da, b - db
        if max(np.abs(da).max(), np.abs(db).max()) < 1e-9:
            break
    return 1 / (1 + np.exp(-a))

"""Judges: the starter's own grading; a local model, by the probability of what it could reply; an endpoint, by what it
writes. Which of two answers is better, and how good one answer is.

Not for what is asked and how a reply is read (judge_text.py) nor for the figures (judge_figures.py). Of two answers a
model is asked in both orders, because judges favour a place (Zheng et al. 2023, arXiv:2306.05685, section 3): where its
two verdicts differ the answers tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

from tunelet.data.examples import Message, Origin, Tokens
from tunelet.evals import judge_text, preference
from tunelet.evals.judge_text import Request, Rubric, Unread
from tunelet.infer.endpoint import Endpoint, Unanswered

IN_FLIGHT = 8  # requests that an endpoint is asked at once, at most
REPLY_TOKENS = 2048  # of an endpoint's reply: reasoning, and then the verdict

Progress = Callable[[int, int], None]
Pair = tuple[Request, str, str]
Rated = tuple[Request, str, str]  # request, answer, reference ("" where there is none)


@dataclass(frozen=True, slots=True)
class Verdict:
    """place: "A" (the answer that was shown first), "B", "C" (a tie); None where the judge's reply holds no verdict:
    `why` says why, `text` is the reply."""

    place: str | None
    text: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Rating:
    """value: on the rubric's scale; None where the judge's reply holds no score, as in Verdict. mass: of a local judge
    the probability of a reply that begins with any number of the scale."""

    value: float | None
    text: str = ""
    why: str = ""
    mass: float | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """won: 1 for the first answer, 0 for the second, 0.5 for a tie; None where a verdict is missing. verdicts: in this
    order of the answers, and in the other one; none where nobody was asked, because the answers are the same."""

    won: float | None
    verdicts: tuple[Verdict, ...] = ()

    @property
    def consistent(self) -> bool | None:
        """Whether both orders have the same outcome; None where that is not known."""
        if self.won is None or not self.verdicts:
            return None
        return _outcome(self.verdicts[0], False) == _outcome(self.verdicts[1], True)

    @property
    def leaning(self) -> int | None:
        """> 0: the judge named the first place more often than the second; 0: as often; None where it is not known."""
        if self.won is None or not self.verdicts:
            return None
        return sum(_outcome(verdict, False) for verdict in self.verdicts)


class Judge(Protocol):
    """Whoever can be asked. `name` for messages; `written`: whether its replies are read, and so may hold no verdict.
    An item is None where the judge cannot read that much at once."""

    name: str
    written: bool

    def compare(self, pairs: Sequence[Pair], progress: Progress | None = None) -> list[Verdict | None]: ...

    def rate(self, asked: Sequence[Rated], rubric: Rubric, progress: Progress | None = None) -> list[Rating | None]: ...


def _outcome(verdict: Verdict, swapped: bool) -> int:
    """1: for the first answer (not: place), -1: for the second, 0: a tie."""
    named = {"A": 1, "B": -1, "C": 0}[verdict.place or "C"]
    return -named if swapped else named


def by_grade(first: Mapping[str, Any], second: Mapping[str, Any]) -> Judgement:
    """Of two graded items of evals/starter.py: right beats wrong, and of two right answers an exact one the other."""
    a, b = ((item["executed"], item["executed"] and item["exact"]) for item in (first, second))
    return Judgement(0.5 if a == b else float(a > b))


def ask(
    judge: Judge,
    requests: Sequence[Request],
    first: Sequence[str],
    second: Sequence[str],
    *,
    progress: Progress | None = None,
) -> list[Judgement | None]:
    """What the judge says of each pair of answers, in both orders; None where it cannot read that much at once."""
    out: list[Judgement | None] = [Judgement(0.5) if a == b else None for a, b in zip(first, second, strict=True)]
    asked = [place for place, judgement in enumerate(out) if not judgement]
    pairs = [
        (requests[place], *answers)
        for place in asked
        for answers in ((first[place], second[place]), (second[place], first[place]))
    ]
    said = judge.compare(pairs, progress)
    for place, straight, turned in zip(asked, said[0::2], said[1::2], strict=True):
        if straight and turned:
            out[place] = _both(straight, turned)
    return out


def _both(straight: Verdict, turned: Verdict) -> Judgement:
    if straight.place is None or turned.place is None:
        return Judgement(None, (straight, turned))
    one, other = _outcome(straight, False), _outcome(turned, True)
    return Judgement((1 + one) / 2 if one == other else 0.5, (straight, turned))


class LocalJudge:
    """A model on this machine, which writes nothing: what counts is how probable the replies are to it.

    Of two answers it prefers the one whose letter is the more probable. A score is the mean over the scale, weighted by
    the numbers' probabilities (G-Eval, Liu et al. 2023, arXiv:2303.16634, section 2): finer than one number, and the
    same every time.
    """

    written = False

    def __init__(self, engine: Any, name: str):
        self._engine, self.name = engine, name

    def compare(self, pairs: Sequence[Pair], progress: Progress | None = None) -> list[Verdict | None]:
        questions = [judge_text.pair_question(judge_text.LETTER, *pair) for pair in pairs]
        rows = [self._row(question, judge_text.LETTER_PLAIN, ["A", "B"]) for question in questions]
        found = self._scored(rows, progress)
        return [of and Verdict("CAB"[(of[0] > of[1]) - (of[0] < of[1])]) for of in found]

    def rate(self, asked: Sequence[Rated], rubric: Rubric, progress: Progress | None = None) -> list[Rating | None]:
        questions = [judge_text.score_question(judge_text.NUMBER, *one, rubric) for one in asked]
        replies = [str(value) for value in rubric.values]
        rows = [self._row(question, judge_text.NUMBER_PLAIN, replies) for question in questions]
        return [of and _expected(rubric, row, of) for row, of in zip(rows, self._scored(rows, progress), strict=True)]

    def _scored(self, rows: Sequence[Tokens], progress: Progress | None) -> list[list[float] | None]:
        """For each row the log-probabilities of its replies in nats; None for one that is too long."""
        longest = self._engine.max_length
        fit = [place for place, row in enumerate(rows) if not longest or row.branches[0] + _own(row) <= longest]
        found = preference.scores(self._engine.model, [rows[place] for place in fit], progress=progress)
        out: list[list[float] | None] = [None] * len(rows)
        for place, scored in zip(fit, found, strict=True):
            out[place] = [logprob for logprob, _ in scored]
        return out

    def _row(self, question: str, plain: str, replies: Sequence[str]) -> Tokens:
        """The question, a user's message of the chat template (without one: text with `plain` behind it), and each
        reply as a way to go on."""
        tokenizer, renderer = self._engine.tokenizer, self._engine.renderer
        if tokenizer.chat_template:
            ids = list(renderer.prompt([Message("user", question)]))
        else:
            ids, replies = list(renderer.raw(question + plain)), [f" {reply}" for reply in replies]
        asked, starts = len(ids), []
        for reply in replies:
            starts.append(len(ids))
            ids += tokenizer(reply, add_special_tokens=False)["input_ids"]
        mask = (False,) * asked + (True,) * (len(ids) - asked)
        return Tokens(tuple(ids), mask, ((0, len(ids), "text"),), Origin("judge", 1), branches=tuple(starts))


def _own(row: Tokens) -> int:
    """Tokens of the row's longest branch."""
    return max(b - a for a, b in zip(row.branches, (*row.branches[1:], len(row.ids)), strict=True))


def _expected(rubric: Rubric, row: Tokens, logprobs: Sequence[float]) -> Rating:
    """The mean of the scale under the replies' probabilities. Where one number begins with the tokens of another, as 10
    may with those of 1, what the longer one has is not the shorter one's."""
    ends = (*row.branches[1:], len(row.ids))
    replies = [row.ids[a:b] for a, b in zip(row.branches, ends, strict=True)]
    whole = [math.exp(logprob) for logprob in logprobs]
    alone = [
        max(0.0, p - sum(q for other, q in zip(replies, whole, strict=True) if _goes_on(reply, other)))
        for reply, p in zip(replies, whole, strict=True)
    ]
    mass = sum(alone)
    if not mass:  # of numbers too improbable to be told apart
        return Rating(None, why="no number of the scale is a probable reply", mass=0.0)
    return Rating(sum(p * value for p, value in zip(alone, rubric.values, strict=True)) / mass, mass=min(1.0, mass))


def _goes_on(reply: Sequence[int], other: Sequence[int]) -> bool:
    return len(other) == len(reply) + 1 and other[: len(reply)] == reply


class EndpointJudge:
    """An OpenAI-compatible endpoint, which gives a reason and then its verdict; greedy. in_flight: requests at once."""

    written = True

    def __init__(self, endpoint: Endpoint, in_flight: int = IN_FLIGHT):
        self._endpoint, self._in_flight, self.name = endpoint, in_flight, endpoint.name

    def compare(self, pairs: Sequence[Pair], progress: Progress | None = None) -> list[Verdict | None]:
        questions = [judge_text.pair_question(judge_text.VERDICT, *pair) for pair in pairs]
        return [Verdict(*said) for said in self._ask(questions, judge_text.verdict, progress)]

    def rate(self, asked: Sequence[Rated], rubric: Rubric, progress: Progress | None = None) -> list[Rating | None]:
        questions = [judge_text.score_question(judge_text.SCORE, *one, rubric) for one in asked]
        found = self._ask(questions, lambda text: float(judge_text.score(text, rubric)), progress)
        return [Rating(*said) for said in found]

    def _ask(
        self, questions: Sequence[str], read: Callable[[str], Any], progress: Progress | None
    ) -> list[tuple[Any, str, str]]:
        """(what `read` finds or None, the reply, why there is nothing) for each question. Raises TuneletError where the
        endpoint can't be reached or refuses the key."""

        def one(question: str) -> tuple[Any, str, str]:
            text = ""
            try:
                asked = [{"role": "user", "content": question}]
                text = self._endpoint.chat(asked, temperature=0.0, max_tokens=REPLY_TOKENS, seed=0).text
                return read(text), text, ""
            except (Unanswered, Unread) as error:
                return None, text, str(error)

        pool = ThreadPoolExecutor(self._in_flight)
        try:
            waiting = [pool.submit(one, question) for question in questions]
            for done, future in enumerate(as_completed(waiting), 1):
                future.result()  # raises what it raised: the others are then not asked
                if progress:
                    progress(done, len(waiting))
        finally:
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in waiting]

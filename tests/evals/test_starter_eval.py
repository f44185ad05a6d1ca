"""Counting of the starter's items: every metric over the right items, from perfect, silent and stubborn engines."""

from __future__ import annotations

import pytest

from tunelet import starter
from tunelet.evals import starter as evaluation
from tunelet.infer.engine import Completion


class Engine:
    """Answers every prompt with what `speak` says; a prompt's ids are its item's number."""

    max_length = 0

    def __init__(self, rows, speak, stops=True):
        self.rows, self.speak, self.stops = rows, speak, stops
        self.renderer = self
        self.asked = 0

    def prompt(self, messages):
        assert messages[-1].role == "user" and messages[-1].content == self.rows[self.asked]["messages"][-1]["content"]
        self.asked += 1
        return [self.asked - 1]

    def generate(self, prompts, *, max_new_tokens, batch_size, progress=None):
        return [Completion(self.speak(self.rows[i]), (1,), "stop" if self.stops else "length") for (i,) in prompts]


@pytest.fixture(scope="module")
def rows():
    return list(starter.rows("eval", "test", n=20, seed=1))


def values(scored):
    return {name: figure["value"] for name, figure in scored.metrics.items()}


def test_a_perfect_engine(rows):
    scored = evaluation.evaluate(Engine(rows, lambda row: row["expected"]["answer"]), items=20, seed=1)
    assert values(scored) == {
        "executed_match_en": 1, "executed_match_ko": 1, "exact_match_en": 1, "exact_match_ko": 1,
        "stop_rate": 1, "refusal_right": 1, "refusal_false": 0, "other_match": 1, "invented_rate": 0,
    }  # fmt: skip
    assert scored.metrics["executed_match_en"]["n"] == 20
    assert scored.metrics["refusal_right"]["n"] == 12
    assert scored.metrics["refusal_false"]["n"] == 40
    assert scored.metrics["stop_rate"]["n"] == len(rows) == len(scored.items)
    assert scored.metrics["executed_match_en"]["low"] > 0.8
    assert {"item", "answer", "expected", "messages", "language", "type"} <= set(scored.items[0])


def test_engines_that_are_wrong(rows):
    refusal = next(row["expected"]["answer"] for row in rows if row["type"] == "unsupported")
    no = values(evaluation.evaluate(Engine(rows, lambda row: refusal, stops=False), rows=rows))
    assert no["executed_match_en"] == no["executed_match_ko"] == 0
    assert no["refusal_right"] == no["refusal_false"] == 1 and no["stop_rate"] == 0
    silent = values(evaluation.evaluate(Engine(rows, lambda row: ""), rows=rows))
    assert silent["refusal_right"] == silent["refusal_false"] == silent["executed_match_en"] == 0


def test_only_english_is_counted_as_english(rows):
    def speak(row):
        return row["expected"]["answer"] if row["language"] == "en" else "?"

    got = values(evaluation.evaluate(Engine(rows, speak), rows=rows))
    assert got["executed_match_en"] == 1 and got["executed_match_ko"] == 0
    assert got["refusal_right"] == 0.5


def test_executed_but_not_exact(rows):
    commands = [row for row in rows if row["type"] == "command"]
    spaced = Engine(commands, lambda row: row["expected"]["answer"].replace('":', '": '))
    got = values(evaluation.evaluate(spaced, rows=commands))
    assert got["executed_match_en"] == 1 and got["exact_match_en"] == 0
    assert "refusal_right" not in got and "other_match" not in got

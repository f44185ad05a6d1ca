"""Judges: the starter's grading, and a model that is asked in both orders, from fair, biased and undecided ones."""

from __future__ import annotations

import pytest
import torch

from tunelet.data.render import Renderer
from tunelet.evals import judge
from tunelet.evals.judge import Judgement, ask, by_grade
from tunelet.infer.engine import TorchEngine

USER = [{"role": "user", "content": "Which one?"}]


class Engine:
    """Scores the letters with `speak(answer A, answer B)` -> (score of A, score of B)."""

    def __init__(self, speak, max_length=0):
        self.speak, self.max_length, self.model = speak, max_length, self
        self.renderer = self
        self.asked: list[str] = []
        self.tokenizer = self
        self.chat_template = "there is one"

    def prompt(self, messages):
        self.asked.append(messages[0].content)
        return [0] * (1 + messages[0].content.count("long"))

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [{"A": 1, "B": 2}[text]]}


@pytest.fixture
def scored(monkeypatch):
    """`ask` with the log-probabilities that the engine speaks in place of a model's."""

    def scores(engine, rows, progress=None):
        out = []
        for text in engine.asked[-len(rows) :]:
            a, b = text.split("Answer A:\n")[1].split("\n\nWhich")[0].split("\n\nAnswer B:\n")
            out.append(tuple((score, 1) for score in engine.speak(a, b)))
        return out

    monkeypatch.setattr(judge.preference, "scores", scores)


def test_grades():
    def item(executed, exact):
        return {"executed": executed, "exact": exact}

    right, exact, wrong = item(True, False), item(True, True), item(False, False)
    for better, worse in ((right, wrong), (exact, wrong), (exact, right)):
        assert by_grade(better, worse) == Judgement(1.0) and by_grade(worse, better) == Judgement(0.0)
    for same in (right, exact, wrong):
        assert by_grade(same, same) == Judgement(0.5)
    assert by_grade(wrong, item(False, True)) == Judgement(0.5), "what is wrong is not made better by its letters"


def test_a_fair_judge(scored):
    def fair(a, b):
        return (-1.0, -2.0) if len(a) > len(b) else (-2.0, -1.0)

    engine = Engine(fair)
    got = ask(engine, [USER] * 3, ["longer", "x", "same"], ["y", "more", "same"])
    assert got == [Judgement(1.0, False), Judgement(0.0, False), Judgement(0.5, None)]
    assert len(engine.asked) == 4, "two orders of each pair, and nothing of two equal answers"
    assert "Request:\nWhich one?\n" in engine.asked[0]


@pytest.mark.parametrize(("scores", "flipped"), [((0.0, -1.0), True), ((-1.0, 0.0), True), ((-1.0, -1.0), False)])
def test_a_judge_that_looks_at_places_alone(scored, scores, flipped):
    got = ask(Engine(lambda a, b: scores), [USER] * 5, list("abcde"), list("vwxyz"))
    assert got == [Judgement(0.5, flipped)] * 5


def test_an_unsure_order_is_a_tie_and_no_flip(scored):
    got = ask(Engine(lambda a, b: (0.0, -1.0) if a == "good" else (-1.0, -1.0)), [USER], ["good"], ["poor"])
    assert got == [Judgement(0.5, False)]


def test_what_is_too_long_is_left_out(scored):
    got = ask(Engine(lambda a, b: (0.0, -1.0), max_length=4), [USER] * 2, ["a", "long long"], ["b", "c"])
    assert got[0] is not None and got[1] is None


def test_several_turns_are_told_with_their_roles(scored):
    engine = Engine(lambda a, b: (0.0, -1.0))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ask(engine, [turns], ["a"], ["b"])
    assert "Request:\nsystem: Be brief.\nuser: Hi\n" in engine.asked[0]


@pytest.mark.parametrize("plain", [False, True])
def test_letters_are_scored_as_transformers_does(tiny_model, tiny_tokenizer, plain, monkeypatch):
    tokenizer = tiny_tokenizer
    if plain:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    engine = TorchEngine(tiny_model, tokenizer, Renderer(tokenizer), stop_ids=[2])
    row = judge._row(engine, USER, "first", "second")
    start = row.branches[0]
    text = tokenizer.decode(row.ids[:start])
    question = judge.QUESTION.format(request="Which one?", a="first", b="second")
    assert text.endswith(question + judge.PLAIN if plain else "<|im_start|>assistant\n") and question in text
    with torch.no_grad():
        logp = torch.log_softmax(tiny_model(torch.tensor([row.ids[:start]])).logits[0, -1], -1)
    letters = [tokenizer(letter)["input_ids"] for letter in ((" A", " B") if plain else ("A", "B"))]
    from tunelet.models.attention import register

    register()
    tiny_model.set_attn_implementation("tunelet")
    ((a, b),) = judge.preference.scores(tiny_model, [row])
    if all(len(ids) == 1 for ids in letters):
        assert a[0] == pytest.approx(float(logp[letters[0][0]]), abs=1e-4)
        assert b[0] == pytest.approx(float(logp[letters[1][0]]), abs=1e-4)
    assert [a[1], b[1]] == [len(ids) for ids in letters]

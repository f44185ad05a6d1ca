"""Judges: the starter's grading, a local model by probabilities, an endpoint by its words; fair, biased and broken."""

from __future__ import annotations

import math

import chat_server
import pytest
import torch

from tunelet.data.render import Renderer
from tunelet.errors import TuneletError
from tunelet.evals import judge, judge_text
from tunelet.evals.judge import EndpointJudge, Judgement, LocalJudge, Rating, Verdict, ask, by_grade
from tunelet.evals.judge_text import Rubric
from tunelet.infer.endpoint import Endpoint
from tunelet.infer.engine import TorchEngine

USER = [{"role": "user", "content": "Which one?"}]


class Engine:
    """Scores the replies with `speak(question)` -> a log-probability for each."""

    def __init__(self, speak, max_length=0):
        self.speak, self.max_length, self.model = speak, max_length, self
        self.renderer = self.tokenizer = self
        self.asked: list[str] = []
        self.chat_template = "there is one"

    def prompt(self, messages):
        self.asked.append(messages[0].content)
        return [len(self.asked) - 1] * (1 + messages[0].content.count("long"))

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [1000 + ord(sign) for sign in text]}


def answers(text: str) -> list[str]:
    return text.split("Answer A:\n")[1].split("\n\nWhich")[0].split("\n\nAnswer B:\n")


def of_pair(speak):
    return lambda text: speak(*answers(text))


@pytest.fixture
def scored(monkeypatch):
    """The log-probabilities that the engine speaks in place of a model's; the first token says which question it is."""

    def scores(engine, rows, progress=None):
        return [tuple((logp, 1) for logp in engine.speak(engine.asked[row.ids[0]])) for row in rows]

    monkeypatch.setattr(judge.preference, "scores", scores)


@pytest.fixture
def server(loopback):
    found = chat_server.ChatServer(loopback, lambda question, body: "[[A]]")
    yield found
    found.close()


def test_grades():
    def item(executed, exact):
        return {"executed": executed, "exact": exact}

    right, exact, wrong = item(True, False), item(True, True), item(False, False)
    for better, worse in ((right, wrong), (exact, wrong), (exact, right)):
        assert by_grade(better, worse) == Judgement(1.0) and by_grade(worse, better) == Judgement(0.0)
    for same in (right, exact, wrong):
        assert by_grade(same, same) == Judgement(0.5)
    assert by_grade(wrong, item(False, True)) == Judgement(0.5), "what is wrong is not made better by its letters"


# -- a local model ----------------------------------------------------------------------------------------------------


def test_a_fair_judge(scored):
    engine = Engine(of_pair(lambda a, b: (-1.0, -2.0) if len(a) > len(b) else (-2.0, -1.0)))
    got = ask(LocalJudge(engine, "j"), [USER] * 3, ["longer", "x", "same"], ["y", "more", "same"])
    assert [one.won for one in got] == [1.0, 0.0, 0.5]
    assert [one.consistent for one in got] == [True, True, None] and [one.leaning for one in got] == [0, 0, None]
    assert [verdict.place for verdict in got[0].verdicts] == ["A", "B"]
    assert len(engine.asked) == 4, "two orders of each pair, and nothing of two equal answers"
    assert "Request:\nWhich one?\n" in engine.asked[0]


@pytest.mark.parametrize(
    ("scores", "leaning", "consistent"), [((0.0, -1.0), 2, False), ((-1.0, 0.0), -2, False), ((-1.0, -1.0), 0, True)]
)
def test_a_judge_that_looks_at_places_alone(scored, scores, leaning, consistent):
    got = ask(LocalJudge(Engine(lambda text: scores), "j"), [USER] * 5, list("abcde"), list("vwxyz"))
    assert [(one.won, one.leaning, one.consistent) for one in got] == [(0.5, leaning, consistent)] * 5


def test_an_unsure_order_is_a_tie(scored):
    engine = Engine(of_pair(lambda a, b: (0.0, -1.0) if a == "good" else (-1.0, -1.0)))
    (got,) = ask(LocalJudge(engine, "j"), [USER], ["good"], ["poor"])
    assert (got.won, got.consistent, got.leaning) == (0.5, False, 1)


def test_what_is_too_long_is_left_out(scored):
    engine = Engine(lambda text: (0.0, -1.0), max_length=4)
    got = ask(LocalJudge(engine, "j"), [USER] * 2, ["a", "long long long"], ["b", "c"])
    assert got[0] is not None and got[1] is None
    assert LocalJudge(engine, "j").rate([(USER, "long long long", "")], Rubric()) == [None]


def test_several_turns_are_told_with_their_roles(scored):
    engine = Engine(lambda text: (0.0, -1.0))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ask(LocalJudge(engine, "j"), [turns], ["a"], ["b"])
    assert "Request:\nsystem: Be brief.\nuser: Hi\n" in engine.asked[0]


def test_a_score_is_the_mean_of_the_scale(scored):
    # "1" is where "10" begins: of its 0.5 the longer number has 0.3. 0.1 of the mass goes elsewhere.
    whole = {"1": 0.5, "10": 0.3, "4": 0.4}
    engine = Engine(lambda text: [math.log(whole.get(str(value), 1e-12)) for value in range(1, 11)])
    (got,) = LocalJudge(engine, "j").rate([(USER, "an answer", "the reference")], Rubric())
    assert got.value == pytest.approx((0.2 * 1 + 0.3 * 10 + 0.4 * 4) / 0.9, abs=1e-6)
    assert got.mass == pytest.approx(0.9) and not got.why and not got.text
    assert "an answer" in engine.asked[0] and "the reference" in engine.asked[0]
    nothing = Engine(lambda text: [-2000.0] * 10)
    assert LocalJudge(nothing, "j").rate([(USER, "a", "")], Rubric())[0].value is None


@pytest.mark.parametrize("plain", [False, True])
def test_replies_are_scored_as_transformers_does(tiny_model, tiny_tokenizer, plain, monkeypatch):
    tokenizer = tiny_tokenizer
    if plain:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    engine = TorchEngine(tiny_model, tokenizer, Renderer(tokenizer), stop_ids=[2])
    asked, rubric, values = LocalJudge(engine, "j"), Rubric(), range(1, 11)
    question = judge_text.score_question(judge_text.NUMBER, USER, "It is 12.", "", rubric)
    row = asked._row(question, judge_text.NUMBER_PLAIN, [str(value) for value in values])
    start = row.branches[0]
    text = tokenizer.decode(row.ids[:start])
    assert question in text
    assert text.endswith(question + judge_text.NUMBER_PLAIN if plain else "<|im_start|>assistant\n")

    def probability(reply: str) -> float:
        ids = tokenizer(f" {reply}" if plain else reply)["input_ids"]
        with torch.no_grad():
            logp = torch.log_softmax(tiny_model(torch.tensor([[*row.ids[:start], *ids]])).logits[0].double(), -1)
        return math.exp(sum(float(logp[start - 1 + n, token]) for n, token in enumerate(ids)))

    alone = {value: probability(str(value)) for value in values}
    alone[1] -= alone[10]  # this tokenizer writes 10 as 1 and 0
    expected = sum(value * p for value, p in alone.items()) / sum(alone.values())
    pair = (USER, "first", "second")
    letters = [
        probability(letter)
        for letter in "AB"
        for row in [asked._row(judge_text.pair_question(judge_text.LETTER, *pair), judge_text.LETTER_PLAIN, ["A", "B"])]
        for start in [row.branches[0]]
    ]
    from tunelet.models.attention import register

    register()
    tiny_model.set_attn_implementation("tunelet")
    ((got, again),) = [asked.rate([(USER, "It is 12.", "")] * 2, rubric)]
    assert got.value == pytest.approx(expected, abs=1e-4) and got.mass == pytest.approx(sum(alone.values()), rel=1e-3)
    assert again.value == pytest.approx(got.value, abs=1e-5)
    (said,) = asked.compare([pair])
    assert said.place == ("A" if letters[0] > letters[1] else "B")


# -- an endpoint ------------------------------------------------------------------------------------------------------


def test_an_endpoint_that_reads(server):
    def longer(question, body):
        a, b = answers(question)
        return f"It says more.\n[[{'A' if len(a) > len(b) else 'B'}]]"

    server.script = longer
    seen: list[tuple[int, int]] = []
    asked = EndpointJudge(Endpoint(server.url))
    got = ask(asked, [USER] * 3, ["longer", "x", "same"], ["y", "more", "same"], progress=lambda *n: seen.append(n))
    assert [one.won for one in got] == [1.0, 0.0, 0.5]
    assert got[0].verdicts == (Verdict("A", "It says more.\n[[A]]"), Verdict("B", "It says more.\n[[B]]"))
    assert len(server.asked) == 4 and seen[-1] == (4, 4)
    assert all(body["temperature"] == 0 and body["seed"] == 0 for _, body, _ in server.asked)


@pytest.mark.parametrize(
    "said", ["", "I can't say.", "[[A]] and [[B]]", "[[D]]", "score: 11/10", (500, "down"), (200, b"no JSON"), None]
)
def test_no_verdict_is_no_win_and_no_tie(server, said):
    server.script = lambda question, body: said if answers(question)[0] == "bad" else "[[A]]"
    (got,) = ask(EndpointJudge(Endpoint(server.url)), [USER], ["bad"], ["x"])
    assert got.won is None and got.consistent is None and got.leaning is None
    assert got.verdicts[0].place is None and got.verdicts[0].why
    assert got.verdicts[0].text == (said if isinstance(said, str) else "")
    assert got.verdicts[1].place == "A"


def test_scores_of_an_endpoint(server):
    said = {"good": "Fine.\n[[9]]", "odd": "score: 11/10", "high": "[[11]]", "nan": "[[NaN]]", "gone": (500, "")}
    server.script = lambda question, body: said[question.split("Answer:\n")[1].split("\n")[0]]
    got = EndpointJudge(Endpoint(server.url)).rate([(USER, answer, "") for answer in said], Rubric())
    assert got[0] == Rating(9.0, "Fine.\n[[9]]")
    assert [one.value for one in got[1:]] == [None] * 4 and all(one.why for one in got[1:])
    assert got[2].text == "[[11]]"


def test_what_is_final_stops_the_rest(server):
    server.script = lambda question, body: (401, "")
    pairs = [(USER, str(n), "b") for n in range(200)]
    with pytest.raises(TuneletError, match="answered 401"):
        EndpointJudge(Endpoint(server.url), 2).compare(pairs)
    assert len(server.asked) < 100, "the others were still asked"


def test_no_more_than_so_many_at_once(server):
    import threading

    lock, now, most = threading.Lock(), [0], [0]

    def slow(question, body):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.02)
        with lock:
            now[0] -= 1
        return "[[C]]"

    server.script = slow
    EndpointJudge(Endpoint(server.url), 3).compare([(USER, str(n), "b") for n in range(12)])
    assert 1 < most[0] <= 3

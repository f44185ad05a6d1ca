"""Questions to score: the rows they are read from, answers turn by turn, and means over turns and categories."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunelet.data.examples import Message, Origin
from tunelet.errors import TuneletError
from tunelet.evals import judge_rows, judge_score
from tunelet.evals.judge import Rating
from tunelet.evals.judge_rows import Question
from tunelet.evals.judge_text import Rubric
from tunelet.evals.stats import wilson


def file_of(folder: Path, *rows, name: str = "rows.jsonl") -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def mt_bench_rows() -> list[dict]:
    """In the form of FastChat's files, the words our own."""
    return [
        {"question_id": 1, "category": "math", "turns": ["What is 3 + 4?", "And twice that?"]},
        {"question_id": 2, "category": "writing", "turns": ["Name a colour.", "Now in capitals."]},
        {
            "question_id": 3,
            "category": "math",
            "turns": ["What is 2 * 5?", "And half of it?"],
            "reference": ["10", "5"],
        },
    ]


REFERENCES = [{"question_id": 1, "answer_id": "x", "model_id": "m", "choices": [{"index": 0, "turns": ["7", "14"]}]}]


def question(item: str, *turns: str, category: str = "", references=()) -> Question:
    return Question(item, turns, Origin("f", 1), category=category, references=references)


# -- rows -------------------------------------------------------------------------------------------------------------


def test_every_kind_of_row(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    file = file_of(
        tmp_path,
        {"question_id": 81, "category": "writing", "turns": ["One", "Two"], "reference": ["1", "2"]},
        {"prompt": ["One", "Two"], "category": "math", "reference": []},
        {"prompt": "Hi", "completion": "Hello", "category": "talk"},
        {"prompt": "Hi"},
        {"question": "Hi", "reference": "Hello"},
        {"messages": [system, user, answer, user, answer]},
        {"messages": [system, user]},
        {"instruction": "Say", "input": "it", "output": "it"},
    )
    got = judge_rows.read([file])
    assert [one.turns for one in got] == [("One", "Two")] * 2 + [("Hi",)] * 5 + [("Say\n\nit",)]
    assert [one.references for one in got[:5]] == [("1", "2"), (), ("Hello",), (), ("Hello",)]
    assert [one.category for one in got[:4]] == ["writing", "math", "talk", ""]
    assert [one.item for one in got[:2]] == ["question/81", "question/1"]
    assert [turn.role for turn in got[5].before] == ["system", "user", "assistant"] and got[5].reference(0) == "Hello"
    assert got[6].before == (Message("system", "Be brief."),) and got[6].reference(0) == ""
    assert len(judge_rows.read([file, file], limit=9)) == 9
    assert judge_rows.read([file_of(tmp_path, {"Q": "Hi", "A": "Yo"}, name="q.jsonl")],
                           columns={"prompt": "Q", "completion": "A"})[0].references == ("Yo",)  # fmt: skip


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"turns": []}, "'turns' is no list of texts"),
        ({"turns": ["Hi", 5]}, "'turns' is no list of texts"),
        ({"turns": ["Hi", " "]}, "a turn is empty"),
        ({"turns": ["Hi"], "reference": [1]}, "'reference' is no list of texts"),
        ({"other": 1}, "no known format"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "line 2"),
        ("plain text", "line 2"),
        ({"text": "plain text"}, "the row is plain text"),
    ],
)
def test_rows_that_cannot_be_asked(tmp_path, row, told):
    file = file_of(tmp_path, {"prompt": "Hi"}, row)
    with pytest.raises(TuneletError, match="1 rows can't be asked") as error:
        judge_rows.read([file])
    assert told in str(error.value) and "line 2" in str(error.value)


def test_mt_bench_of_a_folder_and_of_files(tmp_path):
    questions = file_of(tmp_path, *mt_bench_rows(), name="question.jsonl")
    references = file_of(tmp_path, *REFERENCES, name="reference_answer/gpt-4.jsonl")
    file_of(tmp_path, {"name": "pair-v2", "type": "pairwise"}, name="judge_prompts.jsonl")
    for data in ([str(tmp_path)], [questions, references]):
        got = judge_rows.mt_bench(data)
        assert [one.references for one in got] == [("7", "14"), (), ("10", "5")]
        assert [one.category for one in got] == ["math", "writing", "math"]
    assert [one.references for one in judge_rows.mt_bench([questions])] == [(), (), ("10", "5")]
    assert len(judge_rows.mt_bench([questions], limit=2)) == 2


def test_mt_bench_without_its_rows(tmp_path):
    with pytest.raises(TuneletError, match="where are the questions"):
        judge_rows.mt_bench([])
    with pytest.raises(TuneletError, match=r"holds no mt_bench_question\.jsonl"):
        judge_rows.mt_bench([str(tmp_path)])
    with pytest.raises(TuneletError, match="has one turn"):
        judge_rows.mt_bench([file_of(tmp_path, {"prompt": "Hi"})])
    with pytest.raises(TuneletError, match="no reference answer"):
        judge_rows.mt_bench([file_of(tmp_path, *mt_bench_rows()), file_of(tmp_path, {"a": 1}, name="r.jsonl")])


def test_the_published_file_as_it_is(shared):
    got = judge_rows.mt_bench([str(shared / "eval-mtbench")])
    assert len(got) == 80 and all(len(one.turns) == 2 for one in got)
    assert len({one.category for one in got}) == 8
    assert sum(bool(one.references) for one in got) == 40, "30 of the file, 10 of the rows alone"
    own = judge_rows.mt_bench([str(shared / "eval-mtbench" / "mt_bench_question.jsonl")])
    assert own[20].reference(0) == "You are in second place." != got[20].reference(0), "the file's come before them"


# -- answers ----------------------------------------------------------------------------------------------------------


class Talker:
    """Answers "reply to LAST" and keeps what it was asked."""

    def __init__(self, max_length=0):
        self.max_length, self.renderer, self.asked = max_length, self, []

    def prompt(self, messages):
        self.asked.append([(message.role, message.content) for message in messages])
        return [len(self.asked) - 1] * sum(len(message.content.split()) for message in messages)

    def generate(self, prompts, *, max_new_tokens, batch_size, progress):
        progress and progress(len(prompts))
        texts = [f"reply to {self.asked[ids[0]][-1][1]}" for ids in prompts]
        return [SimpleNamespace(text=text, stopped=True, ids=(1, 2)) for text in texts]


def test_the_second_turn_stands_behind_the_models_own_first_answer():
    engine, seen = Talker(), []
    asked = [question("q/1", "One", "Two", references=("1",)), question("q/2", "Alone")]
    got = judge_score.answers(engine, asked, max_new_tokens=5, batch_size=2, progress=lambda *n: seen.append(n))
    assert [(row["item"], row["turn"], row["answer"], row["reference"]) for row in got] == [
        ("q/1", 1, "reply to One", "1"), ("q/2", 1, "reply to Alone", ""), ("q/1", 2, "reply to Two", ""),
    ]  # fmt: skip
    assert engine.asked[2] == [("user", "One"), ("assistant", "reply to One"), ("user", "Two")]
    assert [turn["role"] for turn in got[2]["messages"]] == ["user", "assistant", "user"]
    assert [len(row["messages"]) for row in got] == [1, 1, 3], "what was asked then, not what came later"
    assert seen == [(2, 3), (3, 3)] and judge_score.left_out(asked, got) == 0


def test_a_conversation_ends_where_the_model_reads_no_further():
    asked = [question("q/1", "One", "Two", "Three"), question("q/2", "A very long first turn", "Two")]
    got = judge_score.answers(Talker(max_length=6), asked, max_new_tokens=5, batch_size=2)
    assert [(row["item"], row["turn"]) for row in got] == [("q/1", 1), ("q/2", 1), ("q/1", 2)][: len(got)]
    assert judge_score.left_out(asked, got) == 5 - len(got) > 0


class Scripted:
    name = "scripted"

    def __init__(self, ratings, written=True):
        self.ratings, self.written = ratings, written

    def rate(self, asked, rubric, progress=None):
        self.asked = asked
        return self.ratings


def row(item, turn=1, category="", score=None, **more):
    return {"item": item, "turn": turn, "category": category, "answer": item, "messages": [{"role": "user"}],
            "reference": "ref", "score": score, **more}  # fmt: skip


def test_no_score_is_none_and_never_a_number():
    judge = Scripted([Rating(7.0, "[[7]]"), Rating(None, "score: 11/10", "no verdict"), None])
    got = judge_score.score(judge, [row("a"), row("b"), row("c")], Rubric())
    assert [one["score"] for one in got] == [7.0, None, None]
    assert "why" not in got[0] and got[1]["why"] == "no verdict" and "longer" in got[2]["why"]
    assert [one["judge_text"] for one in got] == ["[[7]]", "score: 11/10", ""]
    assert judge.asked[0] == ([{"role": "user"}], "a", "ref")
    figures = judge_score.metrics(got, Rubric())
    assert figures["score"]["value"] == 7.0 and figures["score"]["n"] == 1
    assert figures["judge_unparsed"] == wilson(2, 3).as_dict()
    local = judge_score.score(Scripted([Rating(6.5, mass=0.9)], written=False), [row("a")], Rubric())
    assert local[0]["judge_mass"] == 0.9 and "judge_unparsed" not in judge_score.metrics(local, Rubric())


def test_means_by_turn_and_category():
    scored = [
        row("a", 1, "math", 4.0), row("a", 2, "math", 2.0), row("b", 1, "writing", 9.0), row("b", 2, "writing", 7.0),
        row("c", 1, "math", 6.0), row("c", 2, "math", None),
    ]  # fmt: skip
    got = judge_score.metrics(scored, Rubric())
    assert got["score"]["value"] == pytest.approx(28 / 5) and got["score"]["n"] == 3, "questions are what is resampled"
    assert got["score_turn_1"]["value"] == pytest.approx(19 / 3) and got["score_turn_2"]["value"] == 4.5
    assert got["score_category_math"]["value"] == 4.0 and got["score_category_writing"]["value"] == 8.0
    assert got["score"]["low"] <= got["score"]["value"] <= got["score"]["high"]
    assert got["judge_unparsed"]["value"] == pytest.approx(1 / 6)
    one_turn = judge_score.metrics([row("a", score=4.0), row("b", score=6.0)], Rubric())
    assert set(one_turn) == {"score"}, "no turns and categories where there are none"
    assert judge_score.metrics([row("a")], Rubric()).keys() == {"judge_unparsed"}


def test_the_same_score_every_time_is_no_certainty_and_is_said():
    scored = [row(str(n), score=7.0) for n in range(20)]
    got = judge_score.metrics(scored, Rubric())["score"]
    unseen = wilson(0, 20).high
    assert got["value"] == 7.0
    assert got["high"] == pytest.approx(7 + 3 * unseen) and got["low"] == pytest.approx(7 - 6 * unseen)
    (note,) = judge_score.notes(scored)
    assert "the same score, 7" in note and "tell nothing" in note
    assert not judge_score.notes([*scored, row("x", score=3.0)])
    assert not judge_score.notes([row("a", score=7.0)])


def test_a_judge_that_would_rather_say_something_else():
    few = [row("a", score=4.0, judge_mass=0.01), row("b", score=6.0, judge_mass=0.2)]
    assert "improbable" in judge_score.notes(few)[0]
    assert not judge_score.notes([row("a", score=4.0, judge_mass=0.9), row("b", score=6.0, judge_mass=0.8)])

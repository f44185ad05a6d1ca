"""What is read out of a judge's words: a verdict where there is exactly one, and never anything else."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunelet.errors import TuneletError
from tunelet.evals import judge_text
from tunelet.evals.judge_text import Rubric, Unread

REFUSAL = "I'm sorry, but as an AI I can't compare these answers."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[A]]", "A"),
        ("Answer B is right, A is not.\n\n[[B]]\n", "B"),
        ("Both do.\n**[[C]]**", "C"),
        ("It is short.\nFinal verdict: [[A]].", "A"),
        ("**Verdict:** [[ B ]]", "B"),
        ("<think>[[B]]? No.\n[[A]]</think>\nBecause.\n[[B]]", "B"),
        ("left to the template</think>[[A]]", "A"),
        ("I lean to [[A]].\n[[A]]", "A"),
        ("둘 다 맞지만 A가 더 짧습니다.\n[[A]]", "A"),
    ],
)
def test_verdicts(text, expected):
    assert judge_text.verdict(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        (" \n\u2028 ", "empty"),
        (REFUSAL, "no verdict"),
        ("A", "no verdict"),
        ("The better answer is A.", "no verdict"),
        ("[[A]]\n[[B]]", "several"),
        ("[[A]] or [[B]]", "several"),
        ("Write [[A]], [[B]] or [[C]].\n[[A]]", "several"),
        ("[[A]]\nBut on second thought I am not sure.", "no verdict on the last line"),
        ("The answer is not [[A]]", "no verdict on the last line"),
        ("Not at all: [[A]]", "no verdict on the last line"),
        ("[A]", "no verdict"),
        ("[[[A]]]", "no verdict"),
        ("[[A]", "no verdict"),
        ("[[a]]", "neither"),
        ("[[D]]", "neither"),
        ("[[AB]]", "neither"),
        ("[[]]", "neither"),
        ("[[tie]]", "neither"),
        ("[[7]]", "neither"),
        ("[[А]]", "neither"),  # a Cyrillic А
        ('{"verdict": "A"}', "no verdict"),
        ('{"verdict": ["A"]}', "no verdict"),
        ("<think>It may be\n[[A]]", "broke off"),
        ("<think>Long.</think>", "empty"),
    ],
)
def test_what_is_no_verdict(text, why):
    with pytest.raises(Unread, match=why):
        judge_text.verdict(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("[[1]]", 1), ("Good.\n[[10]]", 10), ("Rating: [[7]]", 7), ("**Score**: [[ 3 ]]", 3)]
)
def test_scores(text, expected):
    assert judge_text.score(text, Rubric()) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        (REFUSAL, "no verdict"),
        ("score: 11/10", "no verdict"),
        ("8/10", "no verdict"),
        ("8", "no verdict"),
        ("[[11]]", "not on the scale"),
        ("[[0]]", "not on the scale"),
        ("[[-3]]", "not on the scale"),
        ("[[8/10]]", "no whole number"),
        ("[[7.5]]", "no whole number"),
        ("[[1e1]]", "no whole number"),
        ("[[NaN]]", "no whole number"),
        ("[[inf]]", "no whole number"),
        ("[[seven]]", "no whole number"),
        ("[[٧]]", "no whole number"),
        ("[[７]]", "no whole number"),
        ("[[A]]", "no whole number"),
        ("[[99999999999999999999]]", "no whole number"),
        ("[[6]]\n[[7]]", "several"),
        ("[[10]] for style, but overall:\n[[4]]", "several"),
        ('{"score": "high"}', "no verdict"),
        ('{"score": [7]}', "no verdict"),
        ("[[N]]", "no whole number"),
    ],
)
def test_what_is_no_score(text, why):
    with pytest.raises(Unread, match=why):
        judge_text.score(text, Rubric())


def test_another_scale():
    assert judge_text.score("[[0]]", Rubric(low=0, high=3)) == 0
    with pytest.raises(Unread, match="from 0 to 3"):
        judge_text.score("[[4]]", Rubric(low=0, high=3))


pieces = st.lists(
    st.sampled_from(
        ["[[", "]]", "A", "B", "C", "7", "10", "11", "\n", " ", "**", "Rating:", ".", "<think>", "</think>"]
    )
    | st.text(max_size=5)
).map("".join)


@given(pieces | st.text())
def test_nothing_but_a_verdict_is_one(text):
    """Whatever a judge writes: a value comes back only where it stands alone in brackets on the last line, and no
    other does after the thinking."""
    for read, allowed in (
        (judge_text.verdict, ["A", "B", "C"]),
        (lambda t: judge_text.score(t, Rubric()), range(1, 11)),
    ):
        try:
            found = read(text)
        except Unread:
            continue
        assert found in allowed
        said = text.rpartition("</think>")[2].strip()
        assert {value.strip() for value in re.findall(r"\[\[([^\[\]]*)\]\]", said)} == {str(found)}
        assert f"{found}" in said.splitlines()[-1] and "]]" in said.splitlines()[-1]
        assert "<think>" not in said


@given(st.sampled_from("ABC"), st.text(alphabet=st.characters(exclude_characters="[]<>", exclude_categories=["Cs"])))
def test_a_reason_does_not_hide_the_verdict(letter, reason):
    assert judge_text.verdict(f"{reason}\n[[{letter}]]") == letter


def test_questions_hold_what_is_asked_and_no_braces_break_them():
    request = [{"role": "user", "content": "What is {x}?"}]
    text = judge_text.pair_question(judge_text.VERDICT, request, "{a}", "{b}")
    assert "Request:\nWhat is {x}?\n" in text and "Answer A:\n{a}\n" in text and "Answer B:\n{b}\n" in text
    rubric = Rubric("Is it {polite}?", 0, 3)
    text = judge_text.score_question(judge_text.SCORE, request, "{}", "It is 3.", rubric)
    assert "Is it {polite}?" in text and "from 0 to 3" in text and "to compare with:\nIt is 3.\n" in text
    bare = judge_text.score_question(judge_text.NUMBER, request, "{}", "", rubric)
    assert "compare with" not in bare and bare.endswith("Reply with the number alone.")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("polite.txt", "Is it polite?\n", Rubric("Is it polite?")),
        ("polite.toml", 'criteria = "Is it polite?"\nscale = [0, 4]\n', Rubric("Is it polite?", 0, 4)),
        ("usual.toml", 'criteria = "Is it polite?"', Rubric("Is it polite?", 1, 10)),
    ],
)
def test_rubrics(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert judge_text.read_rubric(tmp_path / name) == expected
    assert judge_text.read_rubric(None) == Rubric()


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("r.toml", 'criterion = "x"', "Did you mean 'criteria'"),
        ("r.toml", "scale = [1, 5]", "no criteria"),
        ("r.toml", 'criteria = " "', "no criteria"),
        ("r.txt", "\n", "no criteria"),
        ("r.toml", "criteria = 5", "no criteria"),
        ("r.toml", "criteria =", "not TOML"),
        ("r.txt", b"\xff\xfe\xfa", "not UTF-8"),
        *[("r.toml", f'criteria = "x"\nscale = {scale}', "scale") for scale in
          ("[5, 1]", "[1, 1]", "[1, 2.5]", "[-1, 3]", "[0, 200]", "5", '["a", "b"]', "[true, 5]", "[1, 2, 3]")],
        ("none.toml", None, "no such file"),
    ],
)  # fmt: skip
def test_bad_rubrics(tmp_path, name, text, what):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(TuneletError, match=what) as error:
        judge_text.read_rubric(tmp_path / name)
    assert error.value.fix

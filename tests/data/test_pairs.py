"""Pairs and verdicts in the writings of the wild: scores, ratings, lists of rejected answers, shared turns, words."""

# ruff: noqa: E501  -- tables of rows, one a line

from __future__ import annotations

import json
import math

import pytest
from hypothesis import example as tried
from hypothesis import given, settings
from hypothesis import strategies as st

from tunelet.data import formats, pairs, scores
from tunelet.data.convert import row_of
from tunelet.data.examples import Finding, Labelled, Message, Origin, Preference
from tunelet.data.shapes import Bad

HERE = Origin("rows.jsonl", 7)
PAIR = ((Message("user", "Hi?"),), (Message("assistant", "Good."),), (Message("assistant", "Bad."),))


def convert(row, want="preference", **options):
    return formats.row_to_example(row, HERE, want, **options)


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


def rated(key, *values, text="response"):
    return [{text: name, key: value} for name, value in zip(("Bad.", "Good.", "Fair."), values, strict=False)]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi?", "completions": rated("overall_score", 2, 9.5, 4), "source": "x"},
        {"instruction": "Hi?", "completions": json.dumps(rated("overall_score", 2, 9.5, 4))},
        {"prompt": "Hi?", "completions": rated("score", "1", "3", "2.5", text="text")},
        {"prompt": "Hi?", "responses": rated("rating", -1, 0.5, None, text="content")},
        {"prompt": "Hi?", "responses": rated("rating", 1, 5, "N/A")},
        {"question": "Hi?", "answers": rated("score", 1, 2, 2, text="answer")},  # of equal ones the first
        {"prompt": "Hi?", "responses": ["Bad.", "Good.", "Fair."], "scores": [1, 3, 2]},
        {"instruction": "Hi?", "generations": ["Bad.", "Good."], "ratings": ["1", "5"]},
        {"prompt": "Hi?", "responses": rated("rating", 4, 5), "scores": [1, 3]},
        {"prompt": [user("Hi?")], "completions": [{"response": [answer("Good.")], "score": 2}, {"response": "Bad.", "score": 1}]},
        {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad.", "score_chosen": 9, "score_rejected": 1},
        {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad.", "chosen-rating": "4.5", "rejected-rating": 4},
        {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad.", "score_chosen": None, "score_rejected": 1},
        {"prompt": "Hi?", "chosen": "Good.", "rejected": ["Bad."]},
        {"prompt": "Hi?", "chosen": "Good.", "rejected": [[answer("Bad.")]]},
        {"input": "Hi?", "output_1": "Bad.", "output_2": "Good.", "preference": 2.0},
        {"input": "Hi?", "output_1": "Bad.", "output_2": "Good.", "label": "output_2"},
        {"prompt": "Hi?", "chosen": [user("Hi?"), answer("Good.")], "rejected": "Bad."},
    ],
)  # fmt: skip
def test_writings_of_one_pair(row):
    made = convert(row)
    assert isinstance(made, Preference), made
    assert (made.prompt, made.chosen, made.rejected) == PAIR
    assert row_of(convert(row_of(made))) == row_of(made)
    assert convert(row, "chat").kind == "preference_row"
    both = [example for _, example in formats._examples(row, HERE, "labelled", "auto", {}, "")]
    assert both == [Labelled(PAIR[0], PAIR[1], True, HERE), Labelled(PAIR[0], PAIR[2], False, HERE)]


def test_a_list_of_rejected_answers_is_as_many_pairs(tmp_path):
    rows = [
        {"Prompt": "Hi?", "Chosen": "Good.", "Rejected": ["Bad.", [user("Hi?"), answer("Worse.")], ""]},
        {"prompt": "Hi?", "chosen": "Fine.", "rejected": [user("Hi?"), answer("Bad.")]},  # messages of one answer
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    loaded = formats.load([str(path)], want="preference")
    assert loaded.counts.as_dict() == {"rows_in": 4, "examples_out": 3, "dropped": {"empty_answer": 1}}
    assert [example.rejected[-1].content for example in loaded.examples] == ["Bad.", "Worse.", "Bad."]
    assert [example.origin.line for example in loaded.examples] == [1, 1, 2]
    labelled = formats.load([str(path)], want="labelled")
    told = [(example.completion[-1].content, example.label) for example in labelled.examples]
    # the chosen answer of the first row is judged once
    assert told == [("Good.", True), ("Bad.", False), ("Worse.", False), ("Fine.", True), ("Bad.", False)]
    assert labelled.counts.as_dict() == {"rows_in": 6, "examples_out": 5, "dropped": {"empty_answer": 1}}
    assert convert(rows[0]).kind == "several_examples"
    # the limit is one of rows in the file, whatever they become
    assert len(formats.load([str(path), str(path)], want="preference", limit=3).examples) == 5


SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    "row,prompt",
    [
        ({"prompt": [SYSTEM, user("Hi?")], "chosen": [user("Hi?"), answer("Good.")], "rejected": [user("Hi?"), answer("Bad.")]}, ["Be kind.", "Hi?"]),
        ({"prompt": "Hi?", "chosen": [SYSTEM, user("Hi?"), answer("Good.")], "rejected": [SYSTEM, user("Hi?"), answer("Bad.")]}, ["Be kind.", "Hi?"]),
        ({"prompt": "And?", "chosen": [user("Hi?"), answer("Yes."), user("And?"), answer("Good.")], "rejected": [user("Hi?"), answer("Yes."), user("And?"), answer("Bad.")]}, ["Hi?", "Yes.", "And?"]),
        ({"prompt": "Hi?", "chosen": [answer("Yes."), user("And?"), answer("Good.")], "rejected": [answer("Yes."), user("And?"), answer("Bad.")]}, ["Hi?", "Yes.", "And?"]),
        ({"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad.", "system": "Be kind."}, ["Be kind.", "Hi?"]),
    ],
)  # fmt: skip
def test_no_turn_of_a_prompt_is_lost_or_doubled(row, prompt):
    made = convert(row)
    assert [message.content for message in made.prompt] == prompt
    assert (made.chosen, made.rejected) == PAIR[1:]


@pytest.mark.parametrize(
    "words,meant",
    [
        (
            (
                True,
                1,
                1.0,
                "1",
                "+1",
                "TRUE",
                " yes ",
                "Thumbs_Up",
                "thumbs-up",
                "👍",
                "👍️",
                "desirable",
                "예",
                "좋아요",
            ),
            True,
        ),
        ((False, 0, -1, "0.0", "-1", "False", "NO", "thumbs down", "👎", "undesirable", "rejected", "아니요"), False),
    ],
)
def test_words_that_are_verdicts(words, meant):
    for word in words:
        assert convert({"prompt": "Hi?", "completion": "Good.", "label": word}, "labelled").label is meant, word
    assert not pairs.GOOD & pairs.POOR


def test_a_word_is_a_verdict_only_where_verdicts_are_asked_for():
    row = {"prompt": "Hi?", "completion": "Good.", "label": "good"}
    assert not isinstance(convert(row, "chat"), Finding)  # a class, perhaps; "true" is refused
    assert convert({**row, "label": "true"}, "chat").kind == "labelled_row"


@pytest.mark.parametrize(
    "text", ["7,5", "1,000", "1_0", "8/10", "4 stars", "80%", "0x1f", "１", "½", "1e999", "inf", "--1", "."]
)
def test_scores_that_could_be_read_in_two_ways_are_refused(text):
    assert scores.number(text) is None
    with pytest.raises(Bad) as raised:
        scores.score(text, "'score'")
    assert raised.value.kind == "bad_score" and text in str(raised.value) and raised.value.fix


# Properties --------------------------------------------------------------------------------------------------------

odd = st.text(max_size=8) | st.text("0123456789.,+-eE_/ nainf%", max_size=6) | st.none() | st.booleans()
odd |= st.integers() | st.floats() | st.lists(st.integers(), max_size=2)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**6), 10**6)


@settings(max_examples=200, deadline=None)
@given(numbers)
def test_numbers_are_read_as_they_are_written(value):
    assert scores.number(value) == scores.number(repr(value)) == scores.number(f" {value!r}\n") == float(value)
    assert scores.score(str(value), "x") == float(str(value))


@settings(max_examples=300, deadline=None)
@given(odd)
@tried("0\x1f")
def test_what_is_no_number_is_never_taken_for_one(value):
    found = scores.number(value)
    assert found is None or (math.isfinite(found) and not isinstance(value, bool))
    if isinstance(value, str) and set(value) & set(",_/%"):
        assert found is None  # 7,5 and 8/10 and 1_0 can be read in two ways
    try:
        assert scores.score(value, "the score") == found
    except Bad as bad:
        assert bad.kind == "bad_score" and found is None and "the score" in str(bad)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 3) | st.none() | st.sampled_from(["1", "2.5", "N/A", ""]), min_size=1, max_size=6))
def test_the_best_stands_against_the_worst(values):
    row = {"prompt": "Hi?", "completions": [{"response": f"a{n}", "score": v} for n, v in enumerate(values)]}
    known = [(float(v), n) for n, v in enumerate(values) if v not in (None, "N/A", "")]
    made = convert(row)
    if len(known) < 2:
        assert made.kind == "no_scores" and made.severity == "error"
    elif len({value for value, _ in known}) == 1:
        assert made.kind == "tied_scores" and made.severity == "warning"
    else:
        top, bottom = max(known)[0], min(known)[0]
        assert made.chosen[0].content == f"a{next(n for v, n in known if v == top)}"
        assert made.rejected[0].content == f"a{next(n for v, n in known if v == bottom)}"


@settings(max_examples=200, deadline=None)
@given(numbers, numbers)
def test_scores_that_contradict_the_columns_are_never_passed(better, worse):
    row = {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad.", "score_chosen": better, "rejected_score": str(worse)}
    made = convert(row)
    if better > worse:
        assert isinstance(made, Preference)
    else:
        assert made.kind == ("tied_scores" if better == worse else "swapped_scores")


columns = ["prompt", "chosen", "rejected", "completions", "responses", "answers", "scores", "ratings", "label"]
columns += [
    "score_chosen",
    "score_rejected",
    "output_1",
    "output_2",
    "output_3",
    "response_j",
    "response_k",
    "completion",
]
leaves = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.sampled_from(["", "Hi?", "yes", "[]", "7.5"])
cells = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "response", "score", "rating", "text"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
wants = st.sampled_from(["preference", "labelled"])


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(columns), cells, max_size=6), wants, st.sampled_from(["auto", *formats.FORMATS]))
def test_any_row_gives_examples_or_findings(row, want, format):
    made = [example for _, example in formats._examples(row, HERE, want, format, {}, "")]
    assert made
    for example in made:
        if isinstance(example, Finding):
            assert example.message and example.origin == HERE
        else:
            assert isinstance(example, Preference if want == "preference" else Labelled) and row_of(example)

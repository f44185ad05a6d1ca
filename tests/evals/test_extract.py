"""Numbers and letters out of answers: the gold answers of GSM8K, both languages, and nothing where nothing is."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunelet.errors import TuneletError
from tunelet.evals import extract


def test_all_gold_answers_of_gsm8k(shared):
    rows = [
        json.loads(line)
        for file in sorted((shared / "inst-gsm8k").glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) == 7473
    for number, row in enumerate(rows, 1):
        written = row["answer"].rpartition("####")[2].strip().replace(",", "")
        gold = extract.gsm8k_gold(row["answer"], where=f"line {number}")
        assert gold == Fraction(written) == extract.gsm8k_flexible(row["answer"]), number


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("so 3+4=7\n#### 7", 7, 7),
        ("#### 1,234,567", 1234567, 1234567),
        ("#### $12.50 each", Fraction("12.5"), Fraction("12.5")),
        ("#### -3", -3, -3),
        ("#### −3", -3, -3),
        ("####7.", 7, 7),
        ("#### -$5", -5, -5),
        ("#### 7.00 then 9", 7, 9),
        ("#### 3\n#### 4", 3, 4),
        ("#### seven", None, None),
        ("The answer is 18.", None, 18),
        ("She has $1,000 left.", None, 1000),
        ("5-3", None, 3),
        ("x=.5", None, Fraction(1, 2)),
        ("20%", None, 20),
        ("5kg and b2", None, 2),
        ("답은 42개입니다.", None, 42),
        ("### 7", None, 7),
        ("no number", None, None),
        ("", None, None),
    ],
)
def test_numbers(text, strict, flexible):
    assert (extract.gsm8k_strict(text), extract.gsm8k_flexible(text)) == (strict, flexible)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9))
def test_a_number_is_read_back_however_it_is_written(value):
    for written in (f"{value}", f"{value:,}", f"{value}.".replace("..", "."), f"{value:.4f}"):
        assert extract.number(written) == Fraction(value)
        assert extract.gsm8k_strict(f"So it is.\n#### {written}") == Fraction(value)
        assert extract.gsm8k_flexible(f"It is {written}") == Fraction(value)


@given(st.text(max_size=60))
def test_any_text_gives_a_number_or_none(text):
    for read in (extract.gsm8k_strict, extract.gsm8k_flexible, extract.number):
        assert read(text) is None or isinstance(read(text), Fraction)
    assert extract.choice(text, 4) in (None, 0, 1, 2, 3)


def test_a_gold_answer_without_a_number_is_said():
    with pytest.raises(TuneletError, match="line 3: the gold answer has no '#### number'"):
        extract.gsm8k_gold("I don't know", where="line 3")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1),
        ("b", 1),
        ("(C)", 2),
        ("B. Paris", 1),
        ("A: because it is", 0),
        ("**B**", 1),
        ("\\boxed{D}", 3),
        ("$\\boxed{\\text{D}}$", 3),
        ("The answer is (B)", 1),
        ("The answer is\n\nC", 2),
        ("the correct option is **A**.", 0),
        ("I think the answer is C because A is wrong.", 2),
        ("Answer: A? No, wait. Answer: D.", 3),
        ("answer is B) since", 1),
        ("I'd go with answer choice B", 1),
        ("B is correct.", 1),
        ("Only (C) can be true.", 2),
        ("정답은 ②", 1),
        ("정답: 나", 1),
        ("정답은 나입니다.", 1),
        ("정답은 (다)이다.", 2),
        ("정답은 'ㄹ'", 3),
        ("답은 3번입니다.", 2),
        ("3번이 정답이다.", 2),
        ("③이 정답입니다", 2),
        ("① 서울", 0),
        ("정답은 다음과 같다: ③", 2),
        ("정답은 B입니다", 1),
        # none, or more than one with equal right
        ("", None),
        ("E", None),
        ("5", None),
        ("A or B", None),
        ("(A) and (B) are both fine", None),
        ("Answer: A and B", None),
        ("A. x\nB. y\nC. z", None),
        ("A dog barks.", None),
        ("The answer is a dog", None),
        ("The answer is 42", None),
        ("None of these is the answer", None),
        ("정답은 나무입니다", None),
        ("다른 답은 없다", None),
        ("가장 좋은 것은 모른다", None),
        ("대답은 가능하다", None),
    ],
)
def test_choices(answer, expected):
    assert extract.choice(answer, 4) == expected


@pytest.mark.parametrize("labels", extract.LABELS.values(), ids=extract.LABELS)
@pytest.mark.parametrize("frame", ["{}", "({})", "정답은 {}", "정답: {}", "The answer is ({}).", "답은 {}번입니다."])
def test_every_label_in_every_frame(labels, frame):
    for n in (2, 5, 9):
        for place, label in enumerate(labels[:9]):
            expected = place if place < n else None
            assert extract.choice(frame.format(label), n) == expected, (n, label)


def test_ten_choices_and_no_fewer_than_two():
    assert extract.choice("정답은 10번", 10) == 9 and extract.choice("정답은 10번", 5) is None
    assert extract.choice("J", 10) == 9 and extract.choice("⑩", 10) == 9
    for n in (1, 11):
        with pytest.raises(ValueError):
            extract.choice("A", n)

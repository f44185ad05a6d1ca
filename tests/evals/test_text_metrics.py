"""Exact match and F1 against values worked by hand, in both languages; ROUGE and chrF through their libraries."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunelet.errors import TuneletError
from tunelet.evals import text_metrics as metrics


@pytest.mark.parametrize(
    ("answer", "references", "exact", "f1"),
    [
        ("The Cat!", ["cat"], 1, 1),
        ("a cat sat", ["the cat"], 0, 2 / 3),
        ("dog", ["cat", "a dog."], 1, 1),
        ("", [""], 1, 1),
        ("the", [""], 1, 1),
        ("", ["cat"], 0, 0),
        ("1,000", ["1000"], 1, 1),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("서울은", ["서울"], 0, 0.8),
        ("대한 민국", ["대한민국"], 1, 1),
        ("『소나기』", ["소나기"], 1, 1),
        ("ＡＢＣ", ["abc"], 1, 1),
        ("부산", ["서울"], 0, 0),
    ],
)
def test_exact_match_and_f1(answer, references, exact, f1):
    assert metrics.exact_match(answer, references) == exact
    assert metrics.f1(answer, references) == pytest.approx(f1)


@given(st.text(max_size=30), st.text(max_size=30))
def test_f1_is_symmetric_within_bounds_and_one_for_a_match(a, b):
    value = metrics.f1(a, [b])
    assert 0 <= value <= 1 and value == pytest.approx(metrics.f1(b, [a]))
    assert metrics.f1(a, [a]) == metrics.exact_match(a, [a]) == 1
    assert metrics.exact_match(a, [b]) <= value


def test_rouge_sees_korean():
    pytest.importorskip("rouge_score")
    found = metrics.rouge("the cat sat", ["the cat sat on the mat"])
    assert found["rouge1"] == pytest.approx(2 / 3) and found["rouge2"] == pytest.approx(2 * 2 / 7)
    korean = metrics.rouge("서울은 수도다", ["부산은 항구다", "서울은 한국의 수도다"])
    assert korean["rougeL"] == pytest.approx(0.8)
    assert metrics.rouge("x", ["y"], kinds=("rouge1",)) == {"rouge1": 0}


def test_chrf():
    pytest.importorskip("sacrebleu")
    assert metrics.chrf("서울은 수도다", ["서울은 수도다"]) == pytest.approx(1)
    assert metrics.chrf("abc", ["xyz"]) == 0
    assert 0.5 < metrics.chrf("abc def", ["xyz", "abc deg"]) < 1
    both = metrics.corpus_chrf(["abc def", "x"], [["abc deg"], ["x"]])
    assert metrics.chrf("abc def", ["abc deg"]) < both < 1


def test_no_reference_is_an_error():
    for metric in (metrics.exact_match, metrics.f1):
        for wrong in ([], "one text"):
            with pytest.raises(ValueError, match="references"):
                metric("a", wrong)
    for answers, references in (([], []), (["a"], []), (["a", "b"], [["a"], ["a", "b"]])):
        with pytest.raises(ValueError, match="answers"):
            metrics.corpus_chrf(answers, references)


def test_missing_libraries_are_said(monkeypatch):
    for name in ("rouge_score.rouge_scorer", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TuneletError, match="rouge-score is not installed"):
        metrics.rouge("a", ["a"])
    with pytest.raises(TuneletError, match="sacrebleu is not installed"):
        metrics.chrf("a", ["a"])

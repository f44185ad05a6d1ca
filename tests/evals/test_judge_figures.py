"""What is said of a judge: consistency, favoured places with an exact test, agreement with people, in numbers and
words."""

from __future__ import annotations

import math

import pytest

from tunelet.domain import agreement
from tunelet.evals import judge, judge_figures
from tunelet.evals.judge import Judgement, Verdict
from tunelet.evals.stats import wilson


def judged(both: str) -> Judgement:
    """ "AB": A in the first order, B in the other; "?": no verdict."""
    return judge._both(*(Verdict(None, "hm", "no verdict") if place == "?" else Verdict(place) for place in both))


def figures(*every: str, written: bool = False):
    of = [judged(both) for both in every]
    found = judge_figures.of_judge(of, written)
    return found, judge_figures.notes(of, found)


@pytest.mark.parametrize(
    ("both", "won", "consistent", "leaning"),
    [
        ("AB", 1.0, True, 0),
        ("BA", 0.0, True, 0),
        ("CC", 0.5, True, 0),
        ("AA", 0.5, False, 2),
        ("BB", 0.5, False, -2),
        ("AC", 0.5, False, 1),
        ("CA", 0.5, False, 1),
        ("BC", 0.5, False, -1),
        ("?A", None, None, None),
        ("A?", None, None, None),
    ],
)
def test_both_orders(both, won, consistent, leaning):
    got = judged(both)
    assert (got.won, got.consistent, got.leaning) == (won, consistent, leaning)


def test_figures():
    got, notes = figures("AB", "AB", "BA", "AA", "AC", "BB", "CC", "??", "?A", written=True)
    assert got["judge_consistency"] == wilson(4, 7).as_dict()
    # A or half a tie of two verdicts: AB 1/2, AB 1/2, BA 1/2, AA 1, AC 3/4, BB 0, CC 1/2
    assert got["judge_first_place"]["value"] == pytest.approx(3.75 / 7)
    assert got["judge_first_place"]["p"] == 1.0, "2 of 3 is no sign of anything"
    assert got["judge_unparsed"] == wilson(2, 9).as_dict()
    assert not notes
    assert "judge_unparsed" not in figures("AB")[0], "nothing is read of a judge that writes nothing"
    assert judge_figures.of_judge([Judgement(0.5)], True) == {}, "nobody was asked"


@pytest.mark.parametrize(("both", "place"), [("AA", "first"), ("BB", "second")])
def test_a_judge_that_always_says_the_same_is_exposed(both, place):
    got, notes = figures(*[both] * 20)
    assert got["judge_consistency"]["value"] == 0
    assert got["judge_first_place"]["value"] == (place == "first")
    assert got["judge_first_place"]["p"] == pytest.approx(2 * 0.5**20)
    (note,) = notes
    assert f"stood {place} every time" in note and "tell nothing" in note and "tie" in note


def test_a_judge_that_knows_ties_alone():
    got, notes = figures(*["CC"] * 9)
    assert got["judge_consistency"]["value"] == 1 and got["judge_first_place"]["p"] == 1
    assert "every pair a tie" in notes[0]


def test_a_leaning_is_tested_exactly():
    got, notes = figures(*["AB"] * 30, *["AA"] * 9, "BB")
    # 9 or more of 10, or 1 or fewer, by a fair coin
    assert got["judge_first_place"]["p"] == pytest.approx(2 * (math.comb(10, 9) + 1) / 2**10)
    assert "favours the answer that stands first" in notes[0] and "9 pairs" in notes[0]
    assert not figures(*["AB"] * 30, *["AA"] * 5, "BB")[1], "5 of 6 may be chance"
    assert "stands second" in figures(*["BA"] * 30, *["BB"] * 9)[1][0]


def test_a_judge_that_mostly_disagrees_with_itself():
    assert any("tell little" in note for note in figures(*["AB"] * 10, *["AA"] * 20, *["BB"] * 20)[1])
    assert not figures(*["AB"] * 20, *["AA"] * 10, *["BB"] * 10)[1]


@pytest.mark.parametrize(("unread", "warned"), [(2, False), (3, True)])
def test_many_that_cannot_be_read(unread, warned):
    got, _ = figures(*["AB"] * (10 - unread), *["A?"] * unread, written=True)
    assert bool(judge_figures.unparsed_note(got)) == warned
    assert judge_figures.unparsed_note({}) == []


def test_agreement_with_people():
    both = ["AB", "BA", "AA", "BB", "CC", "A?"]
    firsts = [True, True, True, False, False, True]
    of = [judged(each) for each in both]
    got = judge_figures.agreement(of, firsts)
    assert got["judge_accuracy"] == wilson(1, 5).as_dict(), "a tie is not a hit"
    # shown first: AB -> A yes; BA -> no; AA -> yes; BB, chosen second, stands first in the other order: B -> no; CC no
    assert got["judge_accuracy_chosen_first"]["value"] == 2 / 5
    # shown second: AB -> B yes; BA -> A no; AA -> no; BB -> yes; CC no
    assert got["judge_accuracy_chosen_second"]["value"] == 2 / 5
    labels = judge_figures.labels(of, firsts)
    assert labels["0"] == {"judge": "first", "people": "first"} and labels["3"] == {"judge": "tie", "people": "second"}
    assert len(labels) == 5
    assert judge_figures.agreement([judged("??")], [True]) == {}


@pytest.mark.parametrize(("right", "kappa"), [(40, 1.0), (20, 0.0), (0, -1.0)])
def test_kappa_of_judges_who_agree_by_chance_is_0(right, kappa):
    firsts = [place % 2 == 0 for place in range(40)]
    of = [judged("AB" if first == (place // 2 < right / 2) else "BA") for place, first in enumerate(firsts)]
    assert agreement.measured(judge_figures.labels(of, firsts))["value"] == pytest.approx(kappa)
    always = agreement.measured(judge_figures.labels([judged("AA")] * 40, firsts))
    assert always["value"] == 0, "places alone"

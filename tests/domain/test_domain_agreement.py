"""Agreement beyond chance, against values computed by hand and published ones."""

from __future__ import annotations

import pytest

from tunelet.domain import agreement


def pairs(**counts):
    return [(key[0], key[1]) for key, number in counts.items() for _ in range(number)]


def test_kappa_by_hand():
    # 50 items: yes/yes 20, yes/no 5, no/yes 10, no/no 15. Observed 35/50 = 0.7; expected 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    assert agreement.cohen_kappa(pairs(yy=20, yn=5, ny=10, nn=15)) == pytest.approx(0.4)
    # 45/15/25/15 of 100: observed 0.6, expected 0.6 * 0.7 + 0.4 * 0.3 = 0.54, (0.6 - 0.54) / 0.46
    assert agreement.cohen_kappa(pairs(yy=45, yn=15, ny=25, nn=15)) == pytest.approx(0.06 / 0.46)
    assert agreement.cohen_kappa(pairs(yy=5, nn=5)) == 1
    assert agreement.cohen_kappa(pairs(yn=5, ny=5)) == -1


def test_kappa_where_it_is_not_defined():
    assert agreement.cohen_kappa([]) is None
    assert agreement.cohen_kappa(pairs(yy=9)) is None
    found = agreement.measured({str(n): {"a": 1, "b": 1} for n in range(9)})
    assert found["value"] is None and found["observed"] == 1
    assert "not defined" in agreement.told(found)


def test_alpha_of_the_published_example():
    # Krippendorff (2011), example C: four observers, twelve units, values missing; nominal alpha 0.743.
    rows = [
        [1, 1, None, 1],
        [2, 2, 3, 2],
        [3, 3, 3, 3],
        [3, 3, 3, 3],
        [2, 2, 2, 2],
        [1, 2, 3, 4],
        [4, 4, 4, 4],
        [1, 1, 2, 1],
        [2, 2, 2, 2],
        [None, 5, 5, 5],
        [None, None, 1, 1],
        [None, None, 3, None],
    ]
    labels = [[value for value in row if value is not None] for row in rows]
    assert agreement.krippendorff_alpha(labels) == pytest.approx(0.743, abs=5e-4)


def test_alpha_by_hand():
    # Two coders, ten units (Krippendorff 2011, example A): 0.095.
    a, b = "0100000010", "1110010000"
    assert agreement.krippendorff_alpha(list(zip(a, b, strict=True))) == pytest.approx(0.095, abs=5e-4)
    assert agreement.krippendorff_alpha([["x"], ["y", "y"]]) is None
    assert agreement.krippendorff_alpha([]) is None


def test_measured_takes_the_measure_for_the_number_of_annotators():
    two = {str(n): {"a": n % 3, "b": (n % 3) if n % 5 else 0, "c": 0} for n in range(30)}
    found = agreement.measured({item: {"a": of["a"], "b": of["b"]} for item, of in two.items()})
    assert found["measure"] == "cohen_kappa" and found["items"] == 30
    assert found["low"] < found["value"] < found["high"] < 1.01
    three = agreement.measured(two)
    assert three["measure"] == "krippendorff_alpha" and three["annotators"] == ["a", "b", "c"]
    assert agreement.told(three).startswith("α ")
    alone = agreement.measured({"1": {"a": 1}})
    assert alone["items"] == 0 and alone["value"] is None and "no item has two" in agreement.told(alone)

"""Findings as people read them: grouped, worst first, nothing hidden."""

from __future__ import annotations

from tunelet.data import listing
from tunelet.data.examples import Finding, Origin


def told(findings, shown=20):
    return "\n".join(line for _, line in listing.lines(findings, shown))


def test_each_kind_is_shown_and_the_rest_counted():
    many = [Finding("a", "error", f"fault {n}", Origin("x", n), "mend a") for n in range(100)]
    few = [Finding("b", "error", "the same", Origin("y", n), "mend b") for n in range(9)]
    text = told(many + few)
    assert "error: a, 100 rows\n" in text and "to mend: mend a" in text and "and 90 more" in text
    assert "y, lines 0, 1, 2, 3, 4 and 4 more: the same" in text
    assert text.count("x, line") == 10


def test_worst_first_then_most_frequent():
    findings = [Finding("often", "info", "m", Origin("x", n)) for n in range(5)]
    findings += [Finding("rare", "error", "m", Origin("x", 1)), Finding("warn", "warning", "m", Origin("x", 1))]
    findings += [Finding("common", "error", "m", Origin("x", n)) for n in range(2)]
    heads = [line.split()[1].rstrip(",") for style, line in listing.lines(findings) if style in listing.SEVERITIES]
    assert heads == ["common", "rare", "warn", "often"]


def test_rows_are_counted_once_and_findings_about_no_row_stand_alone():
    twice = [Finding("a", "warning", f"m {n}", Origin("x", 1)) for n in range(2)]
    assert told(twice).splitlines()[0] == "warning: a, 2 findings in 1 row"
    assert told([Finding("t", "warning", "about the tokenizer", fix="mend")]).splitlines() == [
        "warning: t",
        "  about the tokenizer",
        "  to mend: mend",
    ]
    assert told([]) == ""


def test_every_kind_is_shown_however_many_there_are():
    findings = [Finding(f"k{n}", "error", "m", Origin("x", n)) for n in range(30)]
    assert all(f"error: k{n}, 1 row" in told(findings, shown=5) for n in range(30))

"""What is wrong or odd about rows, each finding with its row, severity and fix; and a mended copy of the rows.

Not for rows that cannot be read or converted: sources.py and formats.py say so. The checks are in doctor_rows.py (one
row), doctor_corpus.py (all), doctor_pairs.py (preferences), doctor_tokens.py (a tokenizer and template); the rules of
mending in doctor_fix.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tunelet.data import doctor_corpus, doctor_pairs, doctor_rows
from tunelet.data.doctor_pairs import Margin
from tunelet.data.examples import Example, Finding, Preference


def check(
    examples: Sequence[Example], renderer: Any = None, max_length: int = 0, margins: Sequence[Margin | None] = ()
) -> list[Finding]:
    """All findings about `examples`, in the order of the rows; with a Renderer also what its tokenizer and template do.

    `max_length` in tokens (0: not checked) needs the renderer. `margins`: doctor_pairs.margins of the examples.
    """
    return [finding for _, finding in numbered(examples, renderer, max_length, margins)]


def numbered(
    examples: Sequence[Example], renderer: Any = None, max_length: int = 0, margins: Sequence[Margin | None] = ()
) -> list[tuple[int, Finding]]:
    """As `check`, each finding with the index of its example (-1: about the tokenizer or all rows, not one)."""
    said = [(index, seen) for index, example in enumerate(examples) for seen in doctor_rows.look(example)]
    said += [
        (index, seen)
        for index, example in enumerate(examples)
        if isinstance(example, Preference)
        for seen in doctor_pairs.look(example)
    ]
    said += doctor_corpus.look_at_all(examples)
    said += doctor_pairs.look_at_all(examples)
    said += doctor_pairs.swapped(margins)
    said = _systematic(said, len(examples))
    out = [
        (i, Finding(seen.kind, seen.severity, seen.message, examples[i].origin if i >= 0 else None, seen.fix))
        for i, seen in said
    ]
    if renderer is not None:
        from tunelet.data import doctor_tokens

        out += doctor_tokens.look(examples, renderer, max_length)
    return sorted(out, key=lambda item: item[0])


# What is an accident where it is rare (a warning), and a habit of the corpus where it is not (info): up to which share.
ACCIDENTS = {"whitespace": 0.05, "refusal": 0.02}


def _systematic(said: list[tuple[int, doctor_rows.Said]], rows: int) -> list[tuple[int, doctor_rows.Said]]:
    """Raises the infos of kinds in ACCIDENTS to warnings where few rows have them."""
    count = {kind: len({i for i, seen in said if seen.kind == kind and seen.severity == "info"}) for kind in ACCIDENTS}
    rare = {kind for kind, most in ACCIDENTS.items() if count[kind] <= max(1, most * rows)}
    return [(i, seen._replace(severity="warning") if seen.kind in rare else seen) for i, seen in said]


def fix(
    examples: Sequence[Example],
    lost: Mapping[str, int] | None = None,
    renderer: Any = None,
    max_length: int = 0,
    margins: Sequence[Margin | None] = (),
) -> tuple[list[Example], list[Finding]]:
    """A mended copy of the rows, and one note for each thing that was done and how often.

    `lost` counts, by reason, the rows that could not be converted (`Counts.dropped`): the notes tell of them too.
    Checks and mends until no error or warning is left: a mend may bring out something else (two rows become equal).
    """
    from tunelet.data.doctor_fix import DROPS, MENDS, checked, mended
    from tunelet.data.shapes import Bad

    dropped: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    rows, known = list(examples), list(margins)
    last = 8  # a row that still has something after so many rounds is dropped
    for attempt in range(last + 1):
        faults: dict[int, set[str]] = {}
        for index, finding in numbered(rows, renderer, max_length, known):
            if index >= 0 and (finding.severity != "info" or finding.kind in MENDS):
                faults.setdefault(index, set()).add(finding.kind)
        if not faults:
            break
        kept: list[Example] = []
        places: list[int] = []  # in rows, of those kept
        for index, example in enumerate(rows):
            if index not in faults:
                kept.append(example)
                places.append(index)
                continue
            result = mended(example, faults[index])
            if not isinstance(result, str) and (result[0] == example or attempt == last):
                result = sorted(faults[index])[0]  # the mend did not help
            if isinstance(result, str):
                dropped[result] += 1
                continue
            try:
                checked(result[0])
            except Bad as bad:
                dropped[bad.kind] += 1
                continue
            changed.update(result[1])
            kept.append(result[0])
            places.append(index)
        rows, known = kept, [known[place] for place in places] if known else []
    notes = [
        Finding(kind, "info", f"{kind}, {_rows(count)}: {MENDS[kind][1]}") for kind, count in sorted(changed.items())
    ]
    for kind, count in sorted(dropped.items()):
        because = DROPS.get(kind, "it could not be mended")
        notes.append(Finding(kind, "info", f"{kind}, {_rows(count)} dropped: {because}"))
    for kind, count in sorted((lost or {}).items()):
        notes.append(Finding(kind, "info", f"{kind}, {_rows(count)} left out: not usable"))
    return rows, notes


def _rows(count: int) -> str:
    return f"{count} row{'s' if count != 1 else ''}"

"""Findings for people to read: by kind, worst and most frequent first, the first rows of each, the rest counted.

Not for finding anything (doctor.py, formats.py, sources.py do) and not for machines: `--json` and data.json have all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tunelet.data.examples import Finding

SEVERITIES = ("error", "warning", "info")
SAME = 5  # row numbers that are listed with one and the same message


def lines(findings: Sequence[Finding], shown: int = 20) -> list[tuple[str, str]]:
    """(style, text) line by line: a heading for each kind (its style is the severity), then "row"s and a "fix".

    About `shown` rows are listed one by one, shared out among the kinds so that each has one.
    """
    kinds: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        kinds.setdefault((finding.severity, finding.kind), []).append(finding)
    ordered = sorted(kinds.items(), key=lambda item: (SEVERITIES.index(item[0][0]), -len(item[1])))
    out: list[tuple[str, str]] = []
    left = shown
    for place, ((severity, kind), group) in enumerate(ordered):
        out.append((severity, f"{severity}: {kind}{_extent(group)}"))
        share = max(1, left // (len(ordered) - place))  # what one kind leaves over, the next ones may use
        alike: dict[tuple[str, str], list[Finding]] = {}
        for finding in group:
            alike.setdefault((finding.origin.file if finding.origin else "", finding.message), []).append(finding)
        some = list(alike.values())[:share]
        out += [("row", f"  {_told(same)}") for same in some]
        left -= len(some)
        if rest := len(group) - sum(map(len, some)):
            out.append(("row", f"  and {rest} more"))
        fixes = Counter(finding.fix for finding in group if finding.fix)
        if fixes:
            out.append(("fix", f"  to mend: {fixes.most_common(1)[0][0]}"))
    return out


def _told(same: Sequence[Finding]) -> str:
    """One message, with the rows it is about: 'FILE, lines 3, 7 and 12 more: message'."""
    first = same[0].origin
    if first is None or len(same) == 1:
        return f"{first}: {same[0].message}" if first else same[0].message
    numbers = ", ".join(str(finding.origin.line) for finding in same[:SAME] if finding.origin)
    more = f" and {len(same) - SAME} more" if len(same) > SAME else ""
    return f"{first.file}, {first.unit}s {numbers}{more}: {same[0].message}"


def _extent(group: Sequence[Finding]) -> str:
    rows = len({finding.origin for finding in group if finding.origin})
    if not rows:
        return ""
    told = f"{rows} row{'s' if rows != 1 else ''}"
    return f", {told}" if rows == len(group) else f", {len(group)} findings in {told}"

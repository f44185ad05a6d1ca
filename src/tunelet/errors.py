"""Errors a user can mend. A user's mistake is raised as a `TuneletError`; a bug keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TuneletError(Exception):
    """A mistake the user can mend: what happened (with file, row, field), why, and what to do.

    `cli.py` prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, what: str, *, why: str = "", fix: str = ""):
        self.what, self.why, self.fix = what, why, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.why:
            lines.append(f"why: {self.why}")
        if self.fix:
            lines.append(f"fix: {self.fix}")
        return "\n".join(lines)


class GateError(TuneletError):
    """A check or gate did not hold (exit code 1): the input was fine, the result was not."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str], synonyms: dict[str, str] | None = None) -> str:
    """' Did you mean X?' for the nearest known name, by synonym first, then by spelling; '' where nothing is near."""
    known = list(known)
    if synonyms and name in synonyms and synonyms[name] in known:
        return f" Did you mean '{synonyms[name]}'?"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""

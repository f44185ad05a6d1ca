"""A row with its trained tokens marked: in the terminal (rich), as a piece of HTML, as a page of its own (masks.html).

Not for deciding what is trained (masks.py), and not the report (runs/report.py takes the fragment).
Trained text can be told without colour: it stands in [[ ]] in the terminal and is underlined in HTML.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tunelet.data.examples import Tokens

if TYPE_CHECKING:
    from rich.text import Text as RichText

OPEN, CLOSE = "[[", "]]"
LONGEST_CHARACTER = 8  # tokens; no character of a byte-level tokenizer takes more than its 4 bytes, fallback included
STYLES = {"system": "magenta", "user": "cyan", "tool": "yellow", "assistant": "green", "template": "bright_black"}
COLOURS = {"system": "#8250df", "user": "#0969da", "tool": "#9a6700", "assistant": "#1a7f37", "template": "#6e7781"}
CSS = (
    ".tl-row{font:14px/1.6 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #d0d7de;"
    "border-radius:6px;padding:.8em;margin:.4em 0 1.2em}"
    ".tl-row .t{background:#dafbe1;color:#116329;text-decoration:underline;text-underline-offset:3px}"
    ".tl-head{font:13px/1.4 system-ui,sans-serif;color:#57606a}"
    + "".join(f".tl-row .{role}{{color:{colour}}}" for role, colour in COLOURS.items())
    + ".tl-row .t.t{color:#116329}"
    "@media (prefers-color-scheme:dark){.tl-row .t{background:#033a16}.tl-row .t.t{color:#7ee787}}"
)


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or the tokens that make one character together. `at` is the place of the first."""

    text: str
    ids: tuple[int, ...]
    trained: bool
    role: str
    at: int


def pieces(row: Tokens, tokenizer: Any) -> list[Piece]:
    """The row token by token. Tokens that are parts of one character (bytes of Hangul, emoji) form one piece.

    Each text is what the token adds to the text before it: a token decoded alone may lose its leading space.
    """
    ids = [int(id_) for id_ in row.ids]
    roles = [role for start, end, role in row.spans for _ in range(start, end)]
    out: list[Piece] = []
    before, done = 0, 0  # ids[before:done] are shown and give the context in which the next ones are decoded
    for end in range(1, len(ids) + 1):
        shown = _decode(tokenizer, ids[before:done])
        text = _decode(tokenizer, ids[before:end])
        unfinished = text.endswith("\ufffd") and end - done < LONGEST_CHARACTER and end < len(ids)
        if unfinished or (end < len(ids) and not text.startswith(shown)):
            continue
        trained = any(row.mask[max(done, 1) : end])
        out.append(Piece(text[len(shown) :], tuple(ids[done:end]), trained, roles[done], done))
        before, done = done, end
    return out


def terminal(row: Tokens, tokenizer: Any, *, ids: bool = False) -> RichText:
    """The row for `rich.print`: trained stretches in [[ ]], bold and underlined, roles in colour.

    ids=True gives one line a token instead: place, id, trained or not, role and text.
    """
    from rich.text import Text

    out = Text()
    if ids:
        for piece in pieces(row, tokenizer):
            numbers = " ".join(map(str, piece.ids))
            mark = "trained" if piece.trained else "-"
            style = "bold green" if piece.trained else STYLES.get(piece.role, "")
            out.append(f"{piece.at:>5}  {numbers:>12}  {mark:<8} {piece.role:<10} {piece.text!r}\n", style)
        return out
    for trained, stretch in _stretches(row, tokenizer):
        if trained:
            out.append(OPEN, "bold")
        for piece in stretch:
            out.append(piece.text, "bold underline green" if trained else STYLES.get(piece.role, ""))
        if trained:
            out.append(CLOSE, "bold")
    return out


def fragment(row: Tokens, tokenizer: Any) -> str:
    """The row as HTML, everything escaped; the classes are those of `CSS`. A token's place and id are its tooltip."""
    out = [f'<div class="tl-head">{html.escape(summary(row))}</div><div class="tl-row">']
    for trained, stretch in _stretches(row, tokenizer):
        for piece in stretch:
            kind = ("t " if trained else "") + html.escape(piece.role, quote=True)
            place = f"{piece.at}: {' '.join(map(str, piece.ids))}"
            text = html.escape(piece.text).replace("\n", "&#8629;\n")
            out.append(f'<span class="{kind}" title="{place}">{text}</span>')
    return "".join(out) + "</div>"


def page(rows: Sequence[Tokens], tokenizer: Any, title: str = "What is trained") -> str:
    """A page of its own with these rows: no script, nothing from the network."""
    title = html.escape(title)
    body = "\n".join(fragment(row, tokenizer) for row in rows)
    legend = "<p>Green and underlined: trained. The rest is context. Point at a token for its place and id.</p>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>body{{max-width:60em;margin:2em auto;padding:0 1em;font-family:system-ui,sans-serif}}{CSS}</style>"
        f"<h1>{title}</h1>{legend}\n{body}</html>\n"
    )


def summary(row: Tokens) -> str:
    """'file, line 3: 12 of 40 tokens trained'."""
    return f"{row.origin}: {row.trained} of {len(row.ids)} tokens trained"


def _stretches(row: Tokens, tokenizer: Any) -> Iterator[tuple[bool, list[Piece]]]:
    for trained, stretch in groupby(pieces(row, tokenizer), key=lambda piece: piece.trained):
        yield trained, list(stretch)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""

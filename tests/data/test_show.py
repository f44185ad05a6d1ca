"""Coloured masks: what is marked is what is trained, with and without colour, and HTML holds no foreign markup."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from conversations import HERE, said
from rich.console import Console

from tunelet.data.examples import Chat, Text
from tunelet.data.render import Renderer, load_tokenizer
from tunelet.data.show import fragment, page, pieces, summary, terminal
from tunelet.data.tokenizer import CHATML

ATTACK = "<script>alert('x')</script> & \"quoted\" [bold]not markup[/bold]"
ANSWER = "네, 반가워요! 😀\n" + ATTACK


@pytest.fixture(scope="module", params=["tokenizer-smollm2/instruct", "weights-stories260K/hf"])
def tokenizer(shared, request):
    return load_tokenizer(shared / request.param)


@pytest.fixture
def row(tokenizer):
    turns = said(("user", ATTACK + " 안녕 👩‍👩‍👧"), ("assistant", ANSWER))
    return Renderer(tokenizer, CHATML).chat(Chat(turns, HERE))


def test_pieces_join_to_the_text_and_keep_every_id(tokenizer, row):
    made = pieces(row, tokenizer)
    assert "".join(piece.text for piece in made) == tokenizer.decode(row.ids)
    assert [id_ for piece in made for id_ in piece.ids] == list(row.ids)
    assert [piece.at for piece in made] == [sum(len(p.ids) for p in made[:n]) for n in range(len(made))]
    assert "\ufffd" not in "".join(piece.text for piece in made)
    assert "".join(piece.text for piece in made if piece.trained).strip().endswith("<|im_end|>")


def test_the_terminal_marks_what_is_trained_without_colour(tokenizer, row):
    plain = terminal(row, tokenizer).plain
    [marked] = re.findall(r"\[\[(.*)\]\]", plain, flags=re.DOTALL)
    assert marked.strip() == ANSWER + "<|im_end|>"
    out = io.StringIO()
    Console(file=out, width=10_000, no_color=True, force_terminal=False).print(terminal(row, tokenizer))
    assert "[[" in out.getvalue() and "[bold]not markup[/bold]" in out.getvalue()


def test_the_terminal_lists_ids_on_request(tokenizer, row):
    lines = terminal(row, tokenizer, ids=True).plain.splitlines()
    assert len(lines) == len(pieces(row, tokenizer))
    assert sum(" trained " in line for line in lines) == sum(piece.trained for piece in pieces(row, tokenizer))
    assert lines[0].split()[:3] == ["0", str(row.ids[0]), "-"]


class Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.trained, self.text, self.inside = set(), "", "", False

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.inside = tag == "span" and (dict(attrs).get("class") or "").startswith("t ")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        self.text += data.replace("↵\n", "\n")
        if self.inside:
            self.trained += data.replace("↵\n", "\n")


def test_html_is_escaped_and_marks_what_is_trained(tokenizer, row):
    reader = Reader()
    reader.feed(fragment(row, tokenizer))
    assert reader.tags == {"div", "span"}
    assert reader.trained.strip() == ANSWER + "<|im_end|>"
    assert reader.text.endswith(tokenizer.decode(row.ids)) and summary(row) in reader.text


def test_a_page_needs_nothing_else(tokenizer, row):
    made = page([row, row], tokenizer, title="<b>")
    reader = Reader()
    reader.feed(made)
    assert "script" not in reader.tags and "link" not in reader.tags and "b" not in reader.tags
    assert "http" not in made.replace(ATTACK, "") and "@import" not in made and made.count('class="tl-row"') == 2


def test_a_plain_text(tokenizer):
    row = Renderer(tokenizer).text(Text("Once upon a time.", HERE))
    made = terminal(row, tokenizer).plain
    assert made.count("[[") == 1 and made.endswith(tokenizer.eos_token + "]]")
    assert summary(row) == f"rows.jsonl, line 1: {len(row.ids) - 1} of {len(row.ids)} tokens trained"

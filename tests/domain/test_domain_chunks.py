"""Documents -> chunks, and how texts are compared."""

from __future__ import annotations

import hashlib

import manuals
import pytest

from tunelet.domain import chunks, text
from tunelet.errors import TuneletError


def test_the_manuals(tmp_path):
    read = chunks.read(manuals.write(tmp_path))
    assert [document.path for document in read.documents] == sorted(manuals.MANUALS)
    for document in read.documents:
        data = (tmp_path / document.path).read_bytes()
        assert document.sha256 == hashlib.sha256(data).hexdigest()
        assert document.chunks == sum(chunk.document == document.path for chunk in read.chunks)
    care = next(chunk for chunk in read.chunks if chunk.headings == ("Washing machine", "Care"))
    assert care.text.startswith("- Clean the lint filter every 4 weeks.\n")
    assert care.terms == ("lint filter", "citric acid")
    assert care.where == "Washing machine > Care"


def test_ids_follow_the_content(tmp_path):
    first = chunks.read(manuals.write(tmp_path / "a"))
    again = chunks.read(manuals.write(tmp_path / "b"))
    assert [chunk.id for chunk in first.chunks] == [chunk.id for chunk in again.chunks]
    path = tmp_path / "b" / "washer.md"
    path.write_text(path.read_text().replace("13 mm", "14 mm"))
    changed = {chunk.id for chunk in chunks.read(tmp_path / "b").chunks} - {chunk.id for chunk in first.chunks}
    assert len(changed) == 1


def test_markdown_forms():
    source = """---
title: not text
---
Title
=====
Intro with a [link](http://x.y/z) and *weight*.
<!-- not text -->

## Code
```
# no heading
```
| a | b |
|---|---|
| 1 | 2 |

### Deeper ###
> quoted
"""
    blocks = chunks.blocks_of(source, ".md")
    assert [block.headings for block in blocks] == [
        ("Title",),
        ("Title", "Code"),
        ("Title", "Code", "Deeper"),
    ]
    assert blocks[0].text == "Intro with a link and weight."
    assert "# no heading" in blocks[1].text and "| 1 | 2 |" in blocks[1].text and "---" not in blocks[1].text
    assert blocks[2].text == "quoted"


def test_html_leaves_scripts_out():
    source = "<title>no</title><h1>A &amp; B</h1><p>One <b>bold term</b>.<script>alert(1)</script></p><ul><li>Two</ul>"
    blocks = chunks.blocks_of(source, ".html")
    assert [(block.headings, block.text) for block in blocks] == [(("A & B",), "One bold term."), (("A & B",), "Two")]
    assert blocks[0].terms == ("bold term",)


def test_long_paragraphs_are_cut_between_sentences():
    long = " ".join(f"Sentence number {number} says something." for number in range(60))
    made = chunks.cut([chunks.Block((), long)], "d.txt", 300)
    assert len(made) > 5 and all(len(chunk.text) <= 300 for chunk in made)
    assert " ".join(chunk.text for chunk in made) == long
    assert all(chunk.text.endswith(".") for chunk in made)
    solid = "".join(chr(ord("가") + number) for number in range(1000))  # no end of a sentence, no space
    assert "".join(chunk.text for chunk in chunks.cut([chunks.Block((), solid)], "d.txt", 300)) == solid


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.md", b"", "a.md: is empty"),
        ("a.md", b" \n\n", "a.md: is empty"),
        ("a.md", "# 제목\n\n내용입니다".encode("cp949"), "line 1: byte 0xc1 is not UTF-8"),
        ("a.txt", b"text\x00\x01\x02 more", "holds zero bytes"),
        ("a.md", b"# Only a heading\n", "a.md: holds no text"),
    ],
)
def test_documents_that_are_none(tmp_path, name, data, told):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "fine.md").write_text("Fine text.")
    with pytest.raises(TuneletError) as error:
        chunks.read(tmp_path)
    assert told in error.value.what and "1 of 2 documents" in error.value.what


def test_korean_encodings_are_named(tmp_path):
    (tmp_path / "a.md").write_bytes("보온은 12시간을 넘기지 마세요.".encode("cp949"))
    with pytest.raises(TuneletError, match="iconv -f CP949"):
        chunks.read(tmp_path)
    (tmp_path / "a.md").write_text("보온은 12시간을 넘기지 마세요.", encoding="utf-16")
    assert chunks.read(tmp_path).chunks[0].text.startswith("보온은")


def test_no_documents(tmp_path):
    with pytest.raises(TuneletError, match="no such file or folder"):
        chunks.read(tmp_path / "nowhere")
    with pytest.raises(TuneletError, match="holds no documents"):
        chunks.read(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(TuneletError, match="holds no documents") as error:
        chunks.read(tmp_path)
    assert "1 files are of other kinds" in error.value.why


def test_what_lies_outside_is_not_read(tmp_path):
    (tmp_path / "secret.md").write_text("A secret.")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("Fine text.")
    (docs / "link.md").symlink_to(tmp_path / "secret.md")
    (docs / ".hidden.md").write_text("Hidden.")
    assert [document.path for document in chunks.read(docs).documents] == ["a.md"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("the red valve", "Red  valve.", True),
        ("30 minutes", "40 minutes", False),
        ("turn it on", "turn it off", False),
        ("do not open the door at night", "do open the door at night", False),
        ("필터를", "필터", True),
        ("불을 켜세요", "불을 끄세요", False),
        ("close the water tap behind the machine now", "close the water tap behind the machine", True),
    ],
)
def test_near_equal(one, other, same):
    assert text.near_equal(one, other) is same


@pytest.mark.parametrize(
    ("part", "whole", "there"),
    [
        ("3", "wait 30 minutes", False),
        ("3", "wait 3분", True),
        ("3", "3.5 bar", False),
        ("불", "불을 켜세요", True),
        ("lint", "the splint", False),
        ("E18", "shows E18 when", True),
        ("", "x", False),
    ],
)
def test_stands_in(part, whole, there):
    assert text.stands_in(part, whole) is there

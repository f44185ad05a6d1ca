"""Documents of a folder -> chunks: Markdown, plain text and HTML, their headings kept as a path, cut at paragraphs.

Not for what is asked about them (questions.py). Nothing of a document is rendered or run; HTML's scripts and styles are
left out.
"""

from __future__ import annotations

import hashlib
import html.parser
import re
from dataclasses import dataclass
from pathlib import Path

from tunelet.domain.records import Chunk, Document
from tunelet.errors import TuneletError

ENDINGS = (".md", ".markdown", ".txt", ".html", ".htm")
SIZE = 1200  # characters of a chunk: a passage that an annotator reads at one glance
MOST_BYTES = 20_000_000  # of one document; a larger one is a dump, not a document

HEADING = re.compile(r"^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$")
UNDERLINE = re.compile(r"^ {0,3}(=+|-+)\s*$")
FENCE = re.compile(r"^ {0,3}(```|~~~)")
TERMS = re.compile(r"\*\*([^*\n]+?)\*\*|__([^_\n]+?)__|`([^`\n]+)`|[“\"「『]([^“”\"「」『』\n]{2,40})[”\"」』]")
BLOCKS = frozenset(
    ("p", "div", "li", "tr", "section", "article", "blockquote", "pre", "ul", "ol", "table", "dl", "dt", "dd", "br")
) | {"hr", "header", "footer", "main"}


@dataclass(frozen=True)
class Block:
    """A paragraph under its headings, or a heading alone where text is empty."""

    headings: tuple[str, ...]
    text: str
    terms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Read:
    """What a folder gave. skipped: path -> why, of files that were left out."""

    documents: list[Document]
    chunks: list[Chunk]
    skipped: dict[str, str]


def read(source: Path, size: int = SIZE) -> Read:
    """All documents below `source` (or the one file), in the order of their paths.

    Raises TuneletError where there is none, or one is not UTF-8, empty, too large or holds no text: all are named.
    """
    if size < 100:
        raise TuneletError(f"--size {size}: is too little for a passage", fix="100 characters or more")
    if not source.exists():
        raise TuneletError(f"{source}: there is no such file or folder", fix="name the folder that holds the documents")
    files = [source] if source.is_file() else _files(source)
    root = source.parent if source.is_file() else source
    wanted = [path for path in files if path.suffix.lower() in ENDINGS]
    skipped = {_name(path, root): "not Markdown, text or HTML" for path in files if path not in wanted}
    if not wanted:
        others = f"its {len(skipped)} files are of other kinds" if skipped else "it is empty"
        raise TuneletError(
            f"{source}: holds no documents", why=others, fix=f"put files there that end in {', '.join(ENDINGS)}"
        )
    problems: list[str] = []
    documents, chunks, seen = [], [], set()
    for path in wanted:
        name = _name(path, root)
        try:
            text, digest = _text(path, name)
            blocks = blocks_of(text, path.suffix.lower())
            made = [chunk for chunk in cut(blocks, name, size) if chunk.id not in seen]
        except TuneletError as error:
            problems.append(str(error.what))
            continue
        if not made:
            problems.append(f"{name}: holds no text")
            continue
        seen.update(chunk.id for chunk in made)
        title = next((block.headings[0] for block in blocks if block.headings), path.stem)
        documents.append(Document(path=name, sha256=digest, title=title, characters=len(text), chunks=len(made)))
        chunks += made
    if problems:
        raise TuneletError(
            f"{source}: {len(problems)} of {len(wanted)} documents can't be used\n" + "\n".join(problems),
            fix="mend these files, or take them out of the folder",
        )
    return Read(documents, chunks, skipped)


def _files(folder: Path) -> list[Path]:
    """Files below a folder but hidden ones and links that lead out of it: a document is what lies in the folder."""
    root = folder.resolve()
    found = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.resolve().is_relative_to(root):
            found.append(path)
    return found


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _text(path: Path, name: str) -> tuple[str, str]:
    """(text, sha256). Raises TuneletError where it cannot be read as text."""
    if path.stat().st_size > MOST_BYTES:
        raise TuneletError(f"{name}: has {path.stat().st_size / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f}")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if not data.strip():
        raise TuneletError(f"{name}: is empty")
    if b"\0" in data[:4096] and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise TuneletError(f"{name}: is no text (it holds zero bytes)")
    try:
        encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
        return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n"), digest
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        told = f"{name}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8"
        raise TuneletError(f"{told} (try: iconv -f {_likely(data)} -t UTF-8 {path.name})") from error


def _likely(data: bytes) -> str:
    """The encoding to try on bytes that are not UTF-8: Korean's where they decode to Hangul."""
    text = data.decode("cp949", "replace")
    beyond = sum(character > "\x7f" for character in text)
    return "CP949" if sum("가" <= character <= "힣" for character in text) > 0.6 * beyond else "CP1252"


def blocks_of(text: str, ending: str) -> list[Block]:
    """Paragraphs with their headings. ending: of the file's name, with its dot."""
    if ending in (".html", ".htm"):
        reader = _Html()
        reader.feed(text)
        reader.close()
        return reader.blocks()
    if ending == ".txt":
        return [Block((), part.strip(), _terms(part)) for part in re.split(r"\n\s*\n", text) if part.strip()]
    return _markdown(text)


def _markdown(text: str) -> list[Block]:
    blocks: list[Block] = []
    path: list[tuple[int, str]] = []
    lines: list[str] = []
    fence = ""

    def finish() -> None:
        raw = "\n".join(lines).strip("\n")
        lines.clear()
        if raw.strip():
            blocks.append(Block(tuple(name for _, name in path), plain(raw), _terms(raw)))

    def head(level: int, name: str) -> None:
        finish()
        while path and path[-1][0] >= level:
            path.pop()
        path.append((level, plain(name)))

    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # front matter is about the file, not in it
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    for line in text.split("\n"):
        mark = FENCE.match(line)
        if mark and (not fence or mark[1] == fence):
            fence = "" if fence else mark[1]
        elif fence:
            lines.append(line)
        elif found := HEADING.match(line):
            head(len(found[1]), found[2])
        elif (under := UNDERLINE.match(line)) and len(lines) == 1 and lines[0].strip():
            name = lines.pop()
            head(1 if under[1][0] == "=" else 2, name)
        elif not line.strip():
            finish()
        else:
            lines.append(line.rstrip())
    finish()
    return blocks


def plain(text: str) -> str:
    """Markdown's marks taken off, the words kept; a list's marks stay, because they tell its items apart."""
    text = re.sub(r"!\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1", r"\2", text)
    text = re.sub(r"(?<![\w*])\*(?=\S)([^*\n]+?)(?<=\S)\*(?![\w*])", r"\1", text)
    text = re.sub(r"`([^`\n]+)`", r"\1", text)
    text = re.sub(r"^\s*>\s?", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\|?[\s:|-]*\|[\s:|-]*$\n?", "", text, flags=re.MULTILINE)  # a table's rule
    text = re.sub(r"</?[a-zA-Z][^>]*>", "", text)
    return text.strip()


def _terms(raw: str) -> tuple[str, ...]:
    found = [next(part for part in match.groups() if part) for match in TERMS.finditer(raw)]
    return tuple(dict.fromkeys(plain(term).strip(" .,:;") for term in found if len(term) <= 40 and term.strip()))


class _Html(html.parser.HTMLParser):
    """Text of HTML in blocks, headings as a path, bold and code as terms."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._made: list[Block] = []
        self._path: list[tuple[int, str]] = []
        self._parts: list[str] = []
        self._terms: list[str] = []
        self._term: list[str] | None = None
        self._level = 0
        self._skip = 0

    def blocks(self) -> list[Block]:
        self._finish()
        return self._made

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "style", "template", "noscript", "title"):
            self._skip += 1
        elif re.fullmatch("h[1-6]", tag):
            self._finish()
            self._level = int(tag[1])
        elif tag in BLOCKS:
            self._finish()
        elif tag in ("td", "th"):
            self._parts.append(" ")
        elif tag in ("b", "strong", "code", "dfn", "em"):
            self._term = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style", "template", "noscript", "title"):
            self._skip = max(0, self._skip - 1)
        elif self._level and tag == f"h{self._level}":
            name, level = " ".join("".join(self._parts).split()), self._level
            self._parts, self._level = [], 0
            while self._path and self._path[-1][0] >= level:
                self._path.pop()
            if name:
                self._path.append((level, name))
        elif tag in BLOCKS:
            self._finish()
        elif tag in ("b", "strong", "code", "dfn", "em") and self._term is not None:
            term = " ".join("".join(self._term).split())
            self._terms += [term] if 0 < len(term) <= 40 else []
            self._term = None

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self._parts.append(data)
            if self._term is not None:
                self._term.append(data)

    def _finish(self) -> None:
        text = " ".join("".join(self._parts).split())
        if text and not self._level:
            terms = (*self._terms, *_terms(text))
            self._made.append(Block(tuple(n for _, n in self._path), text, tuple(dict.fromkeys(terms))))
        self._parts, self._terms = [], []


def cut(blocks: list[Block], document: str, size: int = SIZE) -> list[Chunk]:
    """Chunks of whole paragraphs under one heading, at most `size` characters; a longer paragraph is cut between
    sentences, and where one has no end in sight, at a space."""
    groups: list[tuple[tuple[str, ...], list[Block]]] = []
    for block in blocks:
        for text in _pieces(block.text, size):
            piece = Block(block.headings, text, tuple(term for term in block.terms if term in text))
            last = groups[-1] if groups else None
            room = size - sum(len(one.text) + 2 for one in last[1]) if last else 0
            if last and last[0] == block.headings and len(text) <= room:
                last[1].append(piece)
            else:
                groups.append((block.headings, [piece]))
    out, seen = [], set()
    for headings, members in groups:
        text = "\n\n".join(member.text for member in members)
        terms = tuple(dict.fromkeys(term for member in members for term in member.terms))
        key = hashlib.sha256("\n".join((document, *headings, text)).encode()).hexdigest()[:12]
        if key not in seen:
            seen.add(key)
            out.append(Chunk(id=key, document=document, headings=headings, text=text, terms=terms))
    return out


def _pieces(text: str, size: int) -> list[str]:
    out = []
    while len(text) > size:
        ends = [match.end() for match in re.finditer(r"[.!?。]\s+|\n", text[:size])]
        at = ends[-1] if ends else text.rfind(" ", 1, size)
        at = at if at > 0 else size
        out.append(text[:at].strip())
        text = text[at:].strip()
    return [piece for piece in (*out, text) if piece]

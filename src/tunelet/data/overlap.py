"""Contamination: which evaluation items stand in the training rows, word for word or lightly changed, and where.

Not duplicates among training rows (doctor_corpus.py) and not what the scores are without such items (evals/tainted.py).
Three signs, the strongest first:

- verbatim: 13 words in a row of an item stand in one training row (Brown et al., arXiv:2005.14165, appendix C); a
  shorter item whole, from 5 words on.
- 8-gram: at least half of the item's runs of 8 words stand in one row (Chowdhery et al., arXiv:2204.02311, take 70 %).
- fuzzy: so much of the item's runs of 3 words and of its words stands in one row, each weighted by how rare it is, that
  it is the same text with words changed. Counted exactly with an index, where MinHash would estimate it.

Runs of words that stand in many items or in many rows (instructions, templates) say nothing and are left out. Where all
text is made of a few patterns, rows of one pattern are alike all the same: look at what is named before leaving it out.
"""

from __future__ import annotations

import math
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tunelet.data.doctor_corpus import WORDS

LONG, EIGHT, THREE, SHORTEST = 13, 8, 3, 5
COMMON = 5  # a run of words in so many items is a template, unless these items are nearly all there are
ROWS, ROW_SHARE = 20, 0.002  # a run in more rows, and in that share of them, is a template of theirs
EIGHT_SHARE = 0.5
THREE_SHARE, WORD_SHARE = 0.15, 0.65
PATTERN = 0.8  # of the threes of a run: so many common ones make it a frame with a word or two filled in
FEW = 3  # rows: what is like more of them is made of the same patterns as they are, and no leak
FUZZY_WORDS = 8  # fewer words are too few to be known again when some are changed

Codes = tuple[int, ...]


@dataclass(frozen=True)
class Match:
    """item, row: places in what was given; kind: "verbatim", "8-gram" or "fuzzy"; share: of the item, 0 to 1; words: of
    the training row, where they begin to be alike."""

    item: int
    row: int
    kind: str
    share: float
    words: str


@dataclass(frozen=True)
class Overlap:
    """matches: the strongest one of each tainted item, in the items' order; short: items with too few words to tell."""

    matches: tuple[Match, ...]
    short: tuple[int, ...]
    rows: int

    @property
    def tainted(self) -> frozenset[int]:
        return frozenset(match.item for match in self.matches)


def words_of(text: str) -> list[str]:
    return WORDS.findall(unicodedata.normalize("NFKC", text).casefold())


def _codes(words: Sequence[str]) -> Codes:
    return tuple(zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words)


def _runs(codes: Codes, n: int) -> Iterator[Codes]:
    return (codes[at : at + n] for at in range(len(codes) - n + 1))


class _Items:
    """The items' runs of words, by length: run -> the items that have it."""

    def __init__(self, texts: Sequence[str]):
        self.codes = [_codes(words_of(text)) for text in texts]
        self.short = tuple(place for place, codes in enumerate(self.codes) if len(codes) < SHORTEST)
        self.verbatim: dict[int, dict[Codes, list[int]]] = {}
        self.eight: dict[Codes, list[int]] = defaultdict(list)
        self.three: dict[Codes, list[int]] = defaultdict(list)
        verbatim: dict[int, dict[Codes, list[int]]] = defaultdict(lambda: defaultdict(list))
        whole = Counter(self.codes)
        for place, codes in enumerate(self.codes):
            if len(codes) < SHORTEST:
                continue
            n = min(LONG, len(codes))
            for run in set(_runs(codes, n)):
                verbatim[n][run].append(place)
            for run in set(_runs(codes, EIGHT)):
                self.eight[run].append(place)
            if len(codes) >= FUZZY_WORDS:
                for run in set(_runs(codes, THREE)):
                    self.three[run].append(place)
        self.most = max(COMMON, len(texts) // 1000, *whole.values()) if texts else COMMON
        for index in (*verbatim.values(), self.eight):
            for run in [run for run, places in index.items() if len(places) > self.most]:
                del index[run]
        self.verbatim = dict(verbatim)
        self.eights = Counter(place for places in self.eight.values() for place in places)
        # how rare a run or a word is among the items
        total = math.log(1 + len(texts))
        self.weight = {run: total - math.log(len(places)) + 0.1 for run, places in self.three.items()}
        words = Counter(code for codes in self.codes for code in set(codes))
        self.rare = {code: total - math.log(count) + 0.1 for code, count in words.items()}
        self.threes = [sum(self.weight[run] for run in set(_runs(codes, THREE))) if len(codes) >= FUZZY_WORDS else 0.0
                       for codes in self.codes]  # fmt: skip
        self.words = [sum(self.rare[code] for code in set(codes)) for codes in self.codes]

    def leave_out_templates(self, rows: Sequence[Codes]) -> None:
        """Forget runs that many rows or items have: what is left of an item made of them proves nothing. A longer run
        is forgotten where nearly all of its threes are such."""
        most = max(ROWS, ROW_SHARE * len(rows))
        common = {run for run, places in self.three.items() if len(places) > 4 * self.most}
        for n, index in ((EIGHT, self.eight), (THREE, self.three)):
            counts = Counter(run for codes in rows for run in set(_runs(codes, n)) if run in index)
            many = [run for run, count in counts.items() if count > most]
            common.update(many if n == THREE else ())
            for run in many:
                del index[run]
        for n, index in self.verbatim.items():
            for run in [run for run in index if sum(part in common for part in _runs(run, THREE)) > PATTERN * (n - 2)]:
                del index[run]


def find(rows: Sequence[str], items: Sequence[str], progress: Callable[[int], None] | None = None) -> Overlap:
    """Every item of `items` (its question, or whatever a model must not have seen) that stands in one of `rows`.
    progress: called with the number of rows that have been compared."""
    index = _Items(items)
    split = [words_of(text) for text in rows]
    codes = [_codes(words) for words in split]
    index.leave_out_templates(codes)
    best: dict[int, Match] = {}
    alike: Counter[int] = Counter()  # rows that are fuzzily an item
    for number, (words, own) in enumerate(zip(split, codes, strict=True)):
        for match in _in_row(index, number, words, own):
            alike[match.item] += match.kind == "fuzzy"
            known = best.get(match.item)
            if known is None or _rank(match) > _rank(known):
                best[match.item] = match
        if progress is not None:
            progress(number + 1)
    found = [best[item] for item in sorted(best) if best[item].kind != "fuzzy" or alike[item] <= FEW]
    return Overlap(tuple(found), index.short, len(rows))


def _rank(match: Match) -> tuple[int, float]:
    return ("fuzzy", "8-gram", "verbatim").index(match.kind), match.share


def _in_row(index: _Items, row: int, words: Sequence[str], codes: Codes) -> Iterator[Match]:
    said: set[int] = set()
    for n, runs in index.verbatim.items():
        for at, run in enumerate(_runs(codes, n)):
            for item in runs.get(run, ()):
                if item not in said:
                    said.add(item)
                    share = _share_of(index.codes[item], codes)
                    yield Match(item, row, "verbatim", share, " ".join(words[at : at + n]))
    eights: Counter[int] = Counter()
    places: dict[int, int] = {}
    seen: set[Codes] = set()
    for at, run in enumerate(_runs(codes, EIGHT)):
        if run in index.eight and run not in seen:
            seen.add(run)
            for item in index.eight[run]:
                eights[item] += 1
                places.setdefault(item, at)
    for item, count in eights.items():
        if item not in said and count >= EIGHT_SHARE * index.eights[item]:
            said.add(item)
            at = places[item]
            yield Match(item, row, "8-gram", count / index.eights[item], " ".join(words[at : at + EIGHT]))
    yield from _fuzzy(index, row, words, codes, said)


def _fuzzy(index: _Items, row: int, words: Sequence[str], codes: Codes, said: set[int]) -> Iterator[Match]:
    threes: dict[int, float] = defaultdict(float)
    places: dict[int, list[int]] = defaultdict(list)
    seen: set[Codes] = set()
    for at, run in enumerate(_runs(codes, THREE)):
        if run in index.three and run not in seen:
            seen.add(run)
            for item in index.three[run]:
                threes[item] += index.weight[run]
                places[item].append(at)
    for item, weight in threes.items():
        if item in said or weight < THREE_SHARE * index.threes[item]:
            continue
        own, at = index.codes[item], places[item][len(places[item]) // 2]
        near = set(codes[max(0, at - len(own)) : at + len(own)])
        share = sum(index.rare[code] for code in set(own) & near) / index.words[item]
        if share >= WORD_SHARE:
            yield Match(item, row, "fuzzy", share, " ".join(words[at : at + EIGHT]))


def _share_of(item: Codes, row: Codes) -> float:
    """Of the item's words, those in runs of three that the row has too."""
    n = min(THREE, len(item))
    runs = set(_runs(row, n))
    covered: set[int] = set()
    for at, run in enumerate(_runs(item, n)):
        if run in runs:
            covered.update(range(at, at + n))
    return len(covered) / len(item)

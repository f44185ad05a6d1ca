"""Checks that need all rows: duplicates, contradictions, lengths, answers that were cut at the source.

Not for what one row shows by itself: doctor_rows.py. Everything yields (number of the row, Said).
"""

from __future__ import annotations

import hashlib
import heapq
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from tunelet.data.doctor_rows import Said, turns_of
from tunelet.data.examples import Chat, Example, Labelled, Message, Preference, Text
from tunelet.data.scripts import STRUCTURED

WORDS = re.compile(r"\w+")
# Long answers that end without a full stop: none at all in edited corpora, 3 % and more where lists and titles are
# answers too. Up to this share they are taken for accidents.
RARE = 0.025
SKETCH = 6


def look_at_all(examples: Sequence[Example]) -> Iterator[tuple[int, Said]]:
    """Everything odd that only the corpus shows, as (index into examples, what)."""
    same = list(_duplicates(examples))
    yield from same
    gone = {index for index, _ in same}
    yield from _near(examples, gone)
    yield from _conflicts(examples, gone)
    yield from _lengths(examples)
    yield from _cut({i: answer.content for i, e in enumerate(examples) if (answer := last_answer(e))})
    rejected = {i: e.rejected[-1].content for i, e in enumerate(examples) if isinstance(e, Preference)}
    for index, seen in _cut(rejected):  # it may well be worse for that; but many teach to tell cut answers from whole
        yield index, seen._replace(kind="cut_rejected", severity="info", message=f"rejected: {seen.message}")


def _key(example: Example) -> bytes:
    parts = [f"{t.role}\x00{t.content}\x00{t.tool_calls or ''}" for t in all_turns(example)]
    return hashlib.blake2b("\x01".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def all_turns(example: Example) -> Sequence[Message]:
    """Every turn of an example, those of rejected and bad answers too."""
    if isinstance(example, Preference):
        return (*turns_of(example), *example.rejected)
    if isinstance(example, Labelled):
        return (*example.prompt, *example.completion, Message("label", str(example.label)))
    return turns_of(example)


def normal(text: str) -> str:
    """Without case, spaces, punctuation and forms of one letter; numbers and letters stay."""
    return "".join(WORDS.findall(unicodedata.normalize("NFKC", text).casefold()))


def _duplicates(examples: Sequence[Example]) -> Iterator[tuple[int, Said]]:
    seen: dict[bytes, int] = {}
    for index, example in enumerate(examples):
        first = seen.setdefault(_key(example), index)
        if first != index:
            yield index, Said("duplicate", "warning", f"the same row as {examples[first].origin}", "keep one of them")


def _near(examples: Sequence[Example], gone: set[int]) -> Iterator[tuple[int, Said]]:
    """Rows that differ in case, spaces or punctuation only; and long rows of which about one word in twenty differs."""
    seen: dict[str, int] = {}
    buckets: dict[int, list[int]] = defaultdict(list)
    shingled: dict[int, frozenset[int]] = {}
    answered: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        if index in gone:
            continue
        text = "\n".join(f"{turn.role}\x00{normal(turn.content)}" for turn in all_turns(example))
        if len(text) < 30:
            continue
        other = seen.setdefault(text, index)
        if other == index:
            other = _asked_alike(index, example, answered, examples)
        if other == index:
            grams = _shingles(" ".join(turn.content for turn in all_turns(example)))
            if len(grams) >= 40:
                other = _alike(index, grams, shingled, buckets, examples)
        if other != index:
            yield (
                index,
                Said("near_duplicate", "warning", f"nearly the row {examples[other].origin}", "keep one of them"),
            )


def _asked_alike(index: int, example: Example, answered: dict[str, list[int]], examples: Sequence[Example]) -> int:
    """An earlier row with the same long answer in prose and nearly the same question, else `index`."""
    turns = turns_of(example)
    if not isinstance(example, Chat) or len(turns) != 2 or turns[1].content.count(" ") < 8:
        return index
    if STRUCTURED.search(turns[1].content):  # many ways of asking for one command are what a command needs
        return index
    words = set(WORDS.findall(turns[0].content.casefold()))
    same = answered[normal(turns[1].content)]
    for other in same[:20]:
        others = set(WORDS.findall(turns_of(examples[other])[0].content.casefold()))
        if len(words & others) >= 0.8 * len(words | others) and _same_numbers(example, examples[other]):
            return other
    same.append(index)
    return index


def _alike(
    index: int,
    grams: frozenset[int],
    shingled: dict[int, frozenset[int]],
    buckets: dict[int, list[int]],
    examples: Sequence[Example],
) -> int:
    """An earlier row that shares nearly all shingles with row `index`, else `index`. Only rows that share one of the
    smallest hashes are compared (a MinHash of one row each), and of a crowded bucket only the first 20."""
    sketch = heapq.nsmallest(SKETCH, grams)
    for other in dict.fromkeys(other for part in sketch for other in buckets[part][:20]):
        both = len(grams & shingled[other])
        union = len(grams) + len(shingled[other]) - both
        pair = examples[index], examples[other]
        if both >= 0.85 * union and _same_numbers(*pair) and _parts_alike(*pair):
            return other
    shingled[index] = grams
    for part in sketch:
        buckets[part].append(index)
    return index


def _shingles(text: str) -> frozenset[int]:
    """Hashes of every three words in a row; the same in every process, so that findings are."""
    codes = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in WORDS.findall(text.casefold())]
    triples = zip(codes, codes[1:], codes[2:], strict=False)
    return frozenset((one * 31 + two * 131 + three * 65599) & 0xFFFFFFFF for one, two, three in triples)


def _parts_alike(one: Example, other: Example) -> bool:
    """Whether each part of a pair is nearly that of another: one long prompt may have many short answers."""
    if isinstance(one, Chat | Text):
        return True
    names = ("prompt", "chosen", "rejected") if isinstance(one, Preference) else ("prompt", "completion")
    if type(one) is not type(other) or getattr(one, "label", True) != getattr(other, "label", True):
        return False
    for name in names:
        words = [set(WORDS.findall(" ".join(t.content for t in getattr(row, name)).casefold())) for row in (one, other)]
        if len(words[0] & words[1]) < 0.8 * len(words[0] | words[1]):
            return False
    return True


def _same_numbers(one: Example, other: Example) -> bool:
    """Rows made from one pattern with other numbers are different rows."""
    numbers = [re.findall(r"\d+", " ".join(turn.content for turn in turns_of(row))) for row in (one, other)]
    return numbers[0] == numbers[1]


def _conflicts(examples: Sequence[Example], gone: set[int]) -> Iterator[tuple[int, Said]]:
    """One prompt, different answers. In a corpus that has several answers to many prompts that is how it is made."""
    answers: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for index, example in enumerate(examples):
        turns = turns_of(example)
        if not isinstance(example, Chat) or index in gone or turns[-1].role != "assistant":
            continue
        asked = "\x01".join(f"{turn.role}\x00{turn.content.strip()}" for turn in turns[:-1])
        answers[asked].append((index, normal(turns[-1].content)))
    found = []
    for group in answers.values():
        first = group[0]
        found += [(index, first[0]) for index, answer in group[1:] if answer != first[1]]
    severity = "warning" if len(found) <= 0.005 * len(examples) else "info"
    for index, first in found:
        yield (
            index,
            Said(
                "conflicting_answers",
                severity,
                f"another answer to the prompt of {examples[first].origin}",
                "keep the right one",
            ),
        )


def last_answer(example: Example) -> Message | None:
    """The last assistant turn of a row with words in it."""
    return next((t for t in reversed(turns_of(example)) if t.role == "assistant" and t.content.strip()), None)


def _lengths(examples: Sequence[Example]) -> Iterator[tuple[int, Said]]:
    lengths = {i: len(answer.content) for i, e in enumerate(examples) if (answer := last_answer(e))}
    if len(lengths) < 100:
        return
    ordered = sorted(lengths.values())
    median, most = ordered[len(ordered) // 2], ordered[int(0.95 * len(ordered))]
    for index, length in lengths.items():
        if length > 6 * most and length > 1000:
            yield (
                index,
                Said(
                    "length_outlier",
                    "warning",
                    f"the answer has {length:,} characters; half of all have at most {median:,}, 95 % at most {most:,}",
                    "look whether several answers ran together",
                ),
            )


def _cut(answers: dict[int, str]) -> Iterator[tuple[int, Said]]:
    """Answers that a limit cut before they came here: many end without a full stop at one length, or (where nearly all
    answers end with one) a long answer ends inside a sentence."""
    long = {i: text for i, text in answers.items() if len(text) >= 40}
    if len(long) < 20:
        return
    open_ended = {i for i, text in long.items() if _open(text.rstrip()) and not STRUCTURED.search(text)}
    unclosed = {i for i, text in long.items() if text[-1].isalnum() or text[-1] in ",;- "}
    lengths = Counter(map(len, long.values()))
    counts = Counter(len(long[i]) for i in unclosed)
    common = len(unclosed) > 0.1 * len(long)
    piled = set()
    for length, count in counts.items():  # a limit is a pile that stands out from its neighbours
        beside = sum(counts.get(length + step, 0) for step in range(-10, 11) if step)
        stands_out = count >= 5 and count >= 0.8 * lengths[length] and count >= 3 * beside / 20 + 3
        longer = sum(many for other, many in lengths.items() if other > length) if stands_out and common else 0
        if stands_out and longer <= 3 * count + 0.02 * len(long):
            piled.add(length)
    rare = len(open_ended) <= RARE * len(long)
    for index in sorted(unclosed):
        text = long[index]
        if len(text) in piled:
            message = f"one of {counts[len(text)]} answers that break off at {len(text)} characters"
        elif rare and index in open_ended:
            message = f"the answer ends in mid-sentence: '...{text[-30:]}'; nearly all others end with a full stop"
        else:
            continue
        yield index, Said("cut_answer", "warning", message, "take the whole answer from its source")


def _open(text: str) -> bool:
    """Whether prose ends inside a sentence: with a letter or a comma. Korean sentences end with 다, 요 and so on."""
    if "\n" in text[-80:].strip() and not text[-80:].rsplit("\n", 1)[1].strip().count(" ") > 3:
        return False  # the last line of a list, a verse or a table
    return (text[-1].isalpha() and text[-1] not in "다요까죠네지음함됨임") or text[-1] in ",;-"

"""Checks of pairs and verdicts: answers that hardly differ, contradictions, length bias, answers to another prompt, and
pairs that a model would order the other way round.

Not for what any conversation may have (doctor_rows.py, doctor_corpus.py). Everything yields (number of the row, Said);
-1 stands for the whole set.
"""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, NamedTuple

from tunelet.data.doctor_rows import TEMPLATE_TOKENS, WORDS, Said
from tunelet.data.examples import Example, Labelled, Message, Preference, Tokens
from tunelet.data.scripts import STRUCTURED

if TYPE_CHECKING:
    from tunelet.data.render import Renderer

PROSE_MARKS = re.compile(r"[\s.,;:!?'\"“”‘’*_`#…。]+")
PIECES = re.compile(r"\w+|[^\w\s]")
# Of 1,000 pairs of UltraFeedback none of 40 words or more is as alike as this, of 100 of LLMBar none either.
ALIKE, ALIKE_WORDS = 0.95, 40
STRONG = 2 / 3  # a share of pairs: beyond it length tells chosen from rejected well enough to be learned in its place
SURE = 5.0  # nats: e^5, one answer is 150 times as likely as the other
JUDGE = 0.6  # share of the pairs it is sure of that a model has to order as they are labelled, to be asked about others
INVERTED = 0.1  # where it orders no more of them so, they are all the wrong way round (weak models came to 0.24)
ENOUGH = 10  # such pairs, to know that share
CHUNK = 32  # pairs scored between two signs of progress


# One pair ----------------------------------------------------------------------------------------------------------


def look(pair: Preference) -> Iterator[Said]:
    """What one pair shows."""
    yield from _difference(_text(pair.chosen), _text(pair.rejected))
    for name, turns in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if any(turn.role == "user" for turn in turns):
            message = f"the {name} answer has turns of the user in it: conversations are compared, not answers"
            yield Said("turns_in_answer", "warning", message, "cut both after the first answer that differs")
    found = next((hit for turn in pair.rejected if (hit := TEMPLATE_TOKENS.search(turn.content))), None)
    if found:
        # What a rejected answer says may be anything, but this would teach against the template's own tokens.
        message = f"the rejected answer has a chat template's '{found.group()}' in its text"
        yield Said("template_tokens", "warning", message, "take it out of the text")


def _text(turns: Sequence[Message]) -> str:
    return "\n".join(f"{turn.content}{turn.tool_calls or ''}" for turn in turns)


def _difference(chosen: str, rejected: str) -> Iterator[Said]:
    if chosen == rejected:  # mending can make them so
        yield Said("identical_answers", "warning", "chosen and rejected are the same", "remove the row")
        return
    if STRUCTURED.search(chosen) or STRUCTURED.search(rejected):
        return  # in code and JSON one letter may be the whole difference
    if plain(chosen) == plain(rejected):
        yield Said(
            "identical_answers", "warning", "chosen and rejected differ in case or spaces only", "remove the row"
        )
        return
    numbers = [re.findall(r"\d+", text) for text in (chosen, rejected)]
    if numbers[0] != numbers[1]:
        return
    bare = [PROSE_MARKS.sub("", unicodedata.normalize("NFKC", text).casefold()) for text in (chosen, rejected)]
    pieces = [PIECES.findall(text) for text in (chosen, rejected)]
    if bare[0] == bare[1]:
        message = "chosen and rejected differ in punctuation only"
    elif min(map(len, pieces)) >= ALIKE_WORDS and (ratio := _ratio(*pieces)) >= ALIKE:
        message = f"{ratio:.0%} of chosen and rejected is the same"
    else:
        return
    yield Said("near_identical_answers", "warning", message, "remove the row, or take a clearer rejected answer")


def _ratio(one: list[str], other: list[str]) -> float:
    """difflib's share of words in common and in order; 0 where a quick upper bound lies below ALIKE already."""
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    alike = matcher.real_quick_ratio() >= ALIKE and matcher.quick_ratio() >= ALIKE
    return matcher.ratio() if alike else 0.0


def plain(text: str) -> str:
    """Without differences of case and of white space."""
    return " ".join(text.casefold().split())


# All rows ----------------------------------------------------------------------------------------------------------


def look_at_all(examples: Sequence[Example]) -> Iterator[tuple[int, Said]]:
    """What only the whole set shows."""
    pairs = [(index, example) for index, example in enumerate(examples) if isinstance(example, Preference)]
    yield from _contradictions(examples, pairs)
    yield from _other_prompts(pairs)
    yield from _length_bias([pair for _, pair in pairs])


def _asked(example: Preference | Labelled) -> str:
    return "\x01".join(f"{turn.role}\x00{plain(turn.content)}" for turn in example.prompt)


def _contradictions(examples: Sequence[Example], pairs: Sequence[tuple[int, Preference]]) -> Iterator[tuple[int, Said]]:
    """One pair labelled both ways, or one answer judged good and bad: all such rows, for none is known to be right."""
    orders: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for index, pair in pairs:
        orders[_asked(pair), plain(_text(pair.chosen)), plain(_text(pair.rejected))].append(index)
    for (asked, better, worse), rows in orders.items():
        against = orders.get((asked, worse, better), []) if better != worse else []
        for index in rows if against else ():
            message = f"{examples[against[0]].origin} has the same pair, and prefers the other answer"
            yield index, Said("conflicting_pairs", "warning", message, "keep the right one")
    verdicts: dict[tuple[str, str, bool], list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        if isinstance(example, Labelled):
            verdicts[_asked(example), plain(_text(example.completion)), example.label].append(index)
    for (asked, answer, label), rows in verdicts.items():
        against = verdicts.get((asked, answer, not label), [])
        for index in rows if against else ():
            message = f"{examples[against[0]].origin} has the same answer, with the opposite verdict"
            yield index, Said("conflicting_labels", "warning", message, "keep the right one")


def _other_prompts(pairs: Sequence[tuple[int, Preference]]) -> Iterator[tuple[int, Said]]:
    """An answer that is another row's prompt, or word for word a long answer to one other, quite different prompt. (To
    many prompts the same is said where nothing else can be: refusals, greetings.)"""
    prompts: dict[str, int] = {}
    given: dict[str, dict[str, tuple[int, str]]] = defaultdict(dict)
    for index, pair in pairs:
        asked = plain(_text(pair.prompt[-1:]))
        if len(asked) >= 25:
            prompts.setdefault(asked, index)
        for name, turns in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            answer = plain(_text(turns))
            if len(answer) >= 80 and answer.count(" ") >= 10 and not STRUCTURED.search(answer):
                given[answer].setdefault(asked, (index, name))
    places = dict(pairs)
    for index, pair in pairs:
        for name, turns in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            other = prompts.get(plain(_text(turns)), index)
            if other != index:
                message = f"the {name} answer is the prompt of {places[other].origin}"
                yield index, Said("other_prompt", "warning", message, "write the answer")
    for answer, under in given.items():
        if len(under) != 2:
            continue
        words = [set(WORDS.findall(asked)) for asked in under]
        numbers = [re.findall(r"\d+", asked) for asked in under]
        if numbers[0] == numbers[1] and len(words[0] & words[1]) >= 0.3 * len(words[0] | words[1]):
            continue  # one question in two phrasings
        # of the two rows the one whose prompt has less to do with the answer; the later one where that is no help
        said = set(WORDS.findall(answer))
        fit = [len(asked & said) / max(1, len(asked)) for asked in words]
        (other, _), (index, name) = under.values()
        if fit[0] < fit[1]:
            (index, name), (other, _) = under.values()
        message = f"the {name} answer is word for word that of {places[other].origin}, to another prompt"
        yield index, Said("other_prompt", "warning", message, "give the answer to this prompt")


def _length_bias(pairs: Sequence[Preference]) -> Iterator[tuple[int, Said]]:
    sizes = [(len(_text(pair.chosen)), len(_text(pair.rejected))) for pair in pairs]
    uneven = [(chosen, rejected) for chosen, rejected in sizes if chosen != rejected and chosen and rejected]
    if len(uneven) < 20:
        return
    share = sum(chosen > rejected for chosen, rejected in uneven) / len(uneven)
    half = 0.98 / len(uneven) ** 0.5  # 95 %, for any share: 1.96 standard errors at one half
    if abs(share - 0.5) <= half:
        return
    longer = share > 0.5
    times = statistics.median(chosen / rejected for chosen, rejected in uneven)
    message = (
        f"chosen is longer in {share:.0%} of {len(uneven)} pairs (95 %: {max(0.0, share - half):.0%} to "
        f"{min(1.0, share + half):.0%}), {times:.2f} times as long in the median: DPO learns that too, and answers "
        f"{'grow' if longer else 'shrink'}"
    )
    strong = abs(share - 0.5) - half > STRONG - 0.5
    fix = f"add pairs whose better answer is the {'shorter' if longer else 'longer'} one, or take a loss by the token"
    yield -1, Said("length_bias", "warning" if strong else "info", message, fix)


# With a model ------------------------------------------------------------------------------------------------------


class Margin(NamedTuple):
    """How much more likely a model finds the chosen answer than the rejected one: nats in all, and by the token."""

    total: float
    by_token: float


def margins(
    examples: Sequence[Example],
    renderer: Renderer,
    losses: Callable[[Sequence[Tokens]], Sequence[tuple[float, int]]],
    max_length: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Margin | None]:
    """log p(chosen | prompt) - log p(rejected | prompt) of every pair, by `losses` (evals.held_out.losses of a model).

    None for rows that are no pairs, that the template refuses, or of which an answer ends beyond `max_length` tokens.
    """
    from tunelet.data import branches

    out: list[Margin | None] = [None] * len(examples)
    for start in range(0, len(examples), CHUNK):
        places, rows = [], []
        for place, example in enumerate(examples[start : start + CHUNK], start):
            made = branches.pairs(renderer, [example], []) if isinstance(example, Preference) else []
            if made and (not max_length or branches.longest(made[0]) <= max_length):
                places.append(place)
                rows += [made[0].only(0), made[0].only(1)]
        found = losses(rows) if rows else []
        for place, (good, more), (bad, fewer) in zip(places, found[0::2], found[1::2], strict=True):
            out[place] = Margin(bad - good, bad / fewer - good / more)
        progress(min(start + CHUNK, len(examples)), len(examples))
    return out


def swapped(found: Sequence[Margin | None]) -> Iterator[tuple[int, Said]]:
    """Pairs that a model would clearly order the other way round, where it is a judge of the set at all.

    By the total, which is what DPO compares, and which told swapped starter pairs from others better than the mean by
    the token (AUC 0.98 against 0.92); and by the token too, so that a long answer is not suspected for its length.
    """
    sure = {
        index: margin
        for index, margin in enumerate(found)
        if margin and abs(margin.total) > SURE and (margin.total > 0) == (margin.by_token > 0)
    }
    scored = sum(margin is not None for margin in found)
    if not scored:
        return
    against = [index for index, margin in sure.items() if margin.total < 0]
    agrees = 1 - len(against) / len(sure) if sure else 0.0
    told = f"the model is sure of {len(sure)} of {scored} pairs"
    told += f", and orders {agrees:.0%} of these as they are labelled" if sure else ""
    if scored < len(found):
        told += f" ({len(found) - scored} are longer than it reads, or cannot be rendered)"
    if len(sure) >= ENOUGH and agrees <= INVERTED:
        message = f"{told}: chosen and rejected may be the wrong way round in the whole set"
        yield -1, Said("swapped_columns", "warning", message, "read some pairs, and swap the columns where it is so")
    elif len(sure) < ENOUGH or agrees < JUDGE:
        message = f"{told}: too little to judge single pairs by it"
        yield -1, Said("margins", "info", message, "take a model that was tuned on such answers")
    else:
        yield -1, Said("margins", "info", told, "")
        for index in against:
            message = f"margin {sure[index].total:.1f} nats: the model finds the rejected answer far more likely"
            yield (
                index,
                Said("possibly_swapped", "warning", message, "read the pair, and swap it where the label is wrong"),
            )

"""Clean pairs of the starter and of prose, with faults of known kinds planted in known rows; the same every time."""

# ruff: noqa: E501  -- a table of faults, one a line

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from planted import _long, english

from tunelet import starter

Pair = dict[str, Any]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def prose(draw: random.Random, sentences: int = 1) -> Pair:
    """A pair of prose: the rejected answer is to the point, but another one."""
    asked, answer = _long(draw)
    more = " ".join(_long(draw)[1] for _ in range(sentences - 1))
    return {"prompt": asked, "chosen": f"{answer} {more}".strip(), "rejected": english(draw, 0)[1]}


def wide(pair: Pair) -> Pair:
    """The pair as answers that hold their prompt (the implicit format)."""
    asked = turn("user", pair["prompt"])
    return {key: [asked, turn("assistant", pair[key])] for key in ("chosen", "rejected")}


def _set(**changes: Callable[[Pair, random.Random], Any]) -> Callable[[Pair, random.Random], Any]:
    return lambda pair, draw: {**pair, **{key: change(pair, draw) for key, change in changes.items()}}


def _without(*keys: str) -> Callable[[Pair, random.Random], Any]:
    return lambda pair, draw: {key: value for key, value in pair.items() if key not in keys}


def _one_word(pair: Pair, draw: random.Random) -> Pair:
    pair = prose(draw, sentences=3)
    words = pair["chosen"].split()
    place = next(n for n, word in enumerate(words) if n > 5 and word.isalpha())
    return {**pair, "rejected": " ".join([*words[:place], "surely", *words[place + 1 :]])}


def _cut(pair: Pair, draw: random.Random) -> Pair:
    words = pair["chosen"].split()
    keep = len(words) * 2 // 3
    while not words[keep - 1].isalpha():
        keep -= 1
    return {**pair, "chosen": " ".join(words[:keep])}


def _other_user(pair: Pair, draw: random.Random) -> Pair:
    wider = wide(pair)
    wider["rejected"][0] = turn("user", english(draw, 0)[0] + " And why?")
    return wider


def _goes_on(pair: Pair, draw: random.Random) -> Pair:
    wider = wide(pair)
    for key, asked in (("chosen", "Thanks. What then?"), ("rejected", "No. And now?")):
        wider[key] += [turn("user", asked), turn("assistant", _long(draw)[1])]
    return wider


# kind -> (what makes a pair faulty, kinds of finding that count as found). A str result is the raw line.
FAULTS: dict[str, tuple[Callable[[Pair, random.Random], Any], set[str]]] = {
    "broken_json": (lambda pair, draw: json.dumps(pair)[: -draw.randint(2, 20)], {"broken_json"}),
    "no_prompt": (_without("prompt"), {"no_prompt"}),
    "empty_prompt": (_set(prompt=lambda pair, draw: "  "), {"empty_prompt"}),
    "no_rejected": (_without("rejected"), {"not_a_preference"}),
    "a_chat": (lambda pair, draw: {"prompt": pair["prompt"], "completion": pair["chosen"]}, {"not_a_preference"}),
    "empty_chosen": (_set(chosen=lambda pair, draw: ""), {"empty_answer"}),
    "blank_rejected": (_set(rejected=lambda pair, draw: " \n"), {"empty_answer"}),
    "no_rejected_in_list": (_set(rejected=lambda pair, draw: []), {"empty_answer"}),
    "identical": (_set(rejected=lambda pair, draw: pair["chosen"]), {"identical_answers"}),
    "identical_but_case": (_set(rejected=lambda pair, draw: "  " + pair["chosen"].upper().replace(" ", "  ", 2)), {"identical_answers"}),
    "other_punctuation": (_set(rejected=lambda pair, draw: pair["chosen"].rstrip(".") + "!"), {"near_identical_answers"}),
    "one_word": (_one_word, {"near_identical_answers"}),
    "swapped_scores": (_set(score_chosen=lambda pair, draw: draw.randint(1, 4), score_rejected=lambda pair, draw: "5"), {"swapped_scores"}),
    "tied_scores": (_set(score_chosen=lambda pair, draw: 4, score_rejected=lambda pair, draw: "4.0"), {"tied_scores"}),
    "score_in_words": (_set(score_chosen=lambda pair, draw: "great", score_rejected=lambda pair, draw: 1), {"bad_score"}),
    "tied_completions": (lambda pair, draw: {"prompt": pair["prompt"], "completions": [{"response": pair[key], "score": 3} for key in ("chosen", "rejected")]}, {"tied_scores"}),
    "no_scores": (lambda pair, draw: {"prompt": pair["prompt"], "responses": [pair["chosen"], pair["rejected"]]}, {"no_scores"}),
    "three_answers": (lambda pair, draw: {"input": pair["prompt"], "output_1": pair["chosen"], "output_2": pair["rejected"], "output_3": "No.", "label": 1}, {"several_answers"}),
    "label_of_none": (lambda pair, draw: {"input": pair["prompt"], "output_1": pair["chosen"], "output_2": pair["rejected"], "label": 3}, {"bad_label"}),
    "other_prompt_in_rejected": (_other_user, {"different_prompts"}),
    "other_prompt_in_column": (lambda pair, draw: {**wide(pair), "prompt": english(draw, 0)[0] + " And why?"}, {"different_prompts"}),
    "turns_in_answers": (_goes_on, {"turns_in_answer"}),
    "role_in_chosen": (_set(chosen=lambda pair, draw: "Assistant: " + pair["chosen"]), {"role_prefix"}),
    "tokens_in_chosen": (_set(chosen=lambda pair, draw: pair["chosen"] + "<|im_end|>"), {"template_tokens"}),
    "tokens_in_rejected": (_set(rejected=lambda pair, draw: pair["rejected"] + "</s>"), {"template_tokens"}),
    "copies_prompt": (_set(chosen=lambda pair, draw: pair["prompt"]), {"copies_prompt"}),
    "cut": (_cut, {"cut_answer"}),
    "no_content": (_set(chosen=lambda pair, draw: "N/A"), {"no_content"}),
}  # fmt: skip
# These need another row: its pair again, nearly again or the other way round, its prompt or its answer as an answer.
RELATIVES: dict[str, tuple[Callable[[Pair, Pair], Pair], set[str]]] = {
    "duplicate": (lambda pair, donor: donor, {"duplicate"}),
    "near_duplicate": (lambda pair, donor: {**donor, "prompt": donor["prompt"].upper() + " "}, {"near_duplicate"}),
    "both_ways": (lambda pair, donor: {**donor, "chosen": donor["rejected"], "rejected": donor["chosen"]}, {"conflicting_pairs"}),
    "prompt_as_answer": (lambda pair, donor: {**pair, "rejected": donor["prompt"]}, {"other_prompt"}),
    "answer_to_another": (lambda pair, donor: {**pair, "chosen": donor["chosen"]}, {"other_prompt"}),
}  # fmt: skip


def corpus(rows: int = 2200, each: int = 10, seed: int = 0) -> tuple[list[str], dict[int, tuple[str, set[str]]]]:
    """(lines of a JSONL file, line number -> (planted fault, kinds of finding that count as found))."""
    draw = random.Random(seed)
    made: list[Any] = list(starter.rows("preference", "train", n=rows // 2, seed=seed))
    prompts: set[str] = set()
    while len(made) < rows:
        pair = prose(draw)
        if pair["prompt"] not in prompts:
            prompts.add(pair["prompt"])
            made.append(pair)
    plan = [kind for kind in (*FAULTS, *RELATIVES) for _ in range(each)]
    places = draw.sample(range(rows // 2, rows), len(plan) + each * len(RELATIVES))  # all of prose
    donors, places = places[len(plan) :], places[: len(plan)]
    planted = {}
    for place, kind in zip(places, plan, strict=True):
        if kind in RELATIVES:
            donor = donors.pop()
            if place < donor:  # the row that comes second is the one that is found
                place, donor = donor, place
            make, found = RELATIVES[kind]
            if kind == "both_ways":
                planted[donor + 1] = (kind, found)
            made[place] = make(made[place], made[donor])
        else:
            make, found = FAULTS[kind]
            made[place] = make(made[place], draw)
        planted[place + 1] = (kind, found)
    return [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in made], planted

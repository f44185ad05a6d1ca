"""The 25 verifiers of IFEval (Zhou et al. 2023, arXiv:2311.07911), each a function of an answer and its own arguments.

Own code that judges as the official verifiers do (google-research/instruction_following_eval), their oddities included,
so that figures stand beside published ones: keywords are regular expressions and found inside words, "at least" and
"less than" are the only relations, and an answer whose language can't be told is taken to be in it. Not the rows and
not the score (ifeval.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from tunelet.evals import ifeval_text

Check = Callable[..., bool]

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def compared(count: int, relation: str, threshold: int) -> bool:
    """Does the count stand in the relation ("at least" or "less than") to the threshold? ValueError for another one."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation '{relation}' is neither 'at least' nor 'less than'")
    return count >= threshold if relation == "at least" else count < threshold


def parts(answer: str, divider: str) -> list[str] | None:
    """What stands between the dividers, without what is empty at either end; None where one inside is empty."""
    found = re.split(divider, answer)
    if any(not part.strip() for part in found[1:-1]):
        return None
    return [part for part in found if part.strip()]


def keywords(answer: str, *, keywords: Sequence[str]) -> bool:
    return all(re.search(word, answer, re.IGNORECASE) for word in keywords)


def keyword_frequency(answer: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return compared(len(re.findall(keyword.strip(), answer, re.IGNORECASE)), relation, frequency)


def forbidden_words(answer: str, *, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", answer, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(answer: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """The official code draws a random letter in place of "#" and "!", which two prompts ask for; this counts them."""
    return compared(answer.lower().count(letter.strip().lower()), let_relation, let_frequency)


def response_language(answer: str, *, language: str) -> bool:
    return ifeval_text.language(answer) in (language, None)


def sentences(answer: str, *, num_sentences: int, relation: str) -> bool:
    return compared(ifeval_text.count_sentences(answer), relation, num_sentences)


def paragraphs(answer: str, *, num_paragraphs: int) -> bool:
    found = parts(answer, r"\s?\*\*\*\s?")
    return found is not None and len(found) == num_paragraphs


def words(answer: str, *, num_words: int, relation: str) -> bool:
    return compared(ifeval_text.count_words(answer), relation, num_words)


def first_word(answer: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    r"""Empty paragraphs don't count among `num_paragraphs`, but they do in finding the nth one, as officially."""
    found = answer.split("\n\n")
    count = sum(bool(part.strip()) for part in found)
    if count != num_paragraphs or nth_paragraph > count or not found[nth_paragraph - 1].strip():
        return False
    word = found[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


def placeholders(answer: str, *, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


def postscript(answer: str, *, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(known.get(marker, marker.lower()), answer.lower()))


def bullets(answer: str, *, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", answer, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained_response(answer: str) -> bool:
    return any(option in answer for option in OPTIONS)


def highlights(answer: str, *, num_highlights: int) -> bool:
    r"""`**bold**` is found by the second pattern alone: the first sees its stars in pairs with nothing between."""
    single = [found for found in re.findall(r"\*[^\n\*]*\*", answer) if found.strip("*").strip()]
    double = [
        found
        for found in re.findall(r"\*\*[^\n\*]*\*\*", answer)
        if found.removeprefix("**").removesuffix("**").strip()
    ]
    return len(single) + len(double) >= num_highlights


def sections(answer: str, *, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{section_spliter.strip()}\s?\d+\s?", answer)) >= num_sections


def json_format(answer: str) -> bool:
    """One JSON value, alone or in one fence. Without a fence the official code reads what is there just the same."""
    text = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(answer: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", answer))


def two_responses(answer: str) -> bool:
    found = parts(answer, r"\*{6}")
    return found is not None and len(found) == 2 and found[0].strip() != found[1].strip()


def repeat_prompt(answer: str, *, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_phrase(answer: str, *, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_words(answer: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return compared(ifeval_text.count_capital_words(answer), capital_relation, capital_frequency)


def english_capital(answer: str) -> bool:
    return answer.isupper() and ifeval_text.language(answer) in ("en", None)


def english_lowercase(answer: str) -> bool:
    return answer.islower() and ifeval_text.language(answer) in ("en", None)


def no_comma(answer: str) -> bool:
    return "," not in answer


def quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


VERIFIERS: dict[str, Check] = {
    "keywords:existence": keywords,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": sentences,
    "length_constraints:number_paragraphs": paragraphs,
    "length_constraints:number_words": words,
    "length_constraints:nth_paragraph_first_word": first_word,
    "detectable_content:number_placeholders": placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": bullets,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": highlights,
    "detectable_format:multiple_sections": sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_phrase,
    "change_case:capital_word_frequency": capital_words,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
    "startend:quotation": quotation,
}

"""Metrics of a text against references: exact match and F1 (SQuAD, KorQuAD), ROUGE and chrF through their libraries.

Not answers to be found inside a text (extract.py). All are in 0..1, higher is better, and take the best reference.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tunelet.errors import TuneletError

_HANGUL = re.compile(r"[가-힣]")
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}‘’“”´·…《》〈〉「」『』【】（）、。，！？：；～]")
ROUGE = ("rouge1", "rouge2", "rougeL")


def normalise(text: str) -> str:
    """Small letters, without punctuation (brackets and quotes of Korean too), without the articles a, an and the, with
    single spaces: SQuAD's evaluation (Rajpurkar et al. 2016, arXiv:1606.05250) on NFKC text."""
    text = _PUNCTUATION.sub("", unicodedata.normalize("NFKC", text).lower())
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references after `normalise`, else 0. In Korean spaces don't count, since
    writers disagree about them. Raises ValueError without a reference."""
    return max(float(_compact(answer) == _compact(reference)) for reference in _some(references))


def _compact(text: str) -> str:
    text = normalise(text)
    return text.replace(" ", "") if _HANGUL.search(text) else text


def f1(answer: str, references: Sequence[str]) -> float:
    """Best F1 of what answer and reference share after `normalise`: words, or characters where either is Korean, so
    that a particle (서울은, 서울) costs a little and not the word (KorQuAD 1.0, arXiv:1909.07005).

    Two texts that are empty then are equal. Raises ValueError without a reference.
    """
    return max(_f1(answer, reference) for reference in _some(references))


def _f1(answer: str, reference: str) -> float:
    first, second = normalise(answer), normalise(reference)
    korean = bool(_HANGUL.search(first + second))
    a, b = ([*text.replace(" ", "")] if korean else text.split() for text in (first, second))
    if not a or not b:
        return float(a == b)
    shared = (Counter(a) & Counter(b)).total()
    return 2 * shared / (len(a) + len(b))


class Words:
    """rouge-score's tokenizer keeps a-z and 0-9 alone and makes every Korean text empty; this keeps all letters."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower())


def rouge(answer: str, references: Sequence[str], *, kinds: Sequence[str] = ROUGE) -> dict[str, float]:
    """F-measures of ROUGE (Lin 2004) by Google's rouge-score, without stemming: kind -> value.

    Raises TuneletError where rouge-score isn't installed, ValueError without a reference.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("ROUGE", "rouge-score") from error
    scorer = RougeScorer(list(kinds), tokenizer=Words())
    found = scorer.score_multi(list(_some(references)), answer)
    return {kind: float(found[kind].fmeasure) for kind in kinds}


def chrf(answer: str, references: Sequence[str]) -> float:
    """chrF2 (Popović 2015) of one answer by sacrebleu, as a share.

    Raises TuneletError where sacrebleu isn't installed, ValueError without a reference.
    """
    return float(_chrf().sentence_score(answer, list(_some(references))).score) / 100


def corpus_chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF2 over all answers together, which is not the mean of single ones. references: of each answer, as many for
    each. Raises ValueError where there are none, or their numbers differ; TuneletError as `chrf`."""
    if not answers or len(answers) != len(references) or len({len(_some(own)) for own in references}) != 1:
        raise ValueError(f"{len(answers)} answers, {len(references)} lists of references, all of one length")
    return float(_chrf().corpus_score(list(answers), [list(own) for own in zip(*references, strict=True)]).score) / 100


def _chrf() -> Any:
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise _missing("chrF", "sacrebleu") from error
    return CHRF()


def _missing(metric: str, package: str) -> TuneletError:
    return TuneletError(
        f"{metric} can't be computed: {package} is not installed",
        why="tunelet leaves it to the library that published figures are made with",
        fix='pip install "tunelet[eval]"',
    )


def _some(references: Sequence[str]) -> Sequence[str]:
    if not references or isinstance(references, str):
        raise ValueError("references: a list of at least one text")
    return references

"""The starter: a smart home in English and Korean, small enough to align in minutes, with effects one can execute.

`rows` makes any amount of its text, conversations, preference pairs and evaluation items; `BASE` is the shipped model.
The world and the phrasings are data (`grammar/*.toml`): change them and you have your own domain.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from tunelet.errors import TuneletError, did_you_mean

if TYPE_CHECKING:
    from tunelet.starter.grading import Verdict

BASE = Path(__file__).parent / "base"

_DEFAULT = {"chat": 8000, "text": 20000, "preference": 2000, "choice": 500, "times": 500, "eval": 500}

# What a prompt says of the task, where a model is asked without being tuned (evals/prompted.py).
INSTRUCTION = (
    "You are the assistant of a smart home. Answer a request with one JSON command on a line, with the keys action, "
    "device, room and, where asked for, value, time or after, and nothing else. Say briefly that you are sorry where "
    "the home cannot do it. Answer other questions briefly, in the language of the question."
)


def rows(
    kind: str, split: str = "train", *, language: str = "both", n: int | None = None, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Rows of the starter world, a function of the arguments alone.

    kind: "text" {"text"}, "chat" {"messages"}, "preference" {"prompt", "chosen", "rejected", "kind"},
        "choice" and "times" {"question", "choices", "answer"}, "eval" {"messages", "language", "type", "expected"}.
    split: "train", or "test" (compositions and phrasings that occur nowhere in "train"; text exists for training only,
        its "test" split is other pages of the same kind).
    n: rows; for "eval" the number of *commands in each language* (other types come beside them). None: by kind.
    """
    from tunelet.starter import chat, text

    if kind not in _DEFAULT:
        raise TuneletError(
            f"the starter has no rows of kind '{kind}'",
            fix=f"one of {', '.join(_DEFAULT)}.{did_you_mean(kind, _DEFAULT)}",
        )
    if split not in ("train", "test"):
        raise TuneletError(f"the starter has no split '{split}'", fix="use train or test")
    languages = ("en", "ko") if language == "both" else (language,)
    count = _DEFAULT[kind] if n is None else n
    rng = Random(f"{kind}/{split}/{language}/{seed}")
    if kind == "text":
        yield from ({"text": page} for page in islice(text.pages(rng, languages), count))
    elif kind == "chat":
        yield from islice(chat.chats(rng, split, languages), count)
    elif kind == "preference":
        yield from islice(chat.preferences(rng, split, languages), count)
    elif kind == "choice":
        yield from islice(chat.choices(rng, languages), count)
    elif kind == "times":
        yield from islice(text.times(rng, languages), count)
    else:
        yield from chat.evaluation(rng, split, languages, count)


def grade(answer: str, item: dict[str, Any]) -> Verdict:
    """See `tunelet.starter.grading.grade`."""
    from tunelet.starter import grading

    return grading.grade(answer, item)

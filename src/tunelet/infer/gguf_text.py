"""What llama.cpp makes of texts with a GGUF file: tokens, the chat template, and where answers end.

Not for the weights and what they compute (gguf_check.py, gguf_gate.py).
"""

from __future__ import annotations

import queue
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError
from tunelet.infer import gguf_tokenizer
from tunelet.infer.gguf_rows import Row
from tunelet.infer.request import Piece, Request

FORCING = 1000.0  # added to the logit of the token to take: more than any model's logits differ
ROOM = 512  # tokens of context that these checks need
TEXTS = 24  # rows whose texts both tokenizers take apart
SPECIAL = 24  # added tokens that are put into texts
# Texts that tokenizers differ on: digits, runs of spaces and line ends, scripts, what is made of several code points.
HOSTILE = (
    "",
    " ",
    "  two  and   three    spaces ",
    "\n",
    "\n\n\nlines\n \n\ttabs\t\tand\r\nreturns\r",
    "1234567890 3.14159 1,000,000 2026-11-28 12:34:56 0xDEADBEEF",
    "don't we'll I'M they'RE it's 'quoted'",
    "오후 7시 15분에 침실 불을 30퍼센트로 해 주세요. 거실 선풍기가 켜져 있습니다!",
    "가 각 갂 가\u0301 \u1112\u1161\u11ab\u1100\u1173\u11af ㄱㄴㄷ",
    "日本語のテキスト 中文 \u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947",
    "\u05e9\u05dc\u05d5\u05dd \u0e2a\u0e27\u0e31\u0e2a \u0395\u03bb\u03bb\u03ac \u041f\u0440\u0438\u0432\u0435\u0442",
    "👍 👨\u200d👩\u200d👧\u200d👦 🇰🇷 1️⃣ ✈️",
    "cafe\u0301 n\u0303 A\u030a\u0323 \u0130stanbul \ufb01n \u212b",
    "zero\u200bwidth non\u00a0breaking em\u2003space ideographic\u3000space \ufeffmark",
    "def f(x: int) -> dict[str, float]:\n    return {'a': x ** 2, \"b\": -1e-9}  # noqa\n\n\n\nfor (;;) { i++; }",
    '<a href="x">&amp;</a> \\n \\\\ `code` ~~~ $$ %% @user #tag __init__ --flag ... !!!??',
    "▁under ▁▁score _▁_ Ġ Ċ",
)
CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Hello."),),
    (("system", "You answer briefly."), ("user", 'Is the lamp on?\n\n```json\n{"a": 1}\n```')),
    (("user", "불을 켜 줘."), ("assistant", "네, 켰습니다."), ("user", " 고마워! ")),
    (("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4\n"), ("user", "5")),
)


def findings(
    engine: Any, tokenizer: Any, renderer: Any, stop_ids: Sequence[int], file: Path, rows: Sequence[Row], lora: bool
) -> Iterator[str]:
    """What llama.cpp (`engine`) does otherwise with texts than tokenizer and renderer. lora: whether `file` is the base
    of what is checked, whose template may be another."""
    yield from tokens(engine, tokenizer, [tokenizer.decode(row.ids) for row in rows[:TEXTS]])
    if not lora:
        yield from template(engine, tokenizer, renderer, file)
        yield from stops(engine, stop_ids, rows[0])


def remarks(tokenizer: Any) -> list[str]:
    """What llama.cpp does otherwise and no file can change."""
    composed = (
        "letters that come in parts (decomposed Hangul, accents) are not composed by llama.cpp before it tokenises"
    )
    return [composed] if gguf_tokenizer.composes(tokenizer) else []


def tokens(engine: Any, tokenizer: Any, texts: Sequence[str]) -> Iterator[str]:
    """Findings: texts that llama.cpp takes apart otherwise, with special tokens in them read as such, and not."""
    composes = gguf_tokenizer.composes(tokenizer)
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()][:SPECIAL]
    hostile = [*HOSTILE, *(f"a{token}b {token} c\n{token}\n" for token in added), "".join(added)]
    for special in (True, False):
        wrong = []
        for text in (*texts, *hostile):
            if composes:  # which llama.cpp does not do: told beside the figures (remarks)
                text = unicodedata.normalize("NFC", text)
            ours = tokenizer(text, split_special_tokens=not special, verbose=False)["input_ids"]
            theirs = _tokenize(engine, text, special)
            if list(ours) != theirs:
                place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
                wrong.append((text, ours[place : place + 4], theirs[place : place + 4]))
        if wrong:
            text, ours, theirs = min(wrong, key=lambda found: len(found[0]))
            yield (
                f"llama.cpp makes other tokens of {len(wrong)} of {len(texts) + len(hostile)} texts"
                f"{' with special tokens read as text' if not special else ''}: of {text[:60]!r} {theirs}, "
                f"the tokenizer {list(ours)}"
            )


def _tokenize(engine: Any, text: str, special: bool) -> list[int]:
    return engine.ask("/tokenize", {"content": text, "add_special": True, "parse_special": special})["tokens"]


def template(engine: Any, tokenizer: Any, renderer: Any, file: Path) -> Iterator[str]:
    """Findings: another chat template in the file, or conversations that llama.cpp renders or tokenises otherwise."""
    from tunelet.data.examples import Message

    wanted, stored = gguf_tokenizer.template_of(tokenizer), gguf_tokenizer.stored_template(file)
    if stored != wanted:
        yield f"it holds {'another' if stored else 'no'} chat template than the tokenizer's"
        return
    if not wanted:
        return
    rendered = 0
    for conversation in CONVERSATIONS:
        messages = [Message(role, content) for role, content in conversation]
        try:
            ours, ids = renderer.string(messages, add_generation_prompt=True), renderer.prompt(messages)
        except TuneletError:
            continue  # a role or an order that this template refuses
        rendered += 1
        asked = [{"role": role, "content": content} for role, content in conversation]
        theirs = engine.ask("/apply-template", {"messages": asked})["prompt"]
        bos = tokenizer.bos_token or ""
        # llama.cpp takes the first token off where it puts one in front of every text
        if theirs != ours and bos + theirs != ours:
            yield f"llama.cpp renders a conversation otherwise: {_apart(ours, theirs)}"
            return
        if _tokenize(engine, theirs, True) != ids:
            yield f"llama.cpp makes other tokens of a rendered conversation ({len(conversation)} messages)"
            return
    if not rendered:
        yield "its chat template renders none of the conversations that were tried"


def _apart(ours: str, theirs: str) -> str:
    place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return f"at character {place} {theirs[place : place + 30]!r}, the template {ours[place : place + 30]!r}"


def stops(engine: Any, stop_ids: Sequence[int], row: Row) -> Iterator[str]:
    """Findings: tokens that end an answer, and llama.cpp goes on behind them."""
    for id_ in stop_ids:
        told = pieces(engine, Request(row.ids[: row.start], 2, logit_bias={id_: FORCING}))
        if sum(piece.token is not None for piece in told) > 1:
            token = engine.tokenizer.convert_ids_to_tokens(id_)
            yield f"llama.cpp goes on behind token {id_} ({token}), which ends an answer"


def pieces(engine: Any, request: Request) -> list[Piece]:
    """What an engine answers to one request, once it has ended. Raises TuneletError where it failed."""
    told: queue.SimpleQueue[Piece] = queue.SimpleQueue()
    engine.submit(request, told.put)
    found: list[Piece] = []
    while not found or not found[-1].finish:
        found.append(told.get())
    if found[-1].error:
        raise TuneletError(f"The {engine.name} engine failed.", why=found[-1].error)
    return found

"""Checks that need one row only: its turns, its characters, its tools. Each yields (kind, severity, message, fix).

Not for what only the whole corpus shows (doctor_corpus.py) nor for tokens (doctor_tokens.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from tunelet.data import scripts
from tunelet.data.examples import Chat, Example, Message, Preference, Text


class Said(NamedTuple):
    """One thing seen in a row."""

    kind: str
    severity: str
    message: str
    fix: str


def turns_of(example: Example) -> Sequence[Message]:
    """The turns that are held to be right: of a pair the chosen answer, of labelled answers the good ones (the others
    are there to be bad). Plain text is one turn without a role."""
    if isinstance(example, Text):
        return (Message("", example.text),)
    if isinstance(example, Chat):
        return example.messages
    if isinstance(example, Preference):
        return (*example.prompt, *example.chosen)
    return (*example.prompt, *(example.completion if example.label else ()))


def look(example: Example) -> Iterator[Said]:
    """Everything odd in one row."""
    turns = turns_of(example)
    if isinstance(example, Chat):
        yield from _order(example.messages)
        yield from _tools(example)
    for number, turn in enumerate(turns, start=1):
        where = _where(example, number, turn)
        if turn.role == "system" and not turn.content.strip():
            yield Said("empty_system", "warning", f"{where} is empty", "leave it out, or fill it")
        if turn.role != "tool":  # what a tool returns is what it is
            yield from _characters(turn, where)
            yield from _markup(turn, where, number)
        if turn.role == "assistant":
            asked = next((t.content for t in reversed(turns[: number - 1]) if t.role == "user"), "")
            yield from _answer(turn, where, asked)
        if turn.role in ("user", "assistant") and turn.content != turn.content.strip():
            yield Said("whitespace", "info", f"{where} begins or ends with white space", "strip it")


def _where(example: Example, number: int, turn: Message) -> str:
    if isinstance(example, Text):
        return "the text"
    if isinstance(example, Preference) and number > len(example.prompt):
        return "the chosen answer"
    return f"message {number} ({turn.role})"


# Order of turns ----------------------------------------------------------------------------------------------------


def _order(turns: Sequence[Message]) -> Iterator[Said]:
    spoken = [(number, turn) for number, turn in enumerate(turns, start=1) if turn.role != "system"]
    if spoken[0][1].role == "assistant":
        yield Said(
            "starts_with_assistant", "warning", "the conversation begins with the assistant", "begin with a user turn"
        )
    if spoken[-1][1].role != "assistant":
        role = spoken[-1][1].role
        yield Said(
            f"ends_with_{role}",
            "warning",
            f"the last turn is the {role}'s: it has no answer",
            "add the answer, or cut it",
        )
    for (_, before), (number, turn) in pairwise(spoken):
        if turn.role == before.role == "user":
            yield Said(
                "consecutive_user", "warning", f"message {number} is a second user turn in a row", "join the two"
            )
        elif turn.role == before.role == "assistant" and not before.tool_calls:
            yield Said(
                "consecutive_assistant", "warning", f"message {number} is a second answer in a row", "join the two"
            )


def _tools(example: Chat) -> Iterator[Said]:
    described = {tool["function"]["name"]: tool["function"] for tool in example.tools}
    open_calls = 0
    for number, turn in enumerate(example.messages, start=1):
        if turn.role == "tool":
            if not open_calls:
                yield Said(
                    "result_without_call",
                    "warning",
                    f"message {number} is a tool's result, and no tool was called",
                    "add the call",
                )
        elif turn.role == "assistant":
            open_calls = len(turn.tool_calls)
        else:
            open_calls = 0
        for call in turn.tool_calls:
            function = call["function"]
            name = function["name"]
            if name not in described:
                known = f"the tools are {', '.join(described)}" if described else "no tools are described"
                yield Said(
                    "unknown_tool", "warning", f"message {number} calls '{name}', and {known}", "describe it in 'tools'"
                )
                continue
            parameters = described[name].get("parameters")
            required = parameters.get("required") if isinstance(parameters, dict) else None
            missing = [key for key in required or () if key not in function["arguments"]]
            if missing:
                yield Said(
                    "missing_argument",
                    "warning",
                    f"message {number} calls '{name}' without {', '.join(map(str, missing))}",
                    "add it",
                )


# Characters --------------------------------------------------------------------------------------------------------

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069]")
_LOST = re.compile(r"\?{3,}\s+\?{2,}|(?:\?{2,}[ ,.]){3,}")  # 한국어 that went through an encoding without Hangul


def _characters(turn: Message, where: str) -> Iterator[Said]:
    text = turn.content
    if text.isascii():
        if _CONTROL.search(text):
            yield _control(text, where)
        if "?? " in text and _LOST.search(text):
            yield Said(
                "mojibake",
                "warning",
                f"{where} has letters that were lost to question marks",
                "take the row from its source",
            )
        return
    if _CONTROL.search(text) and not scripts.mojibake(text):
        yield _control(text, where)
    if "\ufffd" in text:
        yield Said(
            "replacement_character",
            "warning",
            f"{where} has U+FFFD: letters were lost in decoding",
            "take the row from its source",
        )
    broken = scripts.mojibake(text)
    if broken:
        yield Said(
            "mojibake",
            "warning",
            f"{where} was decoded wrongly: '{broken[0]}' should be '{broken[1]}'",
            "decode it as UTF-8",
        )
    if _INVISIBLE.search(text):
        severity = "warning" if turn.role else "info"  # web text is full of them
        message = f"{where} has invisible characters (zero width, direction)"
        yield Said("invisible_character", severity, message, "remove them")


def _control(text: str, where: str) -> Said:
    code = ord(_CONTROL.search(text).group())
    return Said("control_character", "warning", f"{where} has the control character U+{code:04X}", "remove it")


# Markup ------------------------------------------------------------------------------------------------------------

TEMPLATE_TOKENS = re.compile(
    r"<\|[A-Za-z_][\w ]{1,30}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<\uff5c[^>]{2,30}\uff5c>|</s>"
    r"|<(?:bos|eos|pad)>|^###\s*(?:Instruction|Response)s?\s*:",
    re.MULTILINE,
)
BOS = re.compile(r"\s*(?:<s>|<\|begin_of_text\|>|<bos>|<\|endoftext\|>|\[BOS\]|<\|startoftext\|>)")
PLACEHOLDER = re.compile(
    r"(?<![{\\\w])\{\{-?\s*[A-Za-z_가-힣][\w가-힣 .|-]*?-?\}\}|\[(?:INSERT|insert|Insert) [^\]]{2,40}\]"
    r"|\[(?:YOUR|Your|your)[ _][^\]]{2,30}\](?!\()|\[(?:NAME|DATE|COMPANY|ADDRESS|EMAIL|PLACEHOLDER)\]|<YOUR_[A-Z_]+>"
    r"|(?<![\\\w}$])\{(?:name|user|username|input|output|question|answer|context|instruction|prompt|query|response|topic)\}"
)
TAG = re.compile(
    r"</?(?:p|br|div|span|b|i|u|em|strong|a|ul|ol|li|h[1-6]|table|tr|td|th|tbody|img|font|center|blockquote|script|style|hr|sup|sub)"
    r"(?:\s+[\w-]+\s*=[^<>]*)?\s*/?>"
)
ENTITY = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|apos|mdash|ndash|hellip|rsquo|lsquo|rdquo|ldquo|#\d{2,5}|#x[0-9a-fA-F]{2,5});"
)
ABOUT_MARKUP = re.compile(
    r"html|\bhtm\b|xml|\btags?\b|\bcss\b|svg|markup|web ?page|website|javascript|\bjsx?\b|\bcode\b|entit|태그|코드|웹",
    re.I,
)
FENCE = re.compile(r"^[ \t]{0,3}(`{3,}|~{3,})", re.MULTILINE)


def outside_code(text: str) -> str:
    """The text without fenced and inline code: markup in there is meant."""
    if "`" not in text:
        return text
    return re.sub(r"```.*?(?:```|\Z)|`[^`\n]+`", " ", text, flags=re.DOTALL)


def _markup(turn: Message, where: str, number: int) -> Iterator[Said]:
    text = turn.content
    if number == 1 and BOS.match(text):
        yield Said(
            "double_bos",
            "warning",
            f"{where} begins with the literal '{BOS.match(text).group().strip()}', and the template adds its own",
            "take it out of the text",
        )
    elif "<" in text or "[" in text or "###" in text:
        found = TEMPLATE_TOKENS.search(text)
        if found:
            yield Said(
                "template_tokens",
                "warning",
                f"{where} has a chat template's '{found.group()}' in its text",
                "take it out of the text",
            )
    if "{" in text or "[" in text or "<YOUR" in text:
        found = PLACEHOLDER.search(outside_code(text))
        if found:
            yield Said(
                "placeholder", "warning", f"{where} has the placeholder '{found.group()}'", "put the value there"
            )
    if SECRET.search(text):
        yield Said(
            "secret", "warning", f"{where} holds what looks like a key or password", "take it out, and revoke the key"
        )
    if turn.role == "user":
        return
    if ("<" in text or "&" in text) and not ABOUT_MARKUP.search(text):
        bare = outside_code(text)
        found = TAG.search(bare) or ENTITY.search(bare)
        if found:
            yield Said(
                "html",
                "warning",
                f"{where} has left-over HTML: '{found.group()[:40]}'",
                "strip the tags, unescape the entities",
            )
    if ("```" in text or "~~~" in text) and len(FENCE.findall(text)) % 2:
        yield Said(
            "code_fence",
            "warning",
            f"{where} opens a code fence and does not close it",
            "close it: the answer may be cut off",
        )


# Answers -----------------------------------------------------------------------------------------------------------

OTHER_ASSISTANT = re.compile(
    r"\bas an? (?:AI|artificial intelligence)(?: language)? (?:model|assistant)\b"
    r"|\bI(?:'|’)?m (?:just |only )?an? (?:AI|artificial intelligence) language model\b"
    r"|\bmy (?:knowledge cutoff|last knowledge update|training data)\b"
    r"|(?:AI|인공지능) ?(?:언어 ?)?모델(?:로서|이기 때문|이므로|이라서)",
    re.I,
)
STOCK_REFUSAL = re.compile(
    r"\bI(?: cannot| can(?:'|’)?t| am unable to|(?:'|’)m unable to|(?:'|’)m not able to) "
    r"(?:fulfill|comply|assist|help(?: you)?|engage|provide assistance)(?: with)? (?:that|this|your|such)\b"
    r"|요청(?:을|은|에) (?:도와|답변|응답)[^.]{0,12} 수 없",
    re.I,
)
SECRET = re.compile(
    r"\bsk-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\bgh[pousr]_\w{30,}|\bhf_[A-Za-z]{30,}|\bxox[bp]-[\w-]{20,}"
)
HINT = re.compile(
    "AI|rtificial|request|training|nowledge|인공지능|요청|cannot|can.?t |able to"
)  # quick, and without it none of the above
NOTHING = re.compile(r"(?:n/?a|none|null|nan|todo|tbd|undefined|lorem ipsum.*|없음|[!-/:-@\[-`{-~\s]+)\.?", re.I)
URL_ONLY = re.compile(r"^\W*(?:https?://|www\.)\S+(?:\s+(?:https?://|www\.)\S+)*\W*$")
ROLE_PREFIX = re.compile(r"\A\s*(?:assistant|ai|bot|gpt|chatgpt)\s*:\s|\n\s*(?:human|user|assistant)\s*:\s", re.I)
THINK = re.compile(r"<think(?:ing)?>(.*?)(</think(?:ing)?>|\Z)", re.DOTALL)
CUT_MARK = re.compile(r"\[(?:truncated|cut off|continued|\.\.\.)\]\s*$|<truncated>\s*$", re.I)
# Words that no English sentence ends with.
DANGLING = re.compile(
    r"(?:,|\b(?:the|a|an|and|or|but|because|which|whose|although|while|with|from|into|than|such as|including|of|"
    r"their|its|your|my|our|his|between|during|would|could|should|must|every|was|were|is|are|to))\s*$"
    r"|[가-힣](?:을|를|에서|에게|으로|하고|해서|지만|는데|에는|이며|하며)\s*$|\s(?:및|그리고|또는|그래서|하지만|때문에)\s*$"
)
# Closing words of a letter end with a comma before the name, which may be left out.
VALEDICTION = re.compile(r"(?:regards|sincerely|wishes|yours|love|thanks|cheers|you|respectfully|best),\s*$", re.I)
WORDS = re.compile(r"\w+")


def _answer(turn: Message, where: str, asked: str) -> Iterator[Said]:
    text = turn.content.strip()
    if turn.thinking is not None and not turn.thinking.strip():
        yield Said("empty_thinking", "warning", f"{where} has an empty reasoning", "leave the reasoning out")
    if "<think" in text:
        thought = THINK.search(text)
        if thought and not thought.group(2):
            yield Said("unclosed_thinking", "warning", f"{where} opens <think> and does not close it", "close it")
        elif thought and not thought.group(1).strip():
            yield Said("empty_thinking", "warning", f"{where} has an empty <think></think>", "leave it out")
    if not text:
        return
    if NOTHING.fullmatch(text) and not _LOST.search(text):
        yield Said("no_content", "warning", f"{where} says nothing: '{text[:20]}'", "write the answer")
    if _same(text, asked) or (len(asked.strip()) >= 40 and text.startswith(asked.strip())):
        yield Said("copies_prompt", "warning", f"{where} repeats what was asked", "write the answer")
    if ("://" in text or "www." in text) and URL_ONLY.match(text):
        yield Said("url_only", "warning", f"{where} is nothing but a link", "write the answer")
    if HINT.search(text):
        if found := OTHER_ASSISTANT.search(text):
            yield Said(
                "refusal", "warning", f"{where} speaks as another assistant: '{found.group()}'", "write the answer"
            )
        elif found := STOCK_REFUSAL.search(text):
            yield Said("refusal", "info", f"{where} is a stock refusal: '{found.group()}'", "write the answer")
    found = ROLE_PREFIX.search(text) if ":" in text else None
    if found:
        yield Said(
            "role_prefix",
            "warning",
            f"{where} has a speaker's name in its text: '{found.group().strip()}'",
            "split the turns",
        )
    if CUT_MARK.search(text[-40:]) or (
        len(text) >= 30 and DANGLING.search(text[-40:]) and not VALEDICTION.search(text[-40:])
    ):
        yield Said(
            "cut_answer",
            "warning",
            f"{where} ends in mid-sentence: '...{text[-30:]}'",
            "take the whole answer from its source",
        )
    loop = _loop(text)
    if loop:
        yield Said("repetition", "warning", f"{where} repeats '{loop[:40]}' over and over", "write the answer")
    wanted = scripts.mismatch(asked, text)
    if wanted:
        yield Said(
            "language",
            "warning",
            f"{where} is in {wanted[1]}, and was asked for in {wanted[0]}",
            "translate the answer",
        )


def _same(answer: str, asked: str) -> bool:
    """Whether an answer is the question again, but for case, spaces and punctuation. A greeting may be given back."""
    if len(answer) < 25 and ("?" not in asked or len(answer) < 10):
        return False
    if abs(len(answer) - len(asked)) > 0.1 * len(asked) + 5:
        return False
    return WORDS.findall(answer.lower()) == WORDS.findall(asked.lower())


def _loop(text: str) -> str:
    """The line or sentence that stands four times in a row, or the word eight times; '' where there is none."""
    if len(text) < 40:
        return ""
    pieces = [piece.strip() for piece in re.split(r"[\n.!?。]+", text) if len(piece.strip()) > 8]
    run = 1
    for before, piece in pairwise(pieces):
        run = run + 1 if piece == before else 1
        if run >= 4:
            return piece
    run = 1
    words = text.split()
    for before, word in pairwise(words):
        run = run + 1 if word == before and len(word) > 1 and word.isalpha() else 1
        if run >= 8:
            return word
    return ""

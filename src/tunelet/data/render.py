"""Conversation -> string -> Tokens(ids, mask, spans). The ONLY template code: train, eval, chat, serve, export use it.

Not for finding which characters are trained (masks.py says how) and not for batches (pack.py).

`Renderer.string` is transformers' `apply_chat_template(tokenize=False)`, and ids are those of `tokenize=True`: nothing
is added in front of or behind what the template prints, so there is no second BOS. A special token that a text spells
out ("<|im_end|>" typed by a user) becomes that token, as in transformers: equality wins, and the doctor warns. It does
not move the mask, which follows the template and not the text.

From characters to tokens: a token is trained when any of its characters is (transformers' assistant mask counts in the
same way), and belongs to the role of its first character. The first token of a row is never trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tunelet.data import masks
from tunelet.data.examples import Chat, Finding, Message, Origin, Text, Tokens
from tunelet.data.pack import text_mask
from tunelet.data.tokenizer import BUILT_IN_TEMPLATES, load_tokenizer, no_template
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Renderer", "load_tokenizer"]

CHUNK = 1024  # rows tokenised at once: enough for the tokenizer's threads, little enough to stay small
CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}


class Renderer:
    """Renders and tokenises with one tokenizer and one chat template.

    template: Jinja source or the name of a built-in one ("chatml"); None takes the tokenizer's own. Without any, texts
    still work (first training needs no template) and chats raise a TuneletError that says what to do.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None = None):
        self.tokenizer = tokenizer
        self._given = BUILT_IN_TEMPLATES.get(template, template) if template else tokenizer.chat_template
        self._templates: dict[str, masks.Template] = {}
        self._parts: dict[str, bool] = {}
        self._stop_ids: tuple[int, ...] | None = None

    def string(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        add_generation_prompt: bool = False,
        **kw: Any,
    ) -> str:
        """What transformers' `apply_chat_template(tokenize=False)` returns; `kw` reaches the template
        (enable_thinking=False, ...). For templates of vision models, contents are given as lists of parts.

        Raises TuneletError where the template refuses the conversation, or there is none.
        """
        source = self._source(tools)
        rows = self._rows(messages, tools)
        with masks.refusals():
            return self.tokenizer.apply_chat_template(
                rows,
                tools=list(tools) or None,
                chat_template=source,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **kw,
            )

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), **kw: Any) -> list[int]:
        """Ids of the conversation with the generation prompt: what a model is given to answer."""
        text = self.string(messages, tools, add_generation_prompt=True, **kw)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def raw(self, text: str) -> list[int]:
        """Ids of a text to go on with, without any template."""
        return self.tokenizer(text, verbose=False)["input_ids"]

    def chat(self, chat: Chat) -> Tokens:
        """A whole conversation. The assistant's turns are trained up to their end token, but those of weight 0."""
        return self.chats([chat])[0]

    def chats(self, chats: Sequence[Chat], problems: list[Finding] | None = None) -> list[Tokens]:
        """Many conversations at once, tokenised in batches.

        A row the template refuses raises a TuneletError that names it. With `problems` given, it is appended there as
        an error instead and left out of the result, so that a whole file can be checked in one go.
        """
        marked: list[tuple[Chat, masks.Marked]] = []
        for chat in chats:
            try:
                marked.append((chat, self._mark(chat)))
            except TuneletError as error:
                if problems is None:
                    raise TuneletError(f"{chat.origin}: {error.what}", why=error.why, fix=error.fix) from None
                problems.append(Finding("template", "error", f"{error.what}: {error.why}", chat.origin, error.fix))
        out = []
        for part in _chunks(marked):
            found = self.tokenizer(
                [row.text for _, row in part],
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,  # rows that are too long are cut, and said to be, by who asks
            )
            for (chat, row), ids, offsets in zip(part, found["input_ids"], found["offset_mapping"], strict=True):
                out.append(_tokens(chat, row, ids, offsets))
        return out

    def text(self, text: Text) -> Tokens:
        """Plain text: BOS where the tokenizer adds it, EOS behind it, and all of it trained but the first token."""
        return self.texts([text])[0]

    def texts(self, texts: Sequence[Text]) -> list[Tokens]:
        """Many texts at once. ids (int32) and masks are numpy arrays, the masks shared: 4 bytes a token."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise TuneletError(
                "the tokenizer names no end token (eos_token)",
                why="a model trained on texts without one would not learn to stop",
                fix='name the token that ends a text as "eos_token" in tokenizer_config.json',
            )
        out = []
        for part in _chunks(texts):
            found = self.tokenizer([text.text for text in part], return_attention_mask=False, verbose=False)
            for text, ids in zip(part, found["input_ids"], strict=True):
                if not ids or ids[-1] != end:
                    ids.append(end)
                spans = ((0, len(ids), "text"),)
                out.append(Tokens(np.array(ids, dtype=np.int32), text_mask(len(ids)), spans, text.origin))
        return out

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an assistant's turn under this template, then the tokenizer's EOS; without repeats."""
        if self._stop_ids is None:
            ends = [] if self._given is None else [end for calls in ((), (CALL,)) for end in self._turn_end(calls)]
            if self.tokenizer.eos_token_id is not None:
                ends.append(self.tokenizer.eos_token_id)
            self._stop_ids = tuple(dict.fromkeys(ends))
        return self._stop_ids

    def findings(self) -> list[Finding]:
        """Warnings about what rows rendered so far had and the template did not print (a system message, thinking)."""
        left = set().union(*(template.left_out for template in self._templates.values()))
        return [
            Finding(
                "left_out",
                "warning",
                f"the chat template does not print the {what} of some messages with the role {role}",
                fix="choose a template that prints it (for the thinking of earlier turns this is expected)",
            )
            for role, what in sorted(left)
        ]

    def _turn_end(self, calls: tuple[dict[str, Any], ...]) -> list[int]:
        turns = (Message("user", "Hi"), Message("assistant", "" if calls else "Hello", tool_calls=calls))
        try:
            row = self.chat(Chat(turns, Origin("stop_ids", 1)))
        except TuneletError:
            return []  # no tool calls in this template, or no end token: training on such rows says so
        trained = [id_ for id_, is_trained in zip(row.ids, row.mask, strict=True) if is_trained]
        while trained and not self.tokenizer.decode(trained[-1:]).strip():
            trained.pop()
        # an end marker in pieces ("<", "end", ...) is no token: its last piece must not stop an answer
        return [id_ for id_ in trained[-1:] if id_ in self.tokenizer.added_tokens_decoder]

    def _mark(self, chat: Chat) -> masks.Marked:
        template = self._template(self._source(chat.tools))
        marked = template.mark(self._rows(chat.messages, chat.tools), list(chat.tools) or None)
        if any(message.weight == 0 for message in chat.messages) and any(i < 0 for _, _, i in marked.trained):
            raise TuneletError(
                "a turn of weight 0 cannot be told from the others",
                why="the template's {% generation %} tags stand outside of its loop over the messages",
                fix="choose another template: --set model.chat_template=FILE (or chatml)",
            )
        return marked

    def _source(self, tools: Sequence[Any]) -> str:
        if self._given is None:
            raise no_template(self.tokenizer)
        if isinstance(self._given, str):
            return self._given
        with masks.refusals():  # a tokenizer may have several templates by name, one of them for tools
            return self.tokenizer.get_chat_template(None, list(tools) or None)

    def _template(self, source: str) -> masks.Template:
        if source not in self._templates:
            self._templates[source] = masks.Template(source, dict(self.tokenizer.special_tokens_map))
        return self._templates[source]

    def _rows(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[dict[str, Any]]:
        rows = [message.as_dict() for message in messages]
        if self._wants_parts(self._source(tools)):
            for row in rows:
                row["content"] = [{"type": "text", "text": row["content"]}]
        return rows

    def _wants_parts(self, source: str) -> bool:
        """Templates of vision models read content as a list of parts, and print nothing of a string."""
        if source not in self._parts:
            template = self._template(source)

            def shows(content: Any) -> bool:
                try:
                    return "Zq0cqZ" in template.trace([{"role": "user", "content": content}]).text
                except TuneletError:
                    return False

            self._parts[source] = not shows("Zq0cqZ") and shows([{"type": "text", "text": "Zq0cqZ"}])
        return self._parts[source]


def _tokens(chat: Chat, row: masks.Marked, ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
    """Characters to tokens. Byte-level tokenizers trim the space before a word off its offsets, so a token is taken to
    begin where the one before it ended; the tokens of one character (bytes of Hangul, emoji) all cover it."""
    if not ids:
        return Tokens((), (), (), chat.origin)
    bounds = np.fromiter(itertools.chain.from_iterable(offsets), dtype=np.int64, count=2 * len(ids)).reshape(-1, 2)
    ends = np.maximum.accumulate(bounds[:, 1])
    starts = np.minimum(bounds[:, 0], np.concatenate([[0], ends[:-1]]))
    trained = np.zeros(len(row.text) + 1, dtype=np.int64)
    for start, end, owner in row.trained:
        if owner < 0 or chat.messages[owner].weight != 0:
            trained[start + 1 : end + 1] = 1
    count = np.cumsum(trained)
    mask = count[ends] > count[starts]
    mask[0] = False
    segment = np.searchsorted([start for start, _, _ in row.segments], starts, side="right") - 1
    changes = [0, *(np.flatnonzero(np.diff(segment)) + 1).tolist(), len(ids)]
    roles = [chat.messages[owner].role if owner >= 0 else "template" for _, _, owner in row.segments]
    spans = tuple((a, b, roles[segment[a]]) for a, b in itertools.pairwise(changes))
    return Tokens(tuple(ids), tuple(mask.tolist()), spans, chat.origin)


def _chunks(rows: Sequence[Any]) -> list[Sequence[Any]]:
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]

"""Conversation -> string -> Tokens(ids, mask, spans). The ONLY template code: train, eval, chat, serve and export use it.

Not for finding which characters are trained (masks.py says how) and not for batches (pack.py).

`Renderer.string` is transformers' `apply_chat_template(tokenize=False)`, and ids are those of `tokenize=True`: nothing is
added in front of or behind what the template prints, so no second BOS. Special tokens that a text contains literally
("<|im_end|>" typed by a user) become that token, as in transformers: equality wins, and the doctor warns.

From characters to tokens: a token is trained when any of its characters is (transformers' assistant mask counts in the
same way), and belongs to the role of its first character. The first token of a row is never trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunelet.data import masks
from tunelet.data.examples import Chat, Finding, Message, Origin, Text, Tokens
from tunelet.data.pack import text_mask
from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BUILT_IN = {"chatml": CHATML}
ORDER = Origin("(prompt)", 1, "row")


class Renderer:
    """Renders and tokenises with one tokenizer and one chat template.

    template: Jinja source or the name of a built-in one ("chatml"); None takes the tokenizer's own. Without any, texts
    still work (first training needs no template) and chats raise a TuneletError that says what to do.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None = None):
        self.tokenizer = tokenizer
        self._given = BUILT_IN.get(template, template) if template else tokenizer.chat_template
        self._compiled: dict[str, masks.Template] = {}
        self._parts: dict[str, bool] = {}

    # -- strings ---------------------------------------------------------------------------------------------------

    def string(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), add_generation_prompt: bool = False, **kw: Any
    ) -> str:
        """What transformers' `apply_chat_template(tokenize=False)` returns; `kw` reaches the template (enable_thinking=...).

        Raises TuneletError where the template refuses the conversation.
        """
        template = self._source(tools)
        rows = self._dicts(messages, tools)
        with _refusals():
            return self.tokenizer.apply_chat_template(
                rows,
                tools=list(tools) or None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **kw,
            )

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), **kw: Any) -> list[int]:
        """Ids of the conversation with the generation prompt: what the model is given to answer."""
        return self._encode([self.string(messages, tools, True, **kw)])[0][0]

    # -- rows ------------------------------------------------------------------------------------------------------

    def chat(self, chat: Chat) -> Tokens:
        """A whole conversation; assistant turns up to their end token are trained, but those of weight 0."""
        return self.chats([chat])[0]

    def chats(self, chats: Sequence[Chat], problems: list[Finding] | None = None) -> list[Tokens]:
        """Many conversations at once (tokenised in batches).

        A row the template refuses raises TuneletError with its origin; with `problems` given, it is appended there as
        an error instead and left out of the result.
        """
        marked, kept = [], []
        for chat in chats:
            try:
                with _refusals():
                    template = self._template(chat.tools)
                    marked.append(template.mark(self._dicts(chat.messages, chat.tools), list(chat.tools) or None))
                kept.append(chat)
            except TuneletError as error:
                if problems is None:
                    raise TuneletError(f"{chat.origin}: {error.what}", why=error.why, fix=error.fix) from None
                problems.append(Finding("template", "error", f"{error.what}: {error.why}", chat.origin, error.fix))
        encoded = self._encode([row.text for row in marked])
        return [_tokens(chat, row, ids, offsets) for chat, row, (ids, offsets) in zip(kept, marked, encoded, strict=True)]

    def text(self, text: Text) -> Tokens:
        """Plain text: BOS where the tokenizer adds it, EOS appended and trained."""
        return self.texts([text])[0]

    def texts(self, texts: Sequence[Text]) -> list[Tokens]:
        """Many texts at once. ids and masks are numpy arrays (int32, bool): 4 bytes a token, the masks are shared."""
        end = self.tokenizer.eos_token_id
        if end is None:
            raise TuneletError(
                "the tokenizer names no end token (eos_token)",
                why="a model trained on texts without one would never learn to stop",
                fix='set "eos_token" in tokenizer_config.json to the token that ends a text',
            )
        out = []
        for start in range(0, len(texts), 1024):
            part = texts[start : start + 1024]
            found = self.tokenizer([t.text for t in part], return_attention_mask=False)["input_ids"]
            for text, ids in zip(part, found, strict=True):
                if not ids or ids[-1] != end:
                    ids.append(end)
                out.append(Tokens(np.array(ids, dtype=np.int32), text_mask(len(ids)), ((0, len(ids), "text"),), text.origin))
        return out

    # -- what the template is like ---------------------------------------------------------------------------------

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an assistant turn under this template, then the tokenizer's EOS; without repeats."""
        ids = [] if self._given is None else self._turn_ends()
        if self.tokenizer.eos_token_id is not None:
            ids.append(self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(ids))

    @property
    def left_out(self) -> set[tuple[str, str]]:
        """(role, field) that rows had and the template did not print, of all chats rendered so far."""
        return set().union(*(template.left_out for template in self._compiled.values()))

    def _turn_ends(self) -> list[int]:
        call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {"x": "y"}}}
        special = self.tokenizer.added_tokens_decoder
        ends = []
        for calls in ((), (call,)):
            turns = (Message("user", "Hi"), Message("assistant", "" if calls else "Hello", tool_calls=calls))
            try:
                row = self.chat(Chat(turns, ORDER))
            except TuneletError:
                if not calls:
                    raise
                continue  # a template without tool calls has one way to end a turn
            last = max(i for i, trained in enumerate(row.mask) if trained)
            while last and not self.tokenizer.decode([row.ids[last]]).strip():
                last -= 1
            # an end marker that is no token of its own ("<end_of_turn>" in pieces) cannot be stopped at by an id
            if row.ids[last] in special:
                ends.append(int(row.ids[last]))
        return ends

    def _source(self, tools: Sequence[Any]) -> str:
        if self._given is None:
            raise no_template(self.tokenizer)
        if isinstance(self._given, str):
            return self._given
        return self.tokenizer.get_chat_template(None, list(tools) or None)

    def _template(self, tools: Sequence[Any]) -> masks.Template:
        source = self._source(tools)
        if source not in self._compiled:
            self._compiled[source] = masks.Template(source, dict(self.tokenizer.special_tokens_map))
        return self._compiled[source]

    def _dicts(self, messages: Sequence[Message], tools: Sequence[Any]) -> list[dict[str, Any]]:
        rows = [message.as_dict() for message in messages]
        if self._wants_parts(self._source(tools)):
            for row in rows:
                row["content"] = [{"type": "text", "text": row["content"]}]
        return rows

    def _wants_parts(self, source: str) -> bool:
        """Templates of vision models read content as a list of parts, and print nothing of a string."""
        if source not in self._parts:
            template = self._template_of(source)

            def shown(content: Any) -> bool:
                try:
                    return "Zq0cqZ" in template.trace([{"role": "user", "content": content}]).text
                except _template_errors():
                    return False

            self._parts[source] = not shown("Zq0cqZ") and shown([{"type": "text", "text": "Zq0cqZ"}])
        return self._parts[source]

    def _template_of(self, source: str) -> masks.Template:
        if source not in self._compiled:
            with _refusals():
                self._compiled[source] = masks.Template(source, dict(self.tokenizer.special_tokens_map))
        return self._compiled[source]

    def _encode(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        out = []
        for start in range(0, len(texts), 1024):
            found = self.tokenizer(
                texts[start : start + 1024], add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
            )
            out += zip(found["input_ids"], found["offset_mapping"], strict=True)
        return out


def _tokens(chat: Chat, row: masks.Marked, ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
    """Characters to tokens. Byte-level tokenizers trim the space before a word off its offsets, so a token is taken to
    begin where the one before it ended; the tokens of one character (bytes of Hangul, emoji) all cover that character."""
    if not ids:
        return Tokens((), (), (), chat.origin)
    bounds = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    ends = np.maximum.accumulate(bounds[:, 1])
    starts = np.minimum(bounds[:, 0], np.concatenate([[0], ends[:-1]]))
    flags = np.zeros(len(row.text) + 1, dtype=np.int64)
    for start, end, owner in row.trained:
        if owner < 0 or chat.messages[owner].weight != 0:
            flags[start + 1 : end + 1] = 1
    count = np.cumsum(flags)
    mask = count[ends] > count[starts]
    mask[0] = False
    borders = [start for start, _, _ in row.segments]
    roles = [chat.messages[owner].role if owner >= 0 else "template" for _, _, owner in row.segments]
    owner_of = np.searchsorted(borders, starts, side="right") - 1
    changes = [0, *(np.flatnonzero(np.diff(owner_of)) + 1).tolist(), len(ids)]
    spans = tuple((a, b, roles[owner_of[a]]) for a, b in zip(changes, changes[1:], strict=False))
    return Tokens(tuple(ids), tuple(mask.tolist()), spans, chat.origin)


def _template_errors() -> tuple[type[Exception], ...]:
    import jinja2

    return (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)


class _refusals:
    """Errors of a template become TuneletErrors. Bugs of ours are not template errors: only what jinja runs is inside."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import jinja2

        if isinstance(error, jinja2.TemplateSyntaxError):
            raise TuneletError(
                f"the chat template is not valid Jinja (line {error.lineno})", why=str(error.message), fix="mend the template"
            ) from None
        if isinstance(error, jinja2.TemplateError):
            raise TuneletError(
                "the chat template refuses this conversation",
                why=str(error),
                fix="change the conversation as the template asks, or choose another: --set model.chat_template=FILE (or chatml)",
            ) from None


def no_template(tokenizer: Any) -> TuneletError:
    """The error for chats without a template; a base model with ChatML tokens is told about the built-in one."""
    known = set(tokenizer.get_vocab())
    if {"<|im_start|>", "<|im_end|>"} <= known:
        fix = "its tokens are ChatML's: --set model.chat_template=chatml (or a file of your own)"
    else:
        fix = "--set model.chat_template=FILE, with the Jinja template of the model's instruct version (or chatml)"
    return TuneletError("the tokenizer has no chat template", why="it belongs to a base model, and conversations need one", fix=fix)


def load_tokenizer(folder: Path | str, chat_template: str = "") -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, without any network.

    chat_template: "" keeps the tokenizer's own; "chatml", or a file with a Jinja template, replaces it (and is then
    saved with the model). Raises TuneletError where files are missing or broken.
    """
    from transformers import AutoTokenizer

    folder = Path(folder)
    if not folder.is_dir():
        raise TuneletError(f"{folder}: no such folder", fix="name a folder that holds tokenizer.json")
    if not (folder / "tokenizer.json").exists():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise TuneletError(
            f"{folder}: no tokenizer.json in it",
            why=f"a model needs its own tokenizer, and the folder holds {there}",
            fix="copy tokenizer.json and tokenizer_config.json of the model into the folder",
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        if (folder / name).exists():
            _check_json(folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if chat_template:
        tokenizer.chat_template = read_template(chat_template)
    return tokenizer


def read_template(value: str) -> str:
    """Jinja source of a built-in template's name or of a file."""
    if value in BUILT_IN:
        return BUILT_IN[value]
    path = Path(value)
    if not path.is_file():
        raise TuneletError(f"{value}: no such chat template file", fix=f"name a file with a Jinja template, or one of: {', '.join(BUILT_IN)}")
    return path.read_text(encoding="utf-8")


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise TuneletError(f"{path}: not valid JSON", why=str(error), fix="copy the file again: it is damaged or cut short") from None

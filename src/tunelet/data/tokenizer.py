"""Loading a tokenizer from a folder, with errors a user can mend, and the built-in chat templates.

Not for rendering (render.py is the only template code) and not for training a tokenizer. Never resizes a vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet.errors import TuneletError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Of ordinary words and the tokenizer's own end of text: for base models, whose ChatML tokens nothing has trained yet.
PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
BUILT_IN_TEMPLATES = {"chatml": CHATML, "plain": PLAIN}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path | str, chat_template: str = "") -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder, without any network.

    chat_template: "" keeps the tokenizer's own; "chatml", "plain" or a file with a Jinja template replaces it, and is
    then saved with the model. Raises TuneletError where files are missing or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TuneletError(f"{folder}: no such folder", fix="name a folder that holds a model's tokenizer.json")
    there = sorted(path.name for path in folder.iterdir())
    if not any(name in there for name in TOKENIZER_FILES):
        raise TuneletError(
            f"{folder}: no tokenizer in it",
            why=f"it holds {', '.join(there[:8]) or 'nothing'}, and a model works with its own tokenizer only",
            fix="copy the model's tokenizer.json and tokenizer_config.json into the folder",
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        if name in there:
            _check_json(folder / name)
    tokenizer = _from_folder(folder)
    if chat_template:
        tokenizer.chat_template = read_template(chat_template)
        if tokenizer.chat_template == CHATML:
            _check_chatml(tokenizer, folder)
        if tokenizer.chat_template == PLAIN and not tokenizer.eos_token:
            raise TuneletError(
                f"{folder}: the tokenizer has no end-of-text token",
                why="the plain template ends an answer with it",
                fix="--set model.chat_template=FILE, with a template that uses this tokenizer's own tokens",
            )
    return tokenizer


def read_template(value: str) -> str:
    """The Jinja source of a built-in template, by name, or of a file."""
    if value in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[value]
    path = Path(value)
    if not path.is_file():
        known = ", ".join(BUILT_IN_TEMPLATES)
        raise TuneletError(f"{value}: no such chat template", fix=f"name a file with Jinja in it, or one of: {known}")
    return path.read_text(encoding="utf-8")


def no_template(tokenizer: Any) -> TuneletError:
    """The error for conversations without a template; a base model with ChatML's tokens is told of the built-in one."""
    if has_chatml_tokens(tokenizer):
        fix = "the tokenizer has ChatML's tokens: --set model.chat_template=chatml, or FILE with a Jinja template"
    else:
        fix = "--set model.chat_template=FILE, with the Jinja template of the model's instruct version, or plain"
    fix += " (verbs that only look or ask: --template)"
    why = "base models come without one, and a conversation needs one to become text"
    return TuneletError("the tokenizer has no chat template", why=why, fix=fix)


def has_chatml_tokens(tokenizer: Any) -> bool:
    vocabulary = tokenizer.get_vocab()
    return "<|im_start|>" in vocabulary and "<|im_end|>" in vocabulary


def _check_chatml(tokenizer: Any, folder: Path) -> None:
    if not has_chatml_tokens(tokenizer):
        raise TuneletError(
            f"{folder}: the tokenizer has no tokens <|im_start|> and <|im_end|>",
            why="ChatML would be spelt out in pieces, no token would end a turn, and embeddings are never resized here",
            fix="--set model.chat_template=FILE, with a template that uses this tokenizer's own tokens",
        )


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    try:
        if _is_plain(folder):
            from transformers import PreTrainedTokenizerFast as Kind
        else:
            from transformers import AutoTokenizer as Kind
        tokenizer = Kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions for a malformed tokenizer.json
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TuneletError(
            f"{folder}: the tokenizer cannot be loaded", why=first, fix="copy the model's tokenizer files again"
        ) from error
    if not tokenizer.is_fast:
        raise TuneletError(
            f"{folder}: only a slow tokenizer can be made of these files",
            why="masks need to know which characters each token covers",
            fix="save it with tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained(...))",
        )
    return tokenizer


def _is_plain(folder: Path) -> bool:
    """Whether AutoTokenizer, which imports torch to read config.json, would come to PreTrainedTokenizerFast anyway:
    nothing says otherwise, or tokenizer_config.json says so by its present name and the model's family is one that
    transformers takes at its word."""
    config, model = (
        json.loads(file.read_text(encoding="utf-8")) if (file := folder / name).is_file() else None
        for name in ("tokenizer_config.json", "config.json")
    )
    if config is None or model is None:
        return config is None and model is None
    plain = config.get("tokenizer_class") == "TokenizersBackend" and "auto_map" not in config
    return plain and model.get("model_type") == "llama"


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise TuneletError(f"{path}: not UTF-8", why=str(error), fix="copy the file again") from None
    except json.JSONDecodeError as error:
        why = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise TuneletError(f"{path}: not valid JSON", why=why, fix="copy the file again: it is damaged") from None

"""A tokenizer as a GGUF file holds it: entries, merges or scores, special tokens, how text is cut before merging, the
chat template. Not for the model's weights (gguf_model.py).

llama.cpp implements cutting by regular expressions under names, so a tokenizer is written only if what tokenizer.json
says is one of those; whether both then make the same tokens is measured by the gate (gguf_gate.py), not believed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError

# The regular expressions of published tokenizers, by which they are recognised (facts of their tokenizer.json).
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
BY_REGEX = {LLAMA3: "llama-bpe", QWEN2: "qwen2"}
BYTE = "<0x{:02X}>"


def unsupported(why: str) -> TuneletError:
    return TuneletError(
        "This tokenizer can't be written into a GGUF file.",
        why=why,
        fix="Use the torch engine, or --to safetensors, which keep the tokenizer as it is.",
    )


def describe(writer: Any, tokenizer: Any, vocab_size: int, stop_ids: tuple[int, ...]) -> None:
    """Write the tokenizer's keys. vocab_size: rows of the embeddings, which may be more than there are entries.

    stop_ids: where answers end; the first becomes the end of a turn where it is not the end of text.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model = spec["model"]
    if model["type"] != "BPE":
        raise unsupported(f"its kind is {model['type']}; BPE is what can be written")
    sentencepiece = bool(model.get("byte_fallback"))
    vocab = dict(tokenizer.get_vocab())
    if max(vocab.values(), default=0) >= vocab_size:
        raise unsupported(f"it has an entry {max(vocab.values())}, the model {vocab_size} rows of embeddings")
    tokens, types = [f"[PAD{id_}]" for id_ in range(vocab_size)], [_type().UNUSED] * vocab_size
    for text, id_ in vocab.items():
        tokens[id_] = text
        types[id_] = _type().BYTE if sentencepiece and _is_byte(text) else _type().NORMAL
    for id_, added in tokenizer.added_tokens_decoder.items():
        # what is not special is text that is never cut
        types[id_] = _type().CONTROL if added.special else _type().USER_DEFINED
    if tokenizer.unk_token_id is not None and sentencepiece:
        types[tokenizer.unk_token_id] = _type().UNKNOWN
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(model, tokens))
        writer.add_add_space_prefix(_prepends(spec))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(spec))
        writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]])
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in types])
    _special(writer, tokenizer, stop_ids)
    if template := template_of(tokenizer):
        writer.add_chat_template(template)


def _type() -> Any:
    from gguf import TokenType

    return TokenType


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """SentencePiece merges the pair whose result scores highest; of merges in order, earlier ones score higher."""
    made: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        made.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ", 1)), rank)
    return [-float(made[token]) if token in made else -1e6 for token in tokens]


def _prepends(spec: dict[str, Any]) -> bool:
    """Whether a space goes in front of a text. Raises TuneletError for a normaliser of another kind."""
    parts = _parts(spec["normalizer"], "normalizers")
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    if [part for part in parts if part not in (space, prepend)] or space not in parts:
        raise unsupported("its normaliser changes more than spaces")
    return prepend in parts


def _parts(spec: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if spec is None:
        return []
    return spec[inside] if spec["type"] == "Sequence" else [spec]


def _pre(spec: dict[str, Any]) -> str:
    """llama.cpp's name of the way this tokenizer cuts text. Raises TuneletError where it has none."""
    normalizer = [part["type"] for part in _parts(spec["normalizer"], "normalizers")]
    parts = _parts(spec["pre_tokenizer"], "pretokenizers")
    kinds = [part["type"] for part in parts]
    if parts and kinds[-1] == "ByteLevel" and not parts[-1]["add_prefix_space"]:
        regex = parts[-1]["use_regex"]
        if kinds == ["ByteLevel"] and regex and not normalizer:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and regex and not normalizer:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not regex and parts[0]["behavior"] == "Isolated":
            name = BY_REGEX.get(parts[0]["pattern"].get("Regex", ""))
            if name and normalizer in ([], ["NFC"] if name == "qwen2" else []):
                return name
    raise unsupported(f"it cuts text by {', then '.join(kinds) or 'nothing'}, in a way that llama.cpp has no name for")


def _special(writer: Any, tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        if (id_ := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(id_)
    other = [id_ for id_ in stop_ids if id_ != tokenizer.eos_token_id]
    if other:
        writer.add_eot_token_id(other[0])
    probe = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(probe) and probe[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(probe) and tokenizer.eos_token_id is not None and probe[-1] == tokenizer.eos_token_id)


def composes(tokenizer: Any) -> bool:
    """Whether it composes characters (Unicode's NFC) before it cuts text: llama.cpp does not."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    return any(part["type"] == "NFC" for part in _parts(spec["normalizer"], "normalizers"))


def template_of(tokenizer: Any) -> str:
    """The chat template of a tokenizer, the default one where it has several; "" without one."""
    found = tokenizer.chat_template or ""
    return found if isinstance(found, str) else found.get("default", "")


def stored_template(path: Path) -> str:
    """The chat template inside a GGUF file; "" without one."""
    from gguf import GGUFReader

    field = GGUFReader(path).get_field("tokenizer.chat_template")
    return "" if field is None else str(field.contents())

"""What stands beside a merged model's weights: config.json, generation_config.json, tokenizer and chat template.

Not for the weights and what they compute (merge_gate.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tunelet.errors import TuneletError

# What a merged model's config.json may say otherwise than its base's: how it is stored, and what is checked elsewhere.
FREE = {"dtype", "transformers_version", "_name_or_path", "architectures", "quantization_config"}
FREE |= {"tie_word_embeddings", "eos_token_id"}
TEXTS = 8  # rows whose text both tokenizers take apart


def open_tokenizer(adapter: Path, base: Path) -> Any:
    """The adapter's own tokenizer, which may have a chat template that the base has not; else the base's."""
    from tunelet.data.tokenizer import TOKENIZER_FILES, load_tokenizer

    return load_tokenizer(adapter if any((adapter / name).is_file() for name in TOKENIZER_FILES) else base)


def stop_ids(tokenizer: Any, base: Path) -> list[int]:
    """Where answers end: the tokens of the tokenizer's chat template and those the base stops at already."""
    from tunelet.data.render import Renderer

    ends = Renderer(tokenizer).stop_ids if tokenizer.chat_template else ()
    return list(dict.fromkeys([*ends, *_eos(base)]))


def _eos(folder: Path) -> list[int]:
    from transformers import AutoConfig, GenerationConfig

    kind = GenerationConfig if (folder / "generation_config.json").is_file() else AutoConfig
    eos = kind.from_pretrained(folder, local_files_only=True).eos_token_id
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def stops(merged: Path, adapter: Path, base: Path) -> Iterator[str]:
    """Findings: stop ids of the base or of the adapter's chat template that generation_config.json lacks."""
    absent = set(stop_ids(open_tokenizer(adapter, base), base)) - set(_eos(merged))
    if absent:
        yield f"generation_config.json does not stop at {', '.join(map(str, sorted(absent)))}"


def config(merged: Path, base: Any, trust_remote_code: bool) -> Iterator[str]:
    """Findings: what config.json says otherwise than `base`, the configuration of the base model."""
    from transformers import AutoConfig

    ours = AutoConfig.from_pretrained(merged, local_files_only=True, trust_remote_code=trust_remote_code).to_dict()
    theirs = base.to_dict()
    for key in sorted((theirs.keys() | ours.keys()) - FREE):
        if theirs.get(key) != ours.get(key):
            yield f"config.json says {key} = {ours.get(key)}, the base's {theirs.get(key)}"


def tokenizer(merged: Path, adapter: Path, base: Path, rows: Sequence[Sequence[int]]) -> Iterator[str]:
    """Findings: entries, added and special tokens, chat template, and what it makes of the rows' texts."""
    from tunelet.data.tokenizer import load_tokenizer

    wanted = open_tokenizer(adapter, base)
    try:
        found = load_tokenizer(merged)
    except TuneletError as error:
        yield str(error).replace("\n", "; ")
        return
    if len(found) != len(wanted):
        yield f"its tokenizer has {len(found)} entries, the adapter's {len(wanted)}"
    there, here = _added(wanted), _added(found)
    for id_ in sorted(there.keys() | here.keys()):
        if there.get(id_) != here.get(id_):
            yield f"in its tokenizer the added token {there.get(id_)} ({id_}) is {here.get(id_) or 'missing'}"
    if _special(found) != _special(wanted):
        yield f"its special tokens are {_special(found)}, the adapter's {_special(wanted)}"
    if found.chat_template != wanted.chat_template:
        yield f"its tokenizer has {'another' if found.chat_template else 'no'} chat template than the adapter's"
    texts = [wanted.decode(row) for row in rows[:TEXTS]]
    if any(found(text)["input_ids"] != wanted(text)["input_ids"] for text in texts):
        yield "its tokenizer makes other tokens of the same text than the adapter's"


def _added(tokenizer: Any) -> dict[int, str]:
    return {id_: str(token) for id_, token in tokenizer.added_tokens_decoder.items()}


def _special(tokenizer: Any) -> dict[str, tuple[str, int]]:
    """name -> token and id of eos, bos, pad, ..."""
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return {name: (token, tokenizer.convert_tokens_to_ids(token)) for name, token in named.items() if token}

"""Training of a tokenizer for a first training from random weights: byte-level BPE, digit by digit, with SmolLM2's chat
tokens.

Not for loading tokenizers (data/render.py) and not for adding tokens to one that exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tunelet.errors import TuneletError

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2, as in SmolLM2
# ChatML without a default system prompt: what is not in a conversation is not put there.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> Path:
    """Train a tokenizer of at most `vocab_size` entries and save it as `folder`, whole or not at all. Returns `folder`.

    Any byte can be encoded; every digit is a token of its own. eos and pad are <|endoftext|>; there is no bos.
    Raises TuneletError where there is no text or no room for the 256 bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(SPECIAL) + len(alphabet)
    if vocab_size < least:
        raise TuneletError(
            f"tokenizer.vocab_size = {vocab_size} is too small.",
            why=f"256 bytes and {len(SPECIAL)} special tokens need {least}",
            fix="Choose 1000 to 4000 for a small model.",
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=sorted(alphabet), show_progress=False
    )
    seen = False

    def checked() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen = seen or bool(text.strip())
            yield text

    core.train_from_iterator(checked(), trainer)
    if not seen:
        raise TuneletError(
            "The tokenizer cannot be trained.", why="there is no text to train it on", fix="Give text in data.train."
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=list(SPECIAL[1:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    temporary = folder.with_name(f".tmp-{folder.name}")
    tokenizer.save_pretrained(temporary)
    if folder.is_dir():
        folder.rmdir()  # an empty one made by the caller
    temporary.rename(folder)
    return folder

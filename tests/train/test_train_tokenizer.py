"""The trained tokenizer: SmolLM2's pre-tokenisation and special tokens, any byte, a template without a system
prompt."""

from __future__ import annotations

import json

import pytest

from tunelet.errors import TuneletError
from tunelet.train.tokenizer import train_tokenizer

TEXTS = ["Turn on the light at 18:30.", "거실 불을 켜 줘. 오후 7시 15분.", "It costs 1234 dollars in 2024."] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from tunelet.data.render import load_tokenizer

    folder = train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("tokenizer") / "t")
    return load_tokenizer(folder)


def test_special_tokens(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0 and tokenizer.bos_token is None
    assert tokenizer("<|im_start|>x")["input_ids"][0] == 1
    assert len(tokenizer) <= 400


def test_digits_stand_alone_and_every_text_comes_back(tokenizer):
    digits = tokenizer.tokenize("2024 1830")
    assert [token.strip("Ġ") for token in digits if token.strip("Ġ")] == list("20241830")
    for text in (*TEXTS, "emoji 🦁 and Ünïcode", "\t two  spaces\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_pre_tokenisation_is_that_of_smollm2(tokenizer, shared):
    theirs = json.loads((shared / "tokenizer-smollm2" / "instruct" / "tokenizer.json").read_text())["pre_tokenizer"]
    ours = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]
    assert ours == theirs


def test_chatml_without_a_system_prompt(tokenizer):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == text
    assert (
        tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        == text[: text.index("Hello")]
    )


def test_training_is_repeatable(tmp_path):
    a, b = (train_tokenizer(TEXTS, 400, tmp_path / name) for name in "ab")
    assert (a / "tokenizer.json").read_bytes() == (b / "tokenizer.json").read_bytes()


def test_no_text_and_no_room(tmp_path):
    with pytest.raises(TuneletError, match="cannot be trained"):
        train_tokenizer(["", "  "], 400, tmp_path / "t")
    with pytest.raises(TuneletError, match="too small"):
        train_tokenizer(TEXTS, 250, tmp_path / "t")
    assert not (tmp_path / "t").exists()

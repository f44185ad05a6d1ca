"""Streamed text is whole characters, and all of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunelet.infer.text import BROKEN, TextStream


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """Byte-level, without merges: every byte is a token, so every Korean syllable comes in three."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_korean_comes_in_syllables(bytes_tokenizer):
    stream = TextStream(bytes_tokenizer)
    pieces = [stream.push(i) for i in bytes_tokenizer.encode("불을 켜 줘 🙂")]
    assert [p for p in pieces if p] == ["불", "을", " ", "켜", " ", "줘", " ", "🙂"]
    assert stream.finish() == "" and stream.text == "불을 켜 줘 🙂"


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_text_comes_whole(bytes_tokenizer, text):
    stream = TextStream(bytes_tokenizer)
    pieces = [stream.push(i) for i in bytes_tokenizer.encode(text)] + [stream.finish()]
    assert "".join(pieces) == stream.text == text
    if BROKEN not in text:
        assert not any(BROKEN in p for p in pieces)


def test_an_answer_cut_inside_a_character_ends_with_the_mark(bytes_tokenizer):
    stream = TextStream(bytes_tokenizer)
    ids = bytes_tokenizer.encode("가나")[:-1]
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == "가"
    assert stream.finish() == BROKEN
    assert stream.text == bytes_tokenizer.decode(ids)


def test_spaces_of_sentencepiece_style_tokenizers_survive(shared):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "weights-stories260K" / "hf")
    text = "Once upon a time, there was a little girl named Lily."
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer)
    assert "".join([*(stream.push(i) for i in ids), stream.finish()]) == tokenizer.decode(ids)

"""Stop texts: noticed while an answer is written, with the text that a cut afterwards would give, and fewer tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunelet.infer import stops
from tunelet.infer.engine import TorchEngine


def test_cut_at_the_stop_text_that_is_complete_first():
    assert stops.cut("a\ndef b\nclass", ["\nclass", "\ndef"]) == "a"
    assert stops.cut("abcdef", ["abcdef", "c"]) == stops.cut("abc", ["abcdef", "c"]) == "ab"
    assert stops.cut("xyz!", ["z!", "yz!", "!"]) == "x", "of those that end together the longest"
    assert stops.cut("abc", []) == stops.cut("abc", ["", "d"]) == "abc" and stops.cut("abc", ["a"]) == ""


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", max_size=4), max_size=3), st.data())
def test_what_comes_later_does_not_move_the_cut(text, stop, data):
    end = data.draw(st.integers(0, len(text)))
    whole, begun = stops.cut(text, stop), stops.cut(text[:end], stop)
    assert begun == whole if begun != text[:end] else whole.startswith(stops.sure(begun, stop))


@pytest.fixture(scope="module")
def engines(shared, tiny_model_folder):
    """Byte-level pieces with random weights, which write broken characters too; and words that begin with a space."""
    from tunelet.commands.common import open_engine

    folders = {"bytes": tiny_model_folder, "words": shared / "weights-stories260K" / "hf"}
    return {
        name: open_engine(str(folder), device="cpu", dtype="float32", trust=False, template=None)
        for name, folder in folders.items()
    }


def streamed(engine: TorchEngine, prompt, **options):
    stream, pieces = engine.stream(prompt, **options), []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


@pytest.mark.parametrize("name", ["bytes", "words"])
def test_the_same_text_as_cut_afterwards_in_fewer_tokens(engines, name):
    engine, draw = engines[name], random.Random(4)
    begun = ("Once upon a time", "The light", "오후 7시", "Lily: ") * 3
    asked = [engine.tokenizer(text)["input_ids"] for text in begun]
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 7}
    whole = engine.generate(asked, **options)
    texts = [one.text for one in whole]
    spared = stopped = 0
    for _ in range(12):
        found = []
        while len(found) < draw.randint(1, 4):  # pieces of what is written, so that they come
            text = draw.choice(texts)
            at = draw.randrange(len(text))
            piece = text[at : at + draw.randint(1, 9)]
            if piece and "\ufffd" not in piece:
                found.append(piece)
        early = engine.generate(asked, stop=found, **options)
        for before, now in zip(whole, early, strict=True):
            assert now.text == stops.cut(before.text, found), found
            assert before.ids[: len(now.ids)] == now.ids
            cut_off = now.text != before.text
            assert now.finish == ("stop" if cut_off else before.finish) and (cut_off or now.ids == before.ids)
            assert not cut_off or now.text == stops.cut(
                engine.tokenizer.decode(now.ids, skip_special_tokens=True), found
            )
            spared += len(before.ids) - len(now.ids)
            stopped += cut_off
        pieces, completion = streamed(engine, asked[0], stop=found, **options | {"temperature": 0.0})
        (alone,) = engine.generate(asked[:1], stop=found, **options | {"temperature": 0.0})
        assert completion == alone and "".join(pieces) == alone.text and all(pieces)
    assert stopped > 30 and spared > 300


def test_a_row_ends_at_the_token_that_completes_its_stop_text(engines):
    engine = engines["words"]
    prompt = engine.tokenizer("Once upon a time")["input_ids"]
    (whole,) = engine.generate([prompt], max_new_tokens=30)
    end = next(n for n in range(31) if "." in engine.tokenizer.decode(whole.ids[:n]))
    (early,) = engine.generate([prompt], max_new_tokens=30, stop=["."])
    assert early.ids == whole.ids[:end] and early.text == whole.text.partition(".")[0] and early.stopped

"""Held-out loss against transformers' own loss row by row; prompts and sample answers of chats and texts."""

from __future__ import annotations

import pytest
import torch

from tunelet.data.examples import Chat, Message, Origin, Text, Tokens
from tunelet.data.render import Renderer
from tunelet.evals import held_out
from tunelet.infer.engine import TorchEngine

HERE = Origin("rows.jsonl", 1)


def row(ids, mask) -> Tokens:
    return Tokens(tuple(ids), tuple(mask), ((0, len(ids), "text"),), HERE)


def some_rows(count: int, vocabulary: int) -> list[Tokens]:
    g = torch.Generator().manual_seed(0)
    out = []
    for size in torch.randint(3, 40, (count,), generator=g).tolist():
        ids = torch.randint(0, vocabulary, (size,), generator=g).tolist()
        out.append(row(ids, [False, *((torch.rand(size - 1, generator=g) < 0.6).tolist())]))
    return [*out, row([1, 2, 3], [False] * 3)]


def test_loss_of_every_row_equals_transformers(tiny_model, monkeypatch):
    monkeypatch.setattr(held_out, "BATCH_TOKENS", 64)
    rows = some_rows(12, tiny_model.config.vocab_size)
    from tunelet.models.attention import register

    plain = []
    for r in rows:
        labels = torch.tensor([[i if m else -100 for i, m in zip(r.ids, r.mask, strict=True)]])
        out = tiny_model(torch.tensor([r.ids]), labels=labels).loss
        plain.append((out.item() * r.trained if r.trained else 0.0, r.trained))
    register()
    tiny_model.set_attn_implementation("tunelet")
    got = held_out.losses(tiny_model.train(), rows)
    assert tiny_model.training
    assert [n for _, n in got] == [n for _, n in plain]
    for (a, _), (b, _) in zip(got, plain, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    figure = held_out.held_out_loss(tiny_model, rows)
    total = sum(n for _, n in plain)
    assert figure["value"] == pytest.approx(sum(a for a, _ in plain) / total, rel=1e-5)
    assert figure["low"] < figure["value"] < figure["high"] and figure["n"] == sum(n > 0 for _, n in plain)
    assert held_out.held_out_loss(tiny_model, [rows[-1]]) is None


def test_prompts_and_samples(tiny_model, tiny_tokenizer):
    renderer = Renderer(tiny_tokenizer)
    engine = TorchEngine(tiny_model, tiny_tokenizer, renderer)
    chat = Chat(
        (Message("user", "one"), Message("assistant", "1"), Message("user", "two"), Message("assistant", "2")), HERE
    )
    no_prompt = Chat((Message("assistant", "1"),), HERE)
    text = Text("Turn on the light in the kitchen at 18:00, please.", HERE)
    got = held_out.answers(engine, [no_prompt, chat, text, chat], prompts=["안녕?"], rows=2, max_new_tokens=5)
    assert [r["item"] for r in got] == ["prompt/0", "held_out/1", "held_out/2"]
    assert [r["type"] for r in got] == ["prompt", "held_out", "text"]
    assert got[1]["expected"] == "2" and [m["content"] for m in got[1]["messages"]] == ["one", "1", "two"]
    assert text.text.startswith(got[2]["messages"][0]["content"]) and got[2]["expected"] in text.text
    assert got == held_out.answers(engine, [no_prompt, chat, text, chat], prompts=["안녕?"], rows=2, max_new_tokens=5)
    assert held_out.stop_rate(got)["n"] == 2
    assert held_out.stop_rate([got[2]]) is None

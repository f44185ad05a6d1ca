"""The torch engine against transformers' generate, batch composition, stopping, limits, sampling and streaming."""

from __future__ import annotations

import pytest
import torch

from tunelet.errors import TuneletError
from tunelet.infer.engine import TorchEngine
from tunelet.models.attention import register

VOCABULARY = 96


def tiny(kind: str = "llama", **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    window = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    shape = {
        "llama": {**size, "num_key_value_heads": 2},
        "qwen3": {**size, "num_key_value_heads": 2, "head_dim": 8},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "gemma3_text": {**size, "num_key_value_heads": 1, "head_dim": 8, **window, "tie_word_embeddings": False},
    }[kind]
    limit = {} if kind == "gpt2" else {"max_position_embeddings": 64}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=VOCABULARY, initializer_range=0.4, **{**shape, **limit, **ends, **changes}
    )
    return AutoModelForCausalLM.from_config(config).eval()


class Letters:
    """A tokenizer of the test's own: id -> a character."""

    eos_token_id = 2

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(0x3B0 + i) for i in ids)


def prompts(count: int, seed: int = 0, low: int = 1, high: int = 14) -> list[list[int]]:
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(low, high, (count,), generator=g).tolist()
    return [torch.randint(3, VOCABULARY, (size,), generator=g).tolist() for size in sizes]


def reference(model, prompt: list[int], new: int, stops: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=0
    )
    ids = out[0, len(prompt) :].tolist()
    stopped = bool(ids) and ids[-1] in stops
    return tuple(ids[:-1] if stopped else ids), stopped


@pytest.mark.parametrize("attention", ["sdpa", "tunelet"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma3_text"])
def test_greedy_equals_transformers_generate(kind, attention):
    model = tiny(kind)
    asked = prompts(23)
    stops = tuple(range(2, 12))  # often enough that rows leave the batch at different steps
    wanted = [reference(model, prompt, 20, stops) for prompt in asked]
    if attention == "tunelet":
        register()
    model.set_attn_implementation(attention)
    got = TorchEngine(model, Letters(), stop_ids=stops).generate(asked, max_new_tokens=20, batch_size=8)
    assert [(c.ids, c.stopped) for c in got] == wanted
    assert 3 < sum(c.stopped for c in got) < 23 and len({len(c.ids) for c in got}) > 2
    assert all(c.text == Letters().decode(c.ids) for c in got)


def test_what_shares_the_batch_does_not_matter():
    engine = TorchEngine(tiny(), Letters(), stop_ids=(2, 3, 4, 5))
    asked = prompts(17)
    for options in ({}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 5, "repetition_penalty": 1.2}):
        all_at_once = engine.generate(asked, max_new_tokens=12, batch_size=17, **options)
        assert engine.generate(asked, max_new_tokens=12, batch_size=17, **options) == all_at_once
        assert engine.generate(asked, max_new_tokens=12, batch_size=1, **options) == all_at_once
        assert engine.generate(asked, max_new_tokens=12, batch_size=5, **options) == all_at_once


def test_a_small_cache_budget_makes_smaller_batches_only(monkeypatch):
    engine = TorchEngine(tiny(), Letters(), stop_ids=(2,))
    asked = prompts(6)
    whole = engine.generate(asked, max_new_tokens=8)
    monkeypatch.setattr("tunelet.infer.engine.CACHE_MB", 0.02)
    assert engine._rows_that_fit(10, 8, 64) == 4
    assert engine.generate(asked, max_new_tokens=8) == whole


def test_the_models_context_is_respected():
    model = tiny(max_position_embeddings=16)
    engine = TorchEngine(model, Letters(), stop_ids=())
    engine.stop_ids = frozenset()
    short, near = engine.generate([[5, 6, 7], list(range(3, 17))], max_new_tokens=10)
    assert (short.finish, len(short.ids)) == ("length", 10)
    assert (near.finish, len(near.ids)) == ("context", 2)
    with pytest.raises(TuneletError, match=r"Prompt 2 has 16 tokens; this model reads at most 16"):
        engine.generate([[5], list(range(3, 19))], max_new_tokens=3)
    with pytest.raises(TuneletError, match="Prompt 1 is empty"):
        engine.generate([[]], max_new_tokens=3)
    assert engine.generate([], max_new_tokens=3) == []


def test_progress_and_mode():
    model = tiny().train()
    seen: list[int] = []
    TorchEngine(model, Letters()).generate(prompts(5), max_new_tokens=3, batch_size=2, progress=seen.append)
    assert seen[-1] == 5 and seen == sorted(seen)
    assert model.training


def test_bfloat16_runs_and_mostly_agrees():
    model = tiny()
    asked = prompts(10)
    exact = TorchEngine(model, Letters()).generate(asked, max_new_tokens=6)
    rough = TorchEngine(model.bfloat16(), Letters()).generate(asked, max_new_tokens=6)
    assert sum(a.ids[:1] == b.ids[:1] for a, b in zip(exact, rough, strict=True)) >= 8


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": 0.0}],
    ids=str,
)
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(TuneletError, match=next(iter(wrong))):
        TorchEngine(tiny(), Letters()).generate([[5]], max_new_tokens=2, **wrong)


def test_stream_gives_what_generate_gives():
    engine = TorchEngine(tiny(), Letters(), stop_ids=(2, 3, 4, 5, 6, 7))
    for prompt in prompts(6, seed=3):
        for options in ({}, {"temperature": 1.0, "seed": 3}):
            whole = engine.generate([prompt], max_new_tokens=12, **options)[0]
            stream = engine.stream(prompt, max_new_tokens=12, **options)
            pieces: list[str] = []
            while True:
                try:
                    pieces.append(next(stream))
                    torch.ones(1, requires_grad=True).sum().backward()  # the caller is not in inference mode
                except StopIteration as end:
                    assert end.value == whole
                    break
            assert "".join(pieces) == whole.text and all(pieces)

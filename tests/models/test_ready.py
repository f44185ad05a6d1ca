"""Made ready to train, a model computes what it computed before."""

from __future__ import annotations

import gc

import pytest
import torch

from tunelet.data.examples import Origin, Tokens
from tunelet.data.pack import make_batch
from tunelet.errors import TuneletError
from tunelet.models import head, load
from tunelet.models.device import Choice
from tunelet.models.ready import make_ready

CPU = Choice("cpu", "float32", 1)


def batch():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 300, (n,), generator=generator).tolist() for n in (9, 30, 17, 5)]
    return make_batch(
        [Tokens(tuple(ids), (True,) * len(ids), ((0, len(ids), "text"),), Origin("f", 1)) for ids in rows]
    )


def loss_and_gradients(model):
    model.train()
    loss = head.nll_sum(model, batch(), 0.1)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-6)
    assert set(one[1]) == set(other[1])
    for name, gradient in one[1].items():
        assert torch.linalg.vector_norm(gradient - other[1][name]) <= 1e-5 * torch.linalg.vector_norm(gradient), name


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("adapted", [False, True])
def test_checkpointing_gives_the_same_loss_and_gradients(tiny_model_folder, adapted):
    def made():
        model = load.load_model(tiny_model_folder, CPU)
        return lora(model) if adapted else model

    plain = loss_and_gradients(made())
    calls = []
    model = make_ready(made(), checkpointing=True)
    first = next(
        module for module in model.modules() if type(module).__name__ == "FastNorm" or hasattr(module, "q_proj")
    )
    head.is_plain(model)  # tries the model out, once
    first.register_forward_hook(lambda *_: calls.append(1))
    same(plain, loss_and_gradients(model))
    assert len(calls) == 2, "computed again in the backward"


def test_checkpointing_keeps_nothing_from_inside_a_layer(tiny_model_folder):
    """Hooks inside a checkpointed layer would win over the checkpoint's own and keep what it means to let go."""
    model = make_ready(lora(load.load_model(tiny_model_folder, CPU)), checkpointing=True).train()
    width, rows = model.config.intermediate_size, batch()

    def wide():
        gc.collect()
        return [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape[-2:] == (len(rows.input_ids), width)]

    before = wide()  # other tests' leftovers
    loss = head.nll_sum(model, rows, 0.1)
    assert loss.requires_grad and len(wide()) == len(before)


@pytest.mark.slow
def test_compiled_layers_give_the_same_loss_and_gradients(tiny_model_folder):
    pytest.importorskip("torch._inductor")
    plain = loss_and_gradients(load.load_model(tiny_model_folder, CPU))
    from tunelet.models import attention

    try:
        same(plain, loss_and_gradients(make_ready(load.load_model(tiny_model_folder, CPU), compiled=True)))
    finally:
        attention.register()


def test_what_cannot_be_made_ready(tiny_model_folder, monkeypatch):
    model = load.load_model(tiny_model_folder, CPU)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(TuneletError, match="C\\+\\+ compiler"):
        make_ready(model, compiled=True)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(TuneletError, match="gradient_checkpointing cannot be on"):
        make_ready(model, checkpointing=True)

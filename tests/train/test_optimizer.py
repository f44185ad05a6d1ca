"""AdamW against torch's, the bf16 grid trap and its cure, clipping, accumulation and state."""

from __future__ import annotations

import pytest
import torch

from tunelet.train import rounding
from tunelet.train.optimizer import AdamW


def layers(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.LayerNorm(32), torch.nn.Linear(32, 4)
    ).to(dtype)


def data():
    torch.manual_seed(7)
    x = torch.randn(64, 16)
    return x, torch.tanh(x @ torch.randn(16, 4))


def loss_of(model, dtype=torch.float32):
    x, y = data()
    return torch.nn.functional.mse_loss(model(x.to(dtype)).float(), y)


def test_fp32_equals_torch_adamw_with_clipping_and_decay_on_matrices_only():
    ours, theirs = layers(), layers()
    a = AdamW(ours.named_parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    matrices, rest = [p for p in theirs.parameters() if p.ndim > 1], [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    b = torch.optim.AdamW(groups, betas=(0.9, 0.95), lr=0.01, fused=True)
    for step in range(20):
        loss_of(ours).backward()
        loss_of(theirs).backward()
        norm = a.step(0.01 * (step + 1) / 20, max_grad_norm=0.3)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3)
        for group in b.param_groups:
            group["lr"] = 0.01 * (step + 1) / 20
        b.step()
        b.zero_grad()
        assert norm == pytest.approx(float(expected), rel=1e-5)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(p, q, atol=1e-7, rtol=1e-5)


def test_stochastic_rounding_is_unbiased_exact_on_the_grid_and_repeatable():
    grid = torch.cat([torch.randn(4096).bfloat16().float(), torch.zeros(1000), -torch.zeros(1000)])
    value = torch.full((200_000,), 1.0 + 2**-7 * 0.3)  # three tenths of the way between two neighbours

    def generator():
        return torch.Generator().manual_seed(3)

    assert torch.equal(rounding.to_bfloat16(grid, generator()).float(), grid)
    rounded = rounding.to_bfloat16(value, generator())
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert float(rounded.double().mean()) == pytest.approx(float(value[0]), abs=3e-5)
    assert torch.equal(rounded, rounding.to_bfloat16(value, generator()))
    assert not torch.equal(rounded, rounding.to_bfloat16(value, torch.Generator().manual_seed(4)))
    negative = rounding.to_bfloat16(-value[:5], generator())
    assert set(negative.tolist()) <= {-1.0, -1.0 - 2**-7}


def descend(dtype, steps, rate, optimizer_of):
    """Final loss, measured in fp32 on the weights that the model computes with."""
    model = layers(torch.bfloat16).to(dtype)  # a published checkpoint: the weights lie on the bf16 grid
    optimizer = optimizer_of(model)
    for _ in range(steps):
        loss_of(model, dtype).backward()
        optimizer(model)
    exact = layers()
    exact.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    return float(loss_of(exact).detach())


def test_the_grid_trap_is_cured():
    """Tiny steps from weights on the bf16 grid: rounding to nearest swallows them, stochastic rounding follows fp32."""
    rate, steps = 3e-5, 60

    def with_tunelet(model):
        optimizer = AdamW(model.named_parameters(), seed=1)
        return lambda _: optimizer.step(rate)

    def with_nearest(model):
        master = [p.detach().float().requires_grad_() for p in model.parameters()]
        optimizer = torch.optim.AdamW(master, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)

        def step(model):
            for m, p in zip(master, model.parameters(), strict=True):
                m.grad, p.grad = p.grad.float(), None
            optimizer.step()
            for m, p in zip(master, model.parameters(), strict=True):
                p.data.copy_(m.data)

        return step

    start = descend(torch.float32, 0, rate, with_tunelet)
    fp32 = start - descend(torch.float32, steps, rate, with_tunelet)
    cured = start - descend(torch.bfloat16, steps, rate, with_tunelet)
    trapped = start - descend(torch.bfloat16, 8, rate, with_nearest)
    first = start - descend(torch.float32, 8, rate, with_tunelet)
    assert fp32 > 0
    assert abs(cured - fp32) < 0.25 * fp32, (cured, fp32)
    assert trapped < 0.75 * first, "the trap has to be there for this test to mean something"


def test_accumulated_micro_batches_equal_one_batch_in_bf16_too():
    """Gradients of micro-batches are added in fp32, not in the gradients' own bf16."""
    model = layers(torch.bfloat16)
    optimizer = AdamW(model.named_parameters())
    gradients = [{name: torch.randn_like(p) * 10.0**-i for name, p in model.named_parameters()} for i in range(4)]
    for number, part in enumerate(gradients):
        optimizer.accumulate(number)
        sum((p * part[name]).sum() for name, p in model.named_parameters()).backward()
        assert all(p.grad is None for p in model.parameters()), "freed as soon as it is added"
    exact = torch.sqrt(sum(sum(part[name].float() for part in gradients).pow(2).sum() for name in gradients[0]))
    assert optimizer.step(1e-3) == pytest.approx(float(exact), rel=1e-5)
    assert all(not bucket.accumulated.any() for bucket in optimizer.buckets)


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = layers()
    optimizer = AdamW(model.named_parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    loss_of(model).backward()
    model[0].weight.grad[0, 0] = float("nan")
    assert not optimizer.step(1e-2) < float("inf")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_put_back_goes_on_bit_identical(dtype):
    model = layers(dtype)
    optimizer = AdamW(model.named_parameters(), seed=5, weight_decay=0.01)
    for _ in range(5):
        loss_of(model, dtype).backward()
        optimizer.step(1e-2)
    kept = {key: value.clone() for key, value in optimizer.state().items()}
    other = layers(dtype, seed=9)
    again = AdamW(other.named_parameters(), seed=5, weight_decay=0.01)
    again.load_state(kept, 5)
    for _ in range(4):
        for one, step in ((model, optimizer), (other, again)):
            loss_of(one, dtype).backward()
            step.step(1e-2)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_settle_and_refresh_leave_training_as_it_was():
    model = layers(torch.bfloat16)
    optimizer = AdamW(model.named_parameters())
    loss_of(model, torch.bfloat16).backward()
    optimizer.step(1e-4)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.settle()
    nearest = [p.detach().clone() for p in model.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(before, nearest, strict=True))
    assert all(torch.equal(p, optimizer.weights()[name].bfloat16()) for name, p in model.named_parameters())
    optimizer.refresh()
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_tied_and_frozen_parameters(tiny_model):
    tiny_model.model.layers[0].requires_grad_(False)
    optimizer = AdamW(tiny_model.named_parameters())
    names = set(optimizer.weights())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    assert not any(name.startswith("model.layers.0.") for name in names)
    assert tiny_model.lm_head.weight.data_ptr() == tiny_model.model.embed_tokens.weight.data_ptr()

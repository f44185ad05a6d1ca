"""Optimizer states narrower than fp32: what is kept, how exact, resumed bit for bit, and that training gets there."""

from __future__ import annotations

import pytest
import torch

from tunelet.train import optimizer as optimizers
from tunelet.train import rounding
from tunelet.train.optimizer import BYTES, AdamW

STATES = ["float32", "bfloat16", "float8"]


def layers(dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    made = torch.nn.Sequential(
        torch.nn.Linear(16, 96),
        torch.nn.Tanh(),
        torch.nn.LayerNorm(96),
        torch.nn.Linear(96, 40),
        torch.nn.Linear(40, 4),
    )
    return made.to(torch.bfloat16).to(dtype)


def loss_of(model, dtype):
    torch.manual_seed(7)
    x = torch.randn(64, 16)
    return torch.nn.functional.mse_loss(model(x.to(dtype)).float(), torch.tanh(x @ torch.randn(16, 4)))


def trained(state, dtype, steps, rate=3e-3, **options):
    model = layers(dtype)
    optimizer = AdamW(model.named_parameters(), seed=1, state=state, **options)
    for _ in range(steps):
        loss_of(model, dtype).backward()
        optimizer.step(rate, 1.0)
    return model, optimizer


def generator(seed=3):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [1, 255, 256, 700, 100_000])
def test_float8_is_close_unbiased_and_repeatable(n):
    torch.manual_seed(0)
    values = torch.randn(n) * torch.logspace(-6, 2, n)
    coded, scale = rounding.to_float8(values, generator())
    back = rounding.from_float8(coded, scale)
    assert coded.shape == values.shape and coded.dtype == rounding.FLOAT8
    blocks = torch.nn.functional.pad(values.abs(), (0, -n % rounding.BLOCK)).view(-1, rounding.BLOCK).amax(1)
    largest = blocks.repeat_interleave(rounding.BLOCK)[:n]
    # three bits of mantissa; 2**-16 of the block's largest where they end
    assert ((back - values).abs() <= values.abs() / 8 + largest * 2**-16).all()
    assert torch.equal(back, rounding.from_float8(*rounding.to_float8(values, generator())))
    many = torch.full((rounding.BLOCK * 2000,), 1.03)
    mean = rounding.from_float8(*rounding.to_float8(many, generator())).double().mean()
    assert float(mean) == pytest.approx(1.03, rel=1e-3)


def test_float8_of_zeros_and_of_what_is_divided_by():
    zeros, scale = rounding.to_float8(torch.zeros(300), generator())
    assert not rounding.from_float8(zeros, scale).any()
    values = torch.zeros(256)
    values[0] = 100.0
    coded = rounding.from_float8(*rounding.to_float8(values, generator(), floor=True))
    assert (coded > 0).all() and coded[1:].max() < 0.01, "small, and never zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", STATES[1:])
def test_narrow_states_train_like_fp32(state, dtype):
    start = float(loss_of(layers(dtype), dtype).detach())
    full = float(loss_of(trained("float32", dtype, 150)[0], dtype).detach())
    narrow = float(loss_of(trained(state, dtype, 150)[0], dtype).detach())
    assert full < 0.2 * start
    assert start - narrow > 0.97 * (start - full), (start, full, narrow)


@pytest.mark.parametrize("state", STATES)
def test_bytes_of_state_are_as_promised(state):
    _, optimizer = trained(state, torch.bfloat16, 1)
    n = sum(bucket.n for bucket in optimizer.buckets)
    held = optimizer.state()
    weights = sum(tensor.nbytes for name, tensor in held.items() if name.startswith("weights."))
    moments = sum(tensor.nbytes for name, tensor in held.items() if not name.startswith("weights."))
    assert weights == n * (4 if state == "float32" else 2)
    extra = weights if state == "float32" else 0  # the master is state, the parameters themselves are not
    assert BYTES[state] * n <= extra + moments <= BYTES[state] * n * 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", STATES)
def test_state_put_back_goes_on_bit_identical(state, dtype):
    model, optimizer = trained(state, dtype, 5)
    kept = {key: value.clone() for key, value in optimizer.state().items()}
    other = layers(dtype, seed=9)
    again = AdamW(other.named_parameters(), seed=1, state=state)
    again.load_state(kept, 5)
    for _ in range(3):
        for one, step in ((model, optimizer), (other, again)):
            loss_of(one, dtype).backward()
            step.step(1e-2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("state", STATES)
def test_large_parameters_in_pieces_give_the_same(state, monkeypatch):
    whole, _ = trained(state, torch.float32, 6)
    # now every parameter is a bucket of its own, some in several pieces, and the noise of narrow moments is another
    monkeypatch.setattr(optimizers, "CHUNK_ELEMENTS", 512)
    pieces, optimizer = trained(state, torch.float32, 6)
    assert any(len(list(bucket.chunks())) > 1 for bucket in optimizer.buckets)
    assert len(optimizer.buckets) == 4
    for p, q in zip(whole.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6 if state == "float32" else 3e-3, rtol=1e-5)


@pytest.mark.parametrize("state", STATES)
def test_weights_on_the_bf16_grid_move_by_less_than_a_step_of_it(state):
    """Steps of a tenth of the grid: in expectation they arrive."""
    model = torch.nn.Linear(400, 400, bias=False).bfloat16()
    model.weight.data.fill_(1.0)  # the grid below 1 is 2**-8 wide
    optimizer = AdamW(model.named_parameters(), seed=2, state=state)
    for _ in range(20):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step(2**-8 / 10)
    assert float(model.weight.detach().double().mean()) == pytest.approx(1 - 2 * 2**-8, abs=2e-4)


@pytest.mark.parametrize("state", STATES)
def test_micro_batches_add_up(state):
    gradients = [torch.randn(64, 64, generator=generator(seed)).bfloat16() for seed in range(8)]

    def norm(parts):
        model = torch.nn.Linear(64, 64, bias=False).bfloat16()
        optimizer = AdamW(model.named_parameters(), state=state)
        for number, part in enumerate(parts):
            optimizer.accumulate(number)
            (model.weight * part).sum().backward()
            assert model.weight.grad is None
        return optimizer.step(1e-3)

    exact = float(torch.linalg.vector_norm(sum(part.float() for part in gradients)))
    assert norm(gradients) == pytest.approx(exact, rel=1e-5 if state == "float32" else 3e-3)

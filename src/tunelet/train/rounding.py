"""Stochastic rounding of fp32 numbers to bf16 and to block-wise 8-bit floats. Pure functions; not an optimizer.

Rounding to nearest swallows every change smaller than half a step of the coarser grid, again at each step. Rounding up
or down at random, with probability in proportion to the distance, keeps the expectation (arXiv:2010.06192). Noise comes
from a generator, so that it is a function of the caller's seed.
"""

from __future__ import annotations

import torch

BLOCK = 256  # numbers that share one scale
FLOAT8 = torch.float8_e4m3fn  # 3 bits of mantissa, normal numbers from 2**-6 to 448
SMALLEST = 2.0**-6


def _noise(n: int, generator: torch.Generator) -> torch.Tensor:
    """[n] int16, uniform: four of one 64-bit draw."""
    bits = torch.empty((n + 3) // 4, dtype=torch.int64, device=generator.device)
    bits.random_(-(2**63), None, generator=generator)  # all 64 bits: the default leaves the sign alone
    return bits.view(torch.int16)[:n]


def to_bfloat16(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 [n] -> bf16 [n]; what bf16 can hold exactly stays as it is. Non-finite values must not come in.

    A uniform 16-bit number is added to the bits that bf16 lacks, and these are cut off.
    """
    noise = _noise(values.numel(), generator)
    return values.view(torch.int32).add(noise).add_(32768).bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)


def to_float8(
    values: torch.Tensor, generator: torch.Generator, *, floor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [n] -> (float8 [n], fp32 [ceil(n / BLOCK)] scales), each value about float8 * scale of its block.

    A scale is a power of two that brings the block's largest magnitude to 128..256, so scaling is exact. Block-wise
    8-bit states: Dettmers et al., arXiv:2110.02861; here the 256 levels are those of e4m3, which are finer towards
    zero like theirs and need no table. Magnitudes under SMALLEST * scale are rounded to nearest; with `floor` they
    become SMALLEST * scale, for numbers that something is divided by.
    """
    n = values.numel()
    padded = torch.nn.functional.pad(values, (0, -n % BLOCK)) if n % BLOCK else values
    blocks = padded.view(-1, BLOCK)
    largest = torch.frexp(blocks.abs().amax(1))
    exponent = torch.where(largest.mantissa > 0, largest.exponent - 8, -100).clamp_(min=-100)
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    scaled = blocks / scale[:, None]
    noise = _noise(scaled.numel(), generator).to(torch.int32).add_(32768).bitwise_left_shift_(4).view_as(scaled)
    rounded = scaled.view(torch.int32).add(noise).bitwise_and_(-(2**20)).view(torch.float32)
    small = scaled.clamp(min=SMALLEST) if floor else scaled
    out = torch.where(scaled.abs() < SMALLEST, small, rounded).to(FLOAT8)
    return out.view(-1)[:n], scale


def from_float8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(float8 [n], fp32 [ceil(n / BLOCK)]) -> fp32 [n]."""
    n = values.numel()
    whole = n // BLOCK * BLOCK
    out = values.to(torch.float32)
    out[:whole].view(-1, BLOCK).mul_(scale[: n // BLOCK, None])
    if n > whole:
        out[whole:].mul_(scale[-1])
    return out

"""Causal attention on a CPU's matrix units: batched products and a softmax, block by block of queries, with a backward
of its own.

Not for laying rows out (attention.py) and not for fp32, where torch's kernel is as fast. Evidence: docs/notebook.md.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

# Up to this length a row's bf16 probabilities are kept for the backward; those of longer rows take more memory than
# they save time, and are made again.
KEEP_LENGTH = 640
# Queries are cut in blocks, so that keys that lie wholly in the future are not multiplied at all.
QUERY_BLOCK = 128


def block_mask(
    start: int, stop: int, first_key: int, window: int | None, dtype: torch.dtype, device: Any
) -> torch.Tensor:
    """[stop - start, stop - first_key] additive mask of queries start..stop-1 over keys first_key..stop-1."""
    queries = torch.arange(start, stop, device=device)[:, None]
    keys = torch.arange(first_key, stop, device=device)[None]
    hidden = keys > queries
    if window:
        hidden = hidden | (keys <= queries - window)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _blocks(length: int, window: int | None, skip: int = 0) -> list[tuple[int, int, int]]:
    """(first query, end of queries, first key) of each block of the queries after the first `skip`."""
    count = max(1, round((length - skip) / QUERY_BLOCK))
    edges = [skip + (length - skip) * i // count for i in range(count + 1)]
    return [(a, b, max(0, a - window + 1) if window else 0) for a, b in itertools.pairwise(edges) if b > a]


class GemmAttention(torch.autograd.Function):
    """Causal attention by batched GEMM and softmax. q: [b, L, H, D]; k, v: [b, L, KV, D]; returns [b, L, H, D].

    The query heads that share a key-value head are stacked along the query axis: K and V are never repeated. The first
    `skip` queries are left out, their results are zero. torch's own kernel has a faster forward and a backward
    that takes seven times as long as that: more in sum (docs/notebook.md).
    """

    @staticmethod
    def forward(ctx, q, k, v, scale, window, skip):
        b, length, heads, dim = q.shape
        kv = k.shape[2]
        g = heads // kv
        # [b*KV, L, G, D]: the queries of one position lie together, so that a block of queries is one slice.
        qs = (q * scale).view(b, length, kv, g, dim).permute(0, 2, 1, 3, 4).reshape(b * kv, length, g, dim)
        ks = k.permute(0, 2, 1, 3).reshape(b * kv, length, dim)
        vs = v.permute(0, 2, 1, 3).reshape(b * kv, length, dim)
        out = torch.empty_like(qs)
        out[:, :skip] = 0
        saved = []
        for block in _blocks(length, window, skip):
            start, stop, first = block
            p = GemmAttention._probabilities(qs, ks, block, window)
            out[:, start:stop] = torch.bmm(p, vs[:, first:stop]).view(b * kv, stop - start, g, dim)
            saved.append(p if length <= KEEP_LENGTH else None)
        ctx.save_for_backward(qs, ks, vs, *saved)
        ctx.scale, ctx.window, ctx.skip, ctx.shape = scale, window, skip, (b, length, heads, dim, kv, g)
        return out.view(b, kv, length, g, dim).permute(0, 2, 1, 3, 4).reshape(b, length, heads, dim)

    @staticmethod
    def _probabilities(qs, ks, block, window):
        """[b * KV, queries * G, keys] of one block."""
        start, stop, first = block
        rows, _, g, dim = qs.shape
        scores = torch.bmm(qs[:, start:stop].reshape(rows, -1, dim), ks[:, first:stop].transpose(1, 2))
        tail = scores.view(rows, stop - start, g, stop - first)
        if window:
            tail += block_mask(start, stop, first, window, qs.dtype, qs.device)[:, None]
        else:  # keys before the block are seen by all its queries
            tail[..., start - first :] += block_mask(start, stop, start, None, qs.dtype, qs.device)[:, None]
        return torch.softmax(scores, -1)

    @staticmethod
    def backward(ctx, grad):
        qs, ks, vs, *saved = ctx.saved_tensors
        b, length, heads, dim, kv, g = ctx.shape
        grad = grad.reshape(b, length, kv, g, dim).permute(0, 2, 1, 3, 4).reshape(b * kv, length, g, dim)
        dq = torch.empty_like(qs)
        dq[:, : ctx.skip] = 0
        blocks = _blocks(length, ctx.window, ctx.skip)
        dk, dv = (torch.zeros_like(ks), torch.zeros_like(vs)) if len(blocks) > 1 else (None, None)
        for (start, stop, first), p in zip(blocks, saved, strict=True):
            n = stop - start
            if p is None:
                p = GemmAttention._probabilities(qs, ks, (start, stop, first), ctx.window)
            go = grad[:, start:stop].reshape(b * kv, n * g, dim)
            dp = torch.bmm(go, vs[:, first:stop].transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, start:stop] = torch.bmm(ds, ks[:, first:stop]).view(b * kv, n, g, dim)
            dk_part = torch.bmm(ds.transpose(1, 2), qs[:, start:stop].reshape(b * kv, n * g, dim))
            dv_part = torch.bmm(p.transpose(1, 2), go)
            if dk is None:
                dk, dv = dk_part, dv_part
            else:
                dk[:, first:stop] += dk_part
                dv[:, first:stop] += dv_part
        dq = (dq * ctx.scale).view(b, kv, length, g, dim).permute(0, 2, 1, 3, 4).reshape(b, length, heads, dim)
        dk, dv = (x.view(b, kv, length, dim).transpose(1, 2) for x in (dk, dv))
        return dq, dk, dv, None, None, None

"""Attention over rows laid one after the other without padding, registered with transformers under the name "tunelet".

Not for generation with a key-value cache (calls without a plan fall through to transformers' SDPA) and not a model: any
architecture of transformers that reads the attention interface gets it. Evidence for the choices: `docs/notebook.md`
(training speed on a CPU).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tunelet.models.gemm_attention import GemmAttention, block_mask
from tunelet.models.virtual import Prefix

NAME = "tunelet"
# Groups are this many tokens long, or a multiple: few different shapes, each of which oneDNN compiles once.
LENGTH_MULTIPLE = 16
# A row joins a group when at least this share of its padded length is real.
FILL = 0.8


@dataclass(frozen=True)
class Group:
    """Rows of similar length: `rows` x `length` positions of the layout. The first `skip` of each are wanted as keys
    only: another row of the layout has them as queries."""

    rows: int
    length: int
    skip: int = 0


@dataclass(frozen=True)
class AttentionPlan:
    """How the flat stream of T tokens is laid out for attention, made once per batch and read by every layer.

    tokens: of the rows; the stream may go on after them, with nothing that matters.
    gather: [P] int64, position of the layout -> token of the stream (padding repeats a token of its row); None: the
    layout *is* the stream. scatter: [tokens] int64, token -> its position in the layout; None with `gather`.
    again: what several branches share stands in the layout once for each; [A] positions of all but the first time.
    prefix: keys and values that take the place of the model's own at some tokens.
    """

    groups: tuple[Group, ...]
    tokens: int
    gather: torch.Tensor | None
    scatter: torch.Tensor | None
    again: torch.Tensor | None = None
    prefix: Prefix | None = None


def plan(
    segments: torch.Tensor | Sequence[int], device: Any = None, branches: Sequence[Sequence[int]] = ()
) -> AttentionPlan:
    """Group the sequences of a stream by similar length. `segments`: [rows + 1] borders, `branches`: for each row where
    its branches start, as in `Batch`."""
    borders = segments.tolist() if isinstance(segments, torch.Tensor) else list(segments)
    if len(borders) < 2 or any(b <= a for a, b in itertools.pairwise(borders)):
        raise ValueError(f"segments must rise strictly, got {borders}")
    # (start, end of what all branches share; start, end of what follows)
    sequences: list[tuple[int, int, int, int]] = []
    for (a, b), starts in itertools.zip_longest(itertools.pairwise(borders), branches, fillvalue=()):
        if starts:
            sequences += [(a, starts[0], c, d) for c, d in itertools.pairwise((*starts, b))]
        else:
            sequences.append((a, a, a, b))
    lengths = [b - a + d - c for a, b, c, d in sequences]
    if len(set(lengths)) == 1 and sum(lengths) == borders[-1]:
        return AttentionPlan((Group(len(lengths), lengths[0]),), borders[-1], None, None)
    # a beginning that was there before is not computed again: such rows stand apart from the others
    known = [
        b > a and (a, b) == before[:2] for before, (a, b, *_) in zip([(-1, -1), *sequences], sequences, strict=False)
    ]
    members: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (known[row], -lengths[row])):
        longest = lengths[members[-1][0]] if members else 0
        near = lengths[row] >= FILL * longest or longest - lengths[row] <= 16
        if members and near and known[row] == known[members[-1][0]]:
            members[-1].append(row)
        else:
            members.append([row])
    gather: list[torch.Tensor] = []
    scatter = torch.full((borders[-1],), -1, dtype=torch.int64)
    again: list[torch.Tensor] = []
    groups, offset = [], 0
    for rows in members:
        length = -(-lengths[rows[0]] // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        skip = min(sequences[row][1] - sequences[row][0] for row in rows) if known[rows[0]] else 0
        groups.append(Group(len(rows), length, skip))
        for row in rows:
            a, b, c, d = sequences[row]
            tokens, places = torch.cat([torch.arange(a, b), torch.arange(c, d)]), torch.arange(offset, offset + b - a)
            if known[row]:
                again.append(places)
            else:
                scatter[a:b] = places
            scatter[c:d] = torch.arange(offset + b - a, offset + len(tokens))
            # Padding stands on the right, where causality hides it from every real query.
            gather.append(F.pad(tokens, (0, length - len(tokens)), value=int(tokens[0])))
            offset += length
    return AttentionPlan(
        tuple(groups),
        borders[-1],
        torch.cat(gather).to(device),
        scatter.to(device),
        torch.cat(again).to(device) if again else None,
    )


class _Lay(torch.autograd.Function):
    """Stream -> layout or back: out[i] = x[index[i]], zeros after that up to `size`. The backward is a gather too,
    because each token has one real place, but for `again`: the further places of what branches share."""

    @staticmethod
    def forward(ctx, x, index, back, to_layout, size, again=None):
        ctx.save_for_backward(index, back, again)
        ctx.to_layout, ctx.size = to_layout, x.shape[0]
        return _gathered(x, index, size)

    @staticmethod
    def backward(ctx, grad):
        index, back, again = ctx.saved_tensors
        if ctx.to_layout:
            out = _gathered(grad, back, ctx.size)
            if again is not None:
                out.index_add_(0, index[again], grad[again])
            return out, None, None, None, None, None
        out = grad.new_zeros(ctx.size, *grad.shape[1:])  # padding gets no gradient
        return out.index_copy_(0, index, grad[: len(index)].contiguous()), None, None, None, None, None


def _gathered(x: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """[size, ...]: x[index], then zeros."""
    if size == len(index):
        return x.index_select(0, index)
    out = x.new_empty(size, *x.shape[1:])
    torch.index_select(x, 0, index, out=out[: len(index)])
    out[len(index) :] = 0
    return out


def _plain(q, k, v, scale, window, softcap, dropout):
    """The same by ordinary differentiable operations, for what the fast paths leave out: capped scores and attention
    dropout."""
    b, length, heads, dim = q.shape
    kv = k.shape[2]
    qs = q.view(b, length, kv, heads // kv, dim).permute(0, 2, 3, 1, 4)
    ks, vs = (x.permute(0, 2, 1, 3).unsqueeze(2) for x in (k, v))
    scores = (qs @ ks.transpose(-1, -2)).float() * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    p = torch.softmax(scores + block_mask(0, length, 0, window, torch.float32, q.device), -1).to(q.dtype)
    p = F.dropout(p, dropout) if dropout else p
    return (p @ vs).permute(0, 3, 1, 2, 4).reshape(b, length, heads, dim)


def _sdpa(q, k, v, scale, window, skip=0):
    """The first `skip` results are zero: nobody wants them."""
    length = q.shape[1]
    mask = None
    if skip or (window and window < length):
        mask = block_mask(skip, length, 0, window, q.dtype, q.device)
    out = F.scaled_dot_product_attention(
        q[:, skip:].transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    return F.pad(out, (0, 0, 0, 0, skip, 0)) if skip else out


def _rows(q, k, v, scale, window, softcap, dropout, skip=0):
    """Causal attention within each of b rows of equal length. q: [b, L, H, D]; k, v: [b, L, KV, D]. The first `skip`
    results may be anything."""
    length = q.shape[1]
    if window and window >= length:
        window = None
    if softcap or dropout:
        return _plain(q, k, v, scale, window, softcap, dropout)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return GemmAttention.apply(q, k, v, scale, window, skip)
    return _sdpa(q, k, v, scale, window, skip)


def flat_attention(q, k, v, plan: AttentionPlan, *, scale, window=None, softcap=None, dropout=0.0):
    """q: [T, H, D]; k, v: [T, KV, D]; returns [T, H, D], zero after the plan's tokens. Attention is causal and never
    crosses a border of the plan."""
    stream = q.shape[0]
    if plan.gather is not None:
        size = len(plan.gather)
        q, k, v = (_Lay.apply(x.contiguous(), plan.gather, plan.scatter, True, size, plan.again) for x in (q, k, v))
    else:
        q, k, v = (x[: plan.tokens] for x in (q, k, v))
    sizes = [group.rows * group.length for group in plan.groups]
    outs = []
    for group, *parts in zip(plan.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        rows = (x.reshape(group.rows, group.length, *x.shape[1:]) for x in parts)
        outs.append(_rows(*rows, scale, window, softcap, dropout, group.skip).flatten(0, 1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    if plan.scatter is not None:
        return _Lay.apply(out, plan.scatter, plan.gather, False, stream)
    return F.pad(out, (0, 0, 0, 0, 0, stream - plan.tokens)) if stream > plan.tokens else out


def attend(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    segments=None,
    sliding_window=None,
    softcap=None,
    **kw,
):
    """transformers' attention interface: query [1, H, T, D] -> ([1, T, H, D], None)."""
    for calls in _counting:
        calls.planned += segments is not None
        calls.other += segments is None
    if segments is None:
        if attention_mask is None and 1 < query.shape[2] == key.shape[2] and getattr(module, "is_causal", True):
            scale = (
                query.shape[-1] ** -0.5 if scaling is None else scaling
            )  # whole rows without padding: windows and caps as in a plan
            return _rows(
                *(x.transpose(1, 2) for x in (query, key, value)), scale, sliding_window, softcap, dropout
            ), None
        if softcap:
            return _capped_with_cache(query, key, value, attention_mask, scaling, softcap), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kw,
        )
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"a plan goes with one flat stream and no cache, got queries {tuple(query.shape)}, keys {tuple(key.shape)}"
        )
    key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    if segments.prefix is not None:
        key, value = segments.prefix.put(module.layer_idx, key, value)
    out = flat_attention(
        query[0].transpose(0, 1),
        key,
        value,
        segments,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        dropout=dropout,
    )
    return out[None], None


def _capped_with_cache(query, key, value, mask, scaling, softcap):
    """Capped scores under a boolean mask, which SDPA cannot do. query: [b, H, n, D]; key, value: [b, KV, m, D]; returns
    [b, n, H, D]."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask[..., : key.shape[2]], torch.finfo(torch.float32).min)
    return (torch.softmax(scores, -1).to(query.dtype) @ value).transpose(1, 2)


def _mask(*args, batch_size=None, q_length=None, kv_length=None, attention_mask=None, **kw):
    """No mask for one flat stream: the plan says who sees whom. Everything else is transformers' own SDPA mask."""
    if batch_size == 1 and attention_mask is None and q_length == kv_length and q_length > 1:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(
        *args, batch_size=batch_size, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **kw
    )


@dataclass
class Calls:
    """How often attention was computed with a plan, and without."""

    planned: int = 0
    other: int = 0


_counting: list[Calls] = []


@contextlib.contextmanager
def count_calls() -> Iterator[Calls]:
    """Count the calls of this attention inside the block."""
    calls = Calls()
    _counting.append(calls)
    try:
        yield calls
    finally:
        _counting.remove(calls)


def register() -> str:
    """Make "tunelet" known to transformers as an attention implementation, and return the name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME

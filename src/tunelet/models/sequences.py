"""Log-probabilities of whole sequences, for losses that compare answers. Not the loss of single tokens (head.py).

A difference of two sums over hundreds of tokens has to be right to a few hundredths: bf16 logits, which are rounded to
three digits each, are not enough for that. So the head's product gives fp32 here, from the same bf16 factors; policy
and reference take the same path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from tunelet.data.examples import Batch
from tunelet.models import head

# Softmax kept for the backward, in elements: 64M are 128 MB in bf16. What is beyond is computed again.
KEEP_ELEMENTS = 64 * 2**20


def logprobs(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """([sequences] fp32 sums of the log-probabilities of each sequence's targets, with a gradient; [sequences] fp32
    number of its targets)."""
    counts = torch.bincount(batch.sequence_of, minlength=batch.sequences).float()
    if head.is_plain(model):
        weight = head.causal_lm(model).get_output_embeddings().weight
        scored = head.hidden_states(model, batch).index_select(0, batch.loss_at)
        return _SequenceSums.apply(scored, weight, batch.targets, batch.sequence_of, batch.sequences), counts
    each = head.target_logprobs(model, batch)
    return each.new_zeros(batch.sequences).index_add(0, batch.sequence_of, each), counts


class _SequenceSums(torch.autograd.Function):
    """[S]: sums of log softmax(h W^T)[target] over the targets of each sequence. h: [N, d], W: [V, d], targets and
    sequence_of: [N]. What a token's gradient is multiplied by is known in the backward only, but is one number for the
    whole token: so softmax - onehot is made in the forward, and h is scaled in the backward."""

    @staticmethod
    def forward(ctx, h, weight, targets, sequence_of, sequences):
        chunk = max(1, head.CHUNK_ELEMENTS // weight.shape[0])
        graded, kept, held = any(ctx.needs_input_grad[:2]), [], 0
        factor = as_factor(weight)
        sums = torch.zeros(sequences, dtype=torch.float32, device=h.device)
        for start in range(0, len(h), chunk):
            part = slice(start, start + chunk)
            logp = logp_of(h[part], factor)
            sums.index_add_(0, sequence_of[part], logp.gather(1, targets[part, None])[:, 0])
            held += logp.numel()
            if graded:
                kept.append(_residual(logp, targets[part], h.dtype) if held <= KEEP_ELEMENTS else None)
        ctx.save_for_backward(h, weight, targets, sequence_of)
        ctx.kept, ctx.chunk = kept, chunk
        return sums

    @staticmethod
    def backward(ctx, grad):
        h, weight, targets, sequence_of = ctx.saved_tensors
        need_h, need_w = ctx.needs_input_grad[:2]
        scale = -grad[sequence_of, None]
        dh = torch.empty_like(h) if need_h else None
        dw, factor = None, None
        for number, start in enumerate(range(0, len(h), ctx.chunk)):
            part, residual = slice(start, start + ctx.chunk), ctx.kept[number]
            if residual is None:
                factor = as_factor(weight) if factor is None else factor
                residual = _residual(logp_of(h[part], factor), targets[part], h.dtype)
            ctx.kept[number] = None
            if need_h:
                torch.mul(residual @ weight, scale[part], out=dh[part])
            if need_w:
                scaled = (h[part] * scale[part]).to(h.dtype)
                dw = residual.t() @ scaled if dw is None else dw.addmm_(residual.t(), scaled)
        return dh, dw, None, None, None


def as_factor(weight: torch.Tensor) -> torch.Tensor:
    """The head's weights, as `logp_of` multiplies by them."""
    return weight.t() if weight.device.type == "cuda" else weight.float().t()


def logp_of(h: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """[n, V] fp32 log softmax(h @ factor), the product summed and kept in fp32."""
    if factor.dtype == torch.float32:
        with _exact_products(h.dtype):
            logits = h.float() @ factor
    else:
        logits = torch.mm(h, factor, out_dtype=torch.float32)
    return torch.log_softmax(logits, -1)


@contextlib.contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """bf16 factors lose nothing where a CPU multiplies fp32 by its bf16 units: twice as fast, the same result."""
    before = torch.get_float32_matmul_precision()
    try:
        if dtype == torch.bfloat16:
            torch.set_float32_matmul_precision("medium")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _residual(logp: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[n, V] softmax - onehot(targets); overwrites `logp`."""
    p = logp.exp_()
    p.scatter_add_(1, targets[:, None], p.new_full((len(targets), 1), -1.0))
    return p.to(dtype)


def scored(model: Any, batch: Batch) -> list[tuple[float, int]]:
    """(sum of log-probabilities, targets) of each sequence, without a gradient and without dropout."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            sums, counts = logprobs(model, batch)
    finally:
        model.train(was_training)
    return [(total, int(number)) for total, number in zip(sums.tolist(), counts.tolist(), strict=True)]


def mean_and_entropy(model: Any, batch: Batch) -> tuple[float, float]:
    """Over all targets: mean log-probability, and mean entropy of the predictions, in nats."""
    was_training = model.training
    model.eval()
    total, entropy = 0.0, 0.0
    with torch.no_grad():
        if not head.is_plain(model):
            logp = torch.log_softmax(head.own_logits(model, batch), -1, dtype=torch.float32)
            total, entropy = _sums(logp, batch.targets)
        else:
            weight = head.causal_lm(model).get_output_embeddings().weight
            h = head.hidden_states(model, batch).index_select(0, batch.loss_at)
            factor, chunk = as_factor(weight), max(1, head.CHUNK_ELEMENTS // weight.shape[0])
            for start in range(0, len(h), chunk):
                of, uncertain = _sums(logp_of(h[start : start + chunk], factor), batch.targets[start : start + chunk])
                total, entropy = total + of, entropy + uncertain
    model.train(was_training)
    return total / len(batch.targets), entropy / len(batch.targets)


def _sums(logp: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    return float(logp.gather(1, targets[:, None]).sum()), float(-(logp.exp() * logp).sum())

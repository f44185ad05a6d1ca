"""From a batch to the loss: the body runs once over the flat stream, the head only where a token has a target, in
chunks.

Not a loss function of a method (those are in `methods/`) and no template code. Softmax is in fp32 always.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunelet.data.examples import Batch
from tunelet.models import attention

# Logits held at once, in elements: 32M are 64 MB in bf16 and 128 MB for their fp32 softmax.
CHUNK_ELEMENTS = 32 * 2**20


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside: adapters that are injected in the layers stay in effect."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _inputs(batch: Batch, plan: attention.AttentionPlan | None) -> dict[str, Any]:
    plan = plan or attention.plan(batch.segments, batch.input_ids.device)
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "segments": plan,
        "use_cache": False,
    }


def hidden_states(model: nn.Module, batch: Batch, plan: attention.AttentionPlan | None = None) -> torch.Tensor:
    """[T, hidden]: the body's last hidden states, after the final norm."""
    return _causal_lm(model).base_model(**_inputs(batch, plan)).last_hidden_state[0]


def is_plain(model: nn.Module) -> bool:
    """Whether logits are exactly hidden @ weight.T: found by comparing the two on a few tokens, not by the model's
    name.

    False for heads with a bias, a scale, a cap, or an adapter of their own; these take the model's own path.
    """
    lm = _causal_lm(model)
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    known = getattr(lm, "_tunelet_plain_head", None)
    if known is None:
        device = head.weight.device
        ids = torch.arange(1, 5, device=device) % head.weight.shape[0]
        none = torch.empty(0, dtype=torch.int64, device=device)
        probe = Batch(ids, torch.arange(4, device=device), torch.tensor([0, 4]), none, none)
        was_training = lm.training
        lm.eval()
        with torch.no_grad():
            ours = nn.functional.linear(hidden_states(lm, probe), head.weight).float()
            theirs = lm(**_inputs(probe, None)).logits[0].float()
        lm.train(was_training)
        known = ours.shape == theirs.shape and torch.allclose(
            ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max())
        )
        lm._tunelet_plain_head = known
    return known


class _NllSum(torch.autograd.Function):
    """coefficient * sum of -log softmax(h W^T)[target], with both gradients made in the forward: three GEMMs in all,
    where recomputing the logits in the backward takes four and keeping them takes N x V memory. h: [N, d], W: [V, d],
    targets: [N]."""

    @staticmethod
    def forward(ctx, h, weight, targets, coefficient):
        n, chunk = h.shape[0], max(1, CHUNK_ELEMENTS // weight.shape[0])
        need_h, need_w = ctx.needs_input_grad[:2]
        dh = torch.empty_like(h) if need_h else None
        dw = None
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        for start in range(0, n, chunk):
            part, target = h[start : start + chunk], targets[start : start + chunk, None]
            logp = torch.log_softmax(part @ weight.t(), -1, dtype=torch.float32)
            total -= logp.gather(1, target).sum()
            if not (need_h or need_w):
                continue
            p = logp.exp_()
            p.scatter_add_(1, target, torch.full_like(target, -1, dtype=p.dtype))
            p = p.to(h.dtype)
            del logp
            if need_h:
                torch.mm(p, weight, out=dh[start : start + chunk])
            if need_w:
                dw = p.t() @ part if dw is None else dw.addmm_(p.t(), part)
        ctx.grads = (dh.mul_(coefficient) if need_h else None, dw.mul_(coefficient) if dw is not None else None)
        return total * coefficient

    @staticmethod
    def backward(ctx, grad):
        dh, dw = ctx.grads
        del ctx.grads
        if float(grad) != 1.0:
            dh, dw = (None if x is None else x.mul_(grad.to(x.dtype)) for x in (dh, dw))
        return dh, dw, None, None


def nll_sum(
    model: nn.Module, batch: Batch, coefficient: float = 1.0, plan: attention.AttentionPlan | None = None
) -> torch.Tensor:
    """coefficient * sum over the batch's targets of their negative log-probability: fp32 scalar with a gradient.

    The coefficient is part of the call because the fast path makes gradients in the forward: scaling later would round
    twice.
    """
    if is_plain(model):
        weight = _causal_lm(model).get_output_embeddings().weight
        scored = hidden_states(model, batch, plan).index_select(0, batch.loss_at)
        return _NllSum.apply(scored, weight, batch.targets, float(coefficient))
    return -target_logprobs(model, batch, plan).sum() * coefficient


def target_logprobs(model: nn.Module, batch: Batch, plan: attention.AttentionPlan | None = None) -> torch.Tensor:
    """[N] fp32 log-probabilities of `batch.targets`, with a gradient. Logits come from the model's own head."""
    if is_plain(model):
        weight = _causal_lm(model).get_output_embeddings().weight
        scored = hidden_states(model, batch, plan).index_select(0, batch.loss_at)
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        parts = [
            torch.utils.checkpoint.checkpoint(
                _logprobs, scored[i : i + chunk], weight, batch.targets[i : i + chunk], use_reentrant=False
            )
            for i in range(0, len(scored), chunk)
        ]
        return torch.cat(parts)
    logits = _causal_lm(model)(**_inputs(batch, plan), logits_to_keep=batch.loss_at).logits[0]
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(1, batch.targets[:, None])[:, 0]


def _logprobs(h, weight, targets):
    return torch.log_softmax(h @ weight.t(), -1, dtype=torch.float32).gather(1, targets[:, None])[:, 0]

"""From a batch to the loss: the body runs once over the flat stream, the head only where a token has a target, in
chunks.

Not a loss function of a method (those are in `methods/`) and no template code. Softmax is in fp32 always.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tunelet.data.examples import Batch
from tunelet.models import attention, virtual

# Logits held at once, in elements: 8M are 16 MB in bf16 and 32 MB for their fp32 softmax, which the cache still holds.
# 32M took 200 MB more and 3 % more of a step's time; 4M is no faster and rounds the head's bf16 gradient more often.
CHUNK_ELEMENTS = 8 * 2**20


def causal_lm(model: nn.Module) -> Any:
    """The transformers model inside: adapters that are injected in the layers stay in effect."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _inputs(batch: Batch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "segments": attention.plan(batch.segments, batch.input_ids.device, batch.branches),
        "use_cache": False,
    }


def _widened(lm: Any, own: virtual.Virtual, batch: Batch) -> tuple[dict[str, Any], torch.Tensor]:
    """(inputs of the batch with virtual tokens in front of every row, [tokens] where each of its tokens went)."""
    wide, real, where = own.widened(batch)
    inputs = _inputs(wide)
    inputs["inputs_embeds"] = own.embedded(lm, inputs.pop("input_ids")[0], where)[None]
    if own.heads:
        inputs["segments"] = replace(inputs["segments"], prefix=virtual.Prefix(where, own.layers()))
    return inputs, real


def _one_by_one(lm: Any, batch: Batch, run: Callable[[dict[str, Any]], torch.Tensor]) -> torch.Tensor:
    """[T, ...]: what `run` gives for each sequence alone, laid out as the stream is. What branches share is taken from
    the first."""
    own = virtual.of(lm)
    parts = []
    for (start, end), branches in itertools.zip_longest(
        itertools.pairwise(batch.segments.tolist()), batch.branches, fillvalue=()
    ):
        shared = (branches[0] if branches else start) - start
        for begin, stop in itertools.pairwise((*(branches or (start,)), end)):
            ids = torch.cat([batch.input_ids[start : start + shared], batch.input_ids[begin:stop]])
            if own is None:
                out = run({"input_ids": ids[None], "use_cache": False})[0]
            else:
                out = run({"inputs_embeds": own.before(lm, ids)[None], "use_cache": False})[0, own.number :]
            parts.append(out[shared if begin > start + shared else 0 :])
    return torch.cat(parts)


def packs(model: nn.Module) -> bool:
    """Whether rows may lie one after the other in one stream: each layer has to mix tokens through our attention only.

    Found by counting its calls. False for recurrent, convolutional and hybrid layers and for attention written without
    transformers' interface: these run row by row, which is slower and as exact.
    """
    lm = causal_lm(model)
    known = getattr(lm, "_tunelet_packs", None)
    if known is None:
        with _probing(lm) as probe, attention.count_calls() as calls:
            try:
                lm.base_model(**_inputs(probe))
                known = calls.planned == lm.config.get_text_config().num_hidden_layers and not calls.other
            except (TypeError, ValueError):  # it takes no positions, or knows no such keyword
                known = False
        lm._tunelet_packs = known
    return known


@contextlib.contextmanager
def _probing(lm: nn.Module) -> Iterator[Batch]:
    """A row of four tokens to try things out on, in eval mode and without gradients."""
    device = lm.get_input_embeddings().weight.device
    ids = torch.arange(1, 5, device=device) % lm.get_input_embeddings().weight.shape[0]
    none = torch.empty(0, dtype=torch.int64, device=device)
    was_training = lm.training
    lm.eval()
    try:
        with torch.no_grad():
            yield Batch(ids, torch.arange(4, device=device), torch.tensor([0, 4]), none, none, none, none, none)
    finally:
        lm.train(was_training)


def hidden_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """[T, hidden]: the body's last hidden states, after the final norm (without what stands after the last row, where
    rows run one by one or have virtual tokens)."""
    lm = causal_lm(model)
    body, own = lm.base_model, virtual.of(lm)
    if not packs(model):
        return _one_by_one(lm, batch, lambda row: body(**row).last_hidden_state)
    if own is None:
        return body(**_inputs(batch)).last_hidden_state[0]
    inputs, real = _widened(lm, own, batch)
    return body(**inputs).last_hidden_state[0].index_select(0, real)


def own_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """[N, vocabulary]: the model's own logits at `batch.loss_at`."""
    lm = causal_lm(model)
    own = virtual.of(lm)
    if not packs(model):
        return _one_by_one(lm, batch, lambda row: lm(**row).logits).index_select(0, batch.loss_at)
    if own is None:
        return lm(**_inputs(batch), logits_to_keep=batch.loss_at).logits[0]
    inputs, real = _widened(lm, own, batch)
    return lm(**inputs, logits_to_keep=real[batch.loss_at]).logits[0]


def is_plain(model: nn.Module) -> bool:
    """Whether logits are exactly hidden @ weight.T: found by comparing the two on a few tokens, not by the model's
    name.

    False for heads with a bias, a scale, a cap, or an adapter of their own; these take the model's own path.
    """
    lm = causal_lm(model)
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    known = getattr(lm, "_tunelet_plain_head", None)
    if known is None:
        with _probing(lm) as probe, virtual.switched_off(lm):
            probe = replace(probe, loss_at=probe.position_ids)
            ours = nn.functional.linear(hidden_states(lm, probe), head.weight).float()
            theirs = own_logits(lm, probe).float()
        close = {"rtol": 1e-3, "atol": 1e-5 * float(theirs.abs().max())}
        known = ours.shape == theirs.shape and torch.allclose(ours, theirs, **close)
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


def nll_sum(model: nn.Module, batch: Batch, coefficient: float = 1.0) -> torch.Tensor:
    """coefficient * sum over the batch's targets of their negative log-probability: fp32 scalar with a gradient.

    The coefficient is part of the call because the fast path makes gradients in the forward: scaling later would round
    twice.
    """
    if is_plain(model):
        weight = causal_lm(model).get_output_embeddings().weight
        if not torch.is_grad_enabled():
            weight = weight.detach()  # a Function is asked for gradients of what requires them even then
        scored = hidden_states(model, batch).index_select(0, batch.loss_at)
        return _NllSum.apply(scored, weight, batch.targets, float(coefficient))
    return -target_logprobs(model, batch).sum() * coefficient


def target_logprobs(model: nn.Module, batch: Batch) -> torch.Tensor:
    """[N] fp32 log-probabilities of `batch.targets`, with a gradient. Logits come from the model's own head."""
    if is_plain(model):
        weight = causal_lm(model).get_output_embeddings().weight
        scored = hidden_states(model, batch).index_select(0, batch.loss_at)
        chunk = max(1, CHUNK_ELEMENTS // weight.shape[0])
        parts = [
            torch.utils.checkpoint.checkpoint(
                _logprobs, scored[i : i + chunk], weight, batch.targets[i : i + chunk], use_reentrant=False
            )
            for i in range(0, len(scored), chunk)
        ]
        return torch.cat(parts)
    return torch.log_softmax(own_logits(model, batch), -1, dtype=torch.float32).gather(1, batch.targets[:, None])[:, 0]


def _logprobs(h, weight, targets):
    return torch.log_softmax(h @ weight.t(), -1, dtype=torch.float32).gather(1, targets[:, None])[:, 0]

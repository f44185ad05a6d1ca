"""RMSNorm, gated MLPs and LoRA of any transformers model computed with fewer passes and fewer saved activations.

Not a model: a module of the model keeps its weights and its class (a subclass of it takes its place), and is left as it
is unless the faster form gives the same numbers on random input. What is saved for the backward: of a norm its input
and one number a token; of a gated MLP the two projections, while the product of activation and gate is made again.
Zhang & Sennrich, "Root Mean Square Layer Normalization" (arXiv:1910.07467); Shazeer (arXiv:2002.05202).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

PROBE_TOKENS = 5


class _RMSNorm(torch.autograd.Function):
    """x: [..., d], weight: [d]. one_plus: the weight is a distance from one and multiplies in fp32 (Gemma)."""

    @staticmethod
    def forward(ctx, x, weight, eps, one_plus):
        r = torch.rsqrt(
            torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_() / x.shape[-1] + eps
        )
        ctx.save_for_backward(x, weight, r)
        ctx.one_plus = one_plus
        normed = x * r  # fp32
        return (normed.mul_(1.0 + weight.float())).to(x.dtype) if one_plus else weight * normed.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, r = ctx.saved_tensors
        normed = x * r
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, d_weight, None, None
        scaled = grad.float() * (1.0 + weight.float()) if ctx.one_plus else (grad * weight).float()
        mean = torch.linalg.vecdot(scaled, normed).div_(x.shape[-1])[..., None]
        return scaled.sub_(normed.mul_(mean)).mul_(r).to(x.dtype), d_weight, None, None


class _Gated(torch.autograd.Function):
    """act(gate) * up, [..., n] each; only the two inputs are kept. `again` is filled in the backward, by whoever comes
    first: what follows needs the product, this the activation."""

    @staticmethod
    def forward(ctx, gate, up, again):
        ctx.save_for_backward(gate, up)
        ctx.again = again
        return again.act(gate) * up

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        leaf, active = ctx.again.activation(gate)
        (d_gate,) = torch.autograd.grad(active, leaf, grad * up)
        return d_gate, grad * active.detach(), None


class _Again:
    """The activation of one call of a gated MLP, made again in its backward and let go of after that."""

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor]):
        self.act, self.made = act, None

    def activation(self, gate: torch.Tensor, keep: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(leaf, act(leaf)) with a graph between them."""
        made, self.made = self.made, None
        if made is None:
            with torch.enable_grad():
                leaf = gate.detach().requires_grad_()
                made = leaf, self.act(leaf)
        if keep:
            self.made = made
        return made


def _down(project: Callable[[torch.Tensor], torch.Tensor], gate: torch.Tensor, up: torch.Tensor, act: Any) -> Any:
    """project(act(gate) * up), whose input is not kept for the backward but made again from gate and up."""
    again = _Again(act)
    product = _Gated.apply(gate, up, again)
    if not product.requires_grad:
        return project(product)
    where, size, dtype = product.data_ptr(), product.numel(), product.dtype

    def pack(saved: torch.Tensor) -> Any:
        same = saved.data_ptr() == where and saved.numel() == size and saved.dtype == dtype
        return saved.shape if same else saved

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        with torch.no_grad():
            return (again.activation(gate, keep=True)[1] * up).view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return project(product)


class _AddLowRank(torch.autograd.Function):
    """result += scaling * (x A^T) B^T in one pass over result, which is changed in place. result: [..., out],
    x: [..., in], A: [r, in], B: [out, r]."""

    @staticmethod
    def forward(ctx, result, x, a, b, scaling):
        rows = x.flatten(0, -2)
        low = torch.mm(rows, a.t()).mul_(scaling)
        result.view(-1, result.shape[-1]).addmm_(low, b.t())
        ctx.save_for_backward(x, a, b, low)
        ctx.scaling = scaling
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx, grad):
        x, a, b, low = ctx.saved_tensors
        rows, out = x.flatten(0, -2), grad.reshape(-1, grad.shape[-1])
        d_low = torch.mm(out, b).mul_(ctx.scaling)
        d_x = torch.mm(d_low, a).view_as(x) if ctx.needs_input_grad[1] else None
        d_a = torch.mm(d_low.t(), rows) if ctx.needs_input_grad[2] else None
        d_b = torch.mm(low.t(), out).t() if ctx.needs_input_grad[3] else None
        return grad, d_x, d_a, d_b, None


class FastNorm:
    """Mixed into a model's own RMSNorm class."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _RMSNorm.apply(x, self.weight, _eps(self), self._tunelet_one_plus)


class FastGatedMLP:
    """Mixed into a model's own MLP class with gate_proj, up_proj and down_proj."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _down(self.down_proj, self.gate_proj(x), self.up_proj(x), self.act_fn)


class FastFusedGatedMLP:
    """Mixed into a model's own MLP class whose gate and up are one projection (Phi-3)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return _down(self.down_proj, gate, up, self.activation_fn)


class FastLora:
    """Mixed into peft's LoRA linear layer: the plain case of one active adapter; everything else is peft's own."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        (name,) = active
        a, b = self.lora_A[name].weight, self.lora_B[name]
        if b.bias is not None or not a.dtype == b.weight.dtype == x.dtype:
            return super().forward(x)
        result = self.base_layer(x)
        return _AddLowRank.apply(result, self.lora_dropout[name](x), a, b.weight, self.scaling[name])


MLPS = {
    FastGatedMLP: {"gate_proj", "up_proj", "down_proj", "act_fn"},
    FastFusedGatedMLP: {"gate_up_proj", "down_proj", "activation_fn"},
}


@cache
def _mixed(fast: type, own: type) -> type:
    return type(own.__name__, (fast, own), {"__module__": own.__module__})


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def speed_up(model: nn.Module, *, mlps: bool = True) -> int:
    """Give the model's norms, gated MLPs and LoRA layers their faster forms, in place; how many took one.

    mlps: off under checkpointing, whose hooks do not see what a gated MLP's own hooks keep: gate and up of every layer
    would stay until the backward.
    """
    like = model.get_input_embeddings().weight
    adapted = hasattr(model, "peft_config")
    found = 0
    for module in list(model.modules()):
        found += _norm(module) or (mlps and _mlp(module, like)) or (adapted and _lora(module))
    return found


def _lora(module: nn.Module) -> bool:
    from peft.tuners.lora.layer import Linear

    if not isinstance(module, Linear) or isinstance(module, FastLora):
        return False
    module.__class__ = _mixed(FastLora, type(module))
    return True


def _norm(module: nn.Module) -> bool:
    if isinstance(module, FastNorm) or "RMSNorm" not in type(module).__name__:
        return False
    if {name for name, _ in module.named_parameters()} != {"weight"} or not (
        hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    ):
        return False
    for one_plus in (False, True):
        if _same_norm(module, one_plus):
            module._tunelet_one_plus = one_plus
            module.__class__ = _mixed(FastNorm, type(module))
            return True
    return False


@torch.no_grad()
def _same_norm(module: nn.Module, one_plus: bool) -> bool:
    """Whether the fast form gives the module's own numbers: up to summation order in fp32, every rounding included in
    bf16. Published weights can be all ones or zeros, which would not tell the forms apart: random ones stand in."""
    weight = module.weight
    kept, width = weight.data, weight.shape[-1]
    try:
        for dtype, far in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            x = _probe(width, weight.device, dtype)
            weight.data = x[0].clone()
            expected, fast = module(x), _RMSNorm.apply(x, weight, _eps(module), one_plus)
            same = expected == fast  # in bf16 a sum in another order may move a rounding here and there
            if expected.dtype != fast.dtype or not torch.allclose(expected, fast, rtol=far, atol=far / 100):
                return False
            if dtype == torch.bfloat16 and same.float().mean() < 0.97:
                return False
    finally:
        weight.data = kept
    return True


@torch.no_grad()
def _mlp(module: nn.Module, like: torch.Tensor) -> bool:
    inner = {name for name, _ in module.named_children()}
    fast = next((fast for fast, parts in MLPS.items() if inner == parts), None)
    if fast is None or isinstance(module, fast):
        return False
    own, was_training = type(module), module.training
    first = getattr(module, "gate_proj" if fast is FastGatedMLP else "gate_up_proj")
    x = _probe(first.in_features, like.device, like.dtype)
    module.eval()  # dropout of an adapter would differ from call to call
    expected = module(x)
    module.__class__ = _mixed(fast, own)
    if not torch.equal(module(x), expected):
        module.__class__ = own
    module.train(was_training)
    return isinstance(module, fast)


def _probe(width: int, device: Any, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    return torch.randn(PROBE_TOKENS, width, generator=generator).to(device=device, dtype=dtype)

"""Linear layers whose frozen weights are held in 8 or 4 bits and taken to the compute dtype one layer at a time.

For the base under an adapter; not for training these weights, not for inference engines (infer/) and not a file format:
nothing quantised is ever saved. Everything that is no plain linear layer of the body (embeddings, norms, the head,
fused experts) stays as it is. Why the weights are dequantised rather than multiplied packed: docs/notebook.md.

int8: symmetric, a scale for each group of 64 weights of a row: 8.25 bits a weight, error about 0.6 % of the weights'
root mean square. int4: a scale and a minimum for each group of 32: 5 bits a weight, error about 8 %.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tunelet.errors import TuneletError

BITS = {"int8": 8, "int4": 4}
GROUP = {8: 64, 4: 32}
# Weights quantised at once: few calls, and scratch memory of a megabyte.
BLOCK_ELEMENTS = 2**18


def group_size(in_features: int, bits: int) -> int:
    """The largest power of two up to GROUP that divides a row; the whole row where that is less than 8."""
    group = math.gcd(in_features, GROUP[bits])
    return group if group >= 8 else in_features


@torch.no_grad()
def quantize(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """weight [out, in] -> codes, scales, lows: weight ~ code * scale + low, group by group.

    8 bits: codes [out, in] int8, no lows. 4 bits: codes [out, in / 2] uint8, the first half of a row in the low
    nibbles, the second in the high ones; a row of odd length is taken to 8 bits. Scales and lows are [out, groups] bf16
    (codes are chosen for the rounded values).
    """
    out, inner = weight.shape
    bits = 8 if inner % 2 else bits
    group = group_size(inner, bits)
    codes = torch.empty(out, inner * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8, device=weight.device)
    scales = torch.empty(out, inner // group, dtype=torch.bfloat16, device=weight.device)
    lows = torch.empty_like(scales) if bits == 4 else None
    rows = max(1, BLOCK_ELEMENTS // inner)
    for start in range(0, out, rows):
        here = slice(start, start + rows)
        w = weight[here].float().view(-1, inner // group, group)
        if lows is None:
            scale = (w.abs().amax(-1) / 127).bfloat16()
            code = (w / _divisor(scale)).round_().clamp_(-127, 127).to(torch.int8)
            codes[here] = code.view(-1, inner)
        else:
            low, high = w.amin(-1).bfloat16(), w.amax(-1)  # aminmax is three times slower
            scale = ((high - low.float()) / 15).bfloat16()
            code = ((w - low.float()[..., None]) / _divisor(scale)).round_().clamp_(0, 15).to(torch.uint8)
            first, second = code.view(-1, inner).split(inner // 2, dim=1)
            codes[here] = first | second << 4
            lows[here] = low
        scales[here] = scale
    return codes, scales, lows


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """[..., 1] fp32; groups of equal weights have scale 0 and codes 0."""
    return scale.float().masked_fill_(scale == 0, 1.0)[..., None]


def dequantize(
    codes: torch.Tensor,
    scales: torch.Tensor,
    lows: torch.Tensor | None,
    dtype: torch.dtype,
    allocate: Callable[..., torch.Tensor] = torch.empty,
) -> torch.Tensor:
    """The [out, in] weight in `dtype`, in memory that `allocate(elements, dtype=, device=)` gives."""
    out, width = codes.shape
    if lows is None:
        weight = allocate(codes.numel(), dtype=dtype, device=codes.device).view(out, width).copy_(codes)
    else:
        weight = allocate(2 * codes.numel(), dtype=dtype, device=codes.device).view(out, 2, width)
        nibbles = allocate(codes.numel(), dtype=codes.dtype, device=codes.device).view(out, width)
        weight[:, 0] = torch.bitwise_and(codes, 15, out=nibbles)
        weight[:, 1] = torch.bitwise_right_shift(codes, 4, out=nibbles)
    grouped = weight.view(out, scales.shape[1], -1).mul_(scales.to(dtype)[..., None])
    if lows is not None:
        grouped.add_(lows.to(dtype)[..., None])
    return grouped.view(out, -1)


_scratch = threading.local()


def _borrow(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[elements]: the same memory at every call of this thread. On a CPU a fresh weight for every product would leave a
    hole of its size between the activations that are kept, product after product: 2 GB for 1.7B parameters."""
    if device.type != "cpu":
        return torch.empty(elements, dtype=dtype, device=device)
    held = _scratch.__dict__.get(dtype)
    if held is None or len(held) < elements:
        held = _scratch.__dict__[dtype] = torch.empty(elements, dtype=dtype)
    return held[:elements]


class _Linear(torch.autograd.Function):
    """x @ W^T, where W exists only during the product, forward and backward: neither keeps it, and it has no
    gradient."""

    @staticmethod
    def forward(ctx, x, codes, scales, lows):
        ctx.save_for_backward(codes, scales, lows)
        return F.linear(x, dequantize(codes, scales, lows, x.dtype, _borrow))

    @staticmethod
    def backward(ctx, grad):
        return grad @ dequantize(*ctx.saved_tensors, grad.dtype, _borrow), None, None, None


class FrozenWeight(torch.Tensor):
    """What `layer.weight` is: dtype, device and shape without memory; whoever computes with it gets a fresh dequantised
    copy. Writing to its `data` is an error: what was written would be lost with the copy, and a merge (peft writes
    there) would silently do nothing."""

    @staticmethod
    def __new__(cls, layer: _Quantized, shape: tuple[int, int]) -> FrozenWeight:
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=layer.codes.device)

    def __init__(self, layer: _Quantized, shape: tuple[int, int]):
        self.layer = layer

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def full(x):
            return x.layer.dequantized() if isinstance(x, FrozenWeight) else x

        return func(*tree_map(full, args), **tree_map(full, kwargs or {}))

    @property
    def data(self) -> FrozenWeight:
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        raise TuneletError(
            "A quantised base cannot be changed or merged into.",
            why="its weights are held in 8 or 4 bits and are frozen",
            fix='Load the model without quantisation (model.quantization = "none") and merge there.',
        )


class _Quantized(nn.Module):
    """What QuantizedLinear and QuantizedConv1D share; they subclass what they stand for, so that peft wraps them."""

    def _hold(self, weight: torch.Tensor, bias: nn.Parameter | None, bits: int) -> None:
        for name, tensor in zip(("codes", "scales", "lows"), quantize(weight, bits), strict=True):
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", bias)
        self.dtype = weight.dtype
        self._is_hf_initialized = True  # transformers must not draw random weights for it

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`model.to(dtype)` and the like also set the dtype that `weight` is read in."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = _Linear.apply(x, self.codes, self.scales, self.lows)
        return y if self.bias is None else y + self.bias

    def dequantized(self) -> torch.Tensor:
        """The weight, of the shape that the class stands for, in `dtype`: a fresh tensor."""
        return dequantize(self.codes, self.scales, self.lows, self.dtype)

    def extra_repr(self) -> str:
        bits = 8 if self.lows is None else 4
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}"


class QuantizedLinear(_Quantized, nn.Linear):
    """nn.Linear of a quantised weight; `dtype`: what `weight` is dequantised to when it is read."""

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, bits: int):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self._hold(weight, bias, bits)

    @property
    def weight(self) -> FrozenWeight:
        return FrozenWeight(self, (self.out_features, self.in_features))


class QuantizedConv1D(_Quantized, Conv1D):
    """GPT-2's linear layer, whose weight is stored as [in, out]; the codes are [out, in] as elsewhere."""

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, bits: int):
        nn.Module.__init__(self)
        self.nx, self.nf = self.in_features, self.out_features = weight.shape
        self._hold(weight.t(), bias, bits)

    @property
    def weight(self) -> FrozenWeight:
        return FrozenWeight(self, (self.in_features, self.out_features))

    def dequantized(self) -> torch.Tensor:
        return super().dequantized().t()


STAND_INS = {nn.Linear: QuantizedLinear, Conv1D: QuantizedConv1D}


def layers(model: Any) -> dict[str, nn.Module]:
    """name -> module of the layers to quantise: plain linear ones, but for the head and whatever is tied."""
    tied = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in STAND_INS and module is not head and f"{name}.weight" not in tied
    }


@register_quantization_config("tunelet")
class _Config(QuantizationConfigMixin):
    def __init__(self, kind: str):
        self.quant_method, self.kind = "tunelet", kind


@register_quantizer("tunelet")
class _Quantizer(HfQuantizer):
    """transformers' own hook for quantising while a checkpoint is read: one tensor at a time is held in full."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.names = {f"{name}.weight" for name in layers(model)}
        if not self.names:
            raise ValueError("none of its layers is a plain linear one that could be quantised")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.names

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):
    """Put the quantised layer in the model where its weight arrives."""

    def __init__(self, quantizer: _Quantizer):
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict, model=None, missing_keys=None, **kwargs):
        left = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            old = model.get_submodule(name.rpartition(".")[0])
            if name not in self.quantizer.names or weight.shape != old.weight.shape:
                self.quantizer.names.discard(name)  # transformers compares and reports the shapes of what is left
                left[name] = value
                continue
            bits = BITS[self.quantizer.quantization_config.kind]
            model.set_submodule(name.rpartition(".")[0], STAND_INS[type(old)](weight, old.bias, bits))
            missing_keys.discard(name)
        return left


def config(kind: str) -> _Config:
    """What `from_pretrained(quantization_config=...)` takes; kind: "int8" or "int4"."""
    return _Config(kind)


def is_quantized(model: Any) -> bool:
    """Whether some layers are held in 8 or 4 bits."""
    return any(isinstance(module, _Quantized) for module in model.modules())

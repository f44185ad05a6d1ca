"""AdamW whose working copy may be bf16: fp32 master weights and moments, the copy refreshed by stochastic rounding.

Not a general optimizer framework. Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101); the
arithmetic is torch's fused AdamW. Stochastic rounding: a published bf16 checkpoint puts the master on the bf16 grid,
where rounding to nearest would swallow every early step smaller than half a grid width; rounding up or down at random
keeps the expectation (arXiv:2010.06192).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim.adamw import adamw

# Parameters are worked on in buckets of about this many elements: few calls for a model of many small tensors, little
# scratch memory.
BUCKET_ELEMENTS = 2**21


class _Bucket:
    """Parameters of one dtype, device and decay class, whose master and moments lie in one flat buffer each."""

    def __init__(self, parameters: list[torch.nn.Parameter], names: list[str], decay: bool):
        self.parameters, self.names, self.decay = parameters, names, decay
        self.sizes = [p.numel() for p in parameters]
        device = parameters[0].device
        self.master = torch.cat([p.detach().reshape(-1) for p in parameters]).float()
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        self.step = torch.zeros((), dtype=torch.float32, device=device if device.type == "cuda" else "cpu")
        self.low = parameters[0].dtype != torch.float32
        if not self.low:  # the parameters are their own master
            self.write(self.master, views=True)

    def write(self, flat: torch.Tensor, *, views: bool = False) -> None:
        for p, part in zip(self.parameters, flat.split(self.sizes), strict=True):
            if views:
                p.data = part.view_as(p)
            else:
                p.data.copy_(part.view_as(p))

    def gradient(self, scale: float) -> torch.Tensor:
        """[elements] fp32; parameters without a gradient in this step count as zero."""
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in self.parameters]
        flat = parts[0].float() if len(parts) == 1 else torch.cat(parts).float()
        return flat * scale if scale != 1.0 else flat


def round_stochastically(master: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 -> bf16, up or down with probability in proportion to the distance; what bf16 can hold exactly stays as it
    is.

    A uniform 16-bit number is added to the bits that bf16 lacks, and these are cut off. Non-finite values must not come
    in.
    """
    bits = torch.empty((master.numel() + 3) // 4, dtype=torch.int64, device=master.device)
    bits.random_(-(2**63), None, generator=generator)  # all 64 bits: the default leaves the sign alone
    noise = bits.view(torch.int16)[: master.numel()]  # four draws of one: -32768..32767
    return master.view(torch.int32).add(noise).add_(32768).bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)


class AdamW:
    """`step(learning_rate)` reads the gradients, clips them by their global norm, updates, and clears them.

    The noise of the rounding is a function of (seed, step, bucket) only, so that the working copy is one of (master,
    step): it needs no place in a checkpoint, and a resumed run is bit-identical. Weight decay applies to matrices, not
    to norms and biases.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        eps=1e-8,
        seed=0,
    ):
        self.betas, self.weight_decay, self.eps, self.seed, self.steps = betas, weight_decay, eps, seed, 0
        classes: dict[tuple, list[tuple[str, torch.nn.Parameter]]] = {}
        for name, p in named_parameters:
            if p.requires_grad:
                classes.setdefault((str(p.device), p.dtype, p.ndim >= 2), []).append((name, p))
        self.buckets: list[_Bucket] = []
        for (_, _, decay), members in classes.items():
            start = size = 0
            for i, (_, p) in enumerate(members):
                if i > start and size + p.numel() > BUCKET_ELEMENTS:
                    self._bucket(members[start:i], decay)
                    start, size = i, 0
                size += p.numel()
            self._bucket(members[start:], decay)
        self.accumulated: list[torch.Tensor] | None = None

    def _bucket(self, members, decay):
        self.buckets.append(_Bucket([p for _, p in members], [name for name, _ in members], decay))

    def accumulate(self) -> None:
        """Move the gradients of one micro-batch into fp32 sums: several micro-batches must not be added up in bf16."""
        with torch.no_grad():
            if self.accumulated is None:
                self.accumulated = [torch.zeros_like(bucket.master) for bucket in self.buckets]
            for total, bucket in zip(self.accumulated, self.buckets, strict=True):
                for p, part in zip(bucket.parameters, total.split(bucket.sizes), strict=True):
                    if p.grad is not None:
                        part.add_(p.grad.reshape(-1))
                        p.grad = None

    def _norm(self) -> float:
        if self.accumulated is not None:
            norms = [torch.linalg.vector_norm(total) for total in self.accumulated]
        else:
            grads = [p.grad for bucket in self.buckets for p in bucket.parameters if p.grad is not None]
            norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        return float(torch.linalg.vector_norm(torch.stack([norm.cpu() for norm in norms]))) if norms else 0.0

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float = 0.0) -> float:
        """One update. Returns the gradients' norm before clipping; where it is not finite nothing is changed."""
        if self.accumulated is not None:
            self.accumulate()  # whatever was not moved yet
        norm = self._norm()
        if not norm < float("inf"):
            return norm
        scale = max_grad_norm / (norm + 1e-6) if max_grad_norm and norm > max_grad_norm else 1.0
        for i, bucket in enumerate(self.buckets):
            if self.accumulated is not None:
                gradient = self.accumulated[i].mul_(scale)
            else:
                gradient = bucket.gradient(scale)
                for p in bucket.parameters:
                    p.grad = None
            adamw(
                [bucket.master],
                [gradient],
                [bucket.exp_avg],
                [bucket.exp_avg_sq],
                [],
                [bucket.step],
                fused=bucket.master.device.type in ("cpu", "cuda", "mps"),
                amsgrad=False,
                maximize=False,
                beta1=self.betas[0],
                beta2=self.betas[1],
                lr=learning_rate,
                eps=self.eps,
                weight_decay=self.weight_decay if bucket.decay else 0.0,
            )
            gradient.zero_()
        self.steps += 1
        self.refresh()
        return norm

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the working copy of this step: the master, stochastically rounded (at step 0 and in fp32: the master
        itself)."""
        for i, bucket in enumerate(self.buckets):
            if bucket.low and self.steps:
                generator = torch.Generator(bucket.master.device)
                generator.manual_seed((self.seed * 1_000_003 + self.steps) * 4099 + i)
                bucket.write(round_stochastically(bucket.master, generator))
            elif bucket.low:
                bucket.write(bucket.master)

    @torch.no_grad()
    def settle(self) -> None:
        """Write the nearest working copy, for evaluation and saving; `refresh` brings the training copy back."""
        for bucket in self.buckets:
            if bucket.low:
                bucket.write(bucket.master)

    @torch.no_grad()
    def finish(self, dtype: torch.dtype) -> None:
        """Turn the parameters into the master, rounded to `dtype`: the last thing done with this optimizer."""
        for bucket in self.buckets:
            for p, part in zip(bucket.parameters, bucket.master.split(bucket.sizes), strict=True):
                p.data = part.view(p.shape).to(dtype)

    def weights(self) -> dict[str, torch.Tensor]:
        """The fp32 weights by parameter name: views of the master."""
        return self._named("master")

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint needs, by kind and parameter name, in fp32."""
        kinds = ("master", "exp_avg", "exp_avg_sq")
        return {f"{kind}.{name}": tensor for kind in kinds for name, tensor in self._named(kind).items()}

    def _named(self, kind: str) -> dict[str, torch.Tensor]:
        return {
            name: part.view(p.shape)
            for bucket in self.buckets
            for name, p, part in zip(
                bucket.names, bucket.parameters, getattr(bucket, kind).split(bucket.sizes), strict=True
            )
        }

    @torch.no_grad()
    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Put `weights()` back."""
        for name, tensor in self.weights().items():
            tensor.copy_(weights[name])
        self.refresh()

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor], steps: int) -> None:
        """Put `state()` of `steps` optimizer steps back, and write the working copy. Raises KeyError where a tensor is
        missing."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self.steps = steps
        for bucket in self.buckets:
            bucket.step.fill_(steps)
        self.refresh()

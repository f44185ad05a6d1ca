"""AdamW in three sizes of state: fp32 master weights and moments, or bf16 or 8-bit moments and no master.

Not a general optimizer framework. Loshchilov & Hutter, "Decoupled Weight Decay Regularization" (arXiv:1711.05101); the
arithmetic is torch's fused AdamW in fp32, whatever the state is kept in. A published bf16 checkpoint puts the weights
on the bf16 grid, where rounding to nearest would swallow every early step smaller than half a grid width: whatever is
narrower than fp32 is rounded stochastically (train/rounding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch.optim.adamw import adamw

from tunelet.train import rounding

# Parameters are worked on about this many elements at a time: few calls for a model of many small tensors, little
# scratch memory for one of large ones.
CHUNK_ELEMENTS = 2**21

BYTES = {"float32": 12, "bfloat16": 4, "float8": 2}  # of state for each bf16 parameter that is trained


class _Moments:
    """One flat moment, [n], held in the state's dtype: read and written as fp32, a range at a time."""

    def __init__(self, n: int, state: str, device: torch.device, *, positive: bool):
        self.positive = positive  # the mean of squares: its root is what is kept in 8 bits, with twice the range
        self.scale = None
        if state == "float8":
            self.data = torch.zeros(n, dtype=rounding.FLOAT8, device=device)
            self.scale = torch.ones(-(-n // rounding.BLOCK), device=device)
        else:
            self.data = torch.zeros(n, dtype=getattr(torch, state), device=device)

    def read(self, a: int, b: int) -> torch.Tensor:
        """[b - a] fp32; for an fp32 state the state itself."""
        if self.scale is None:
            return self.data[a:b].float()
        value = rounding.from_float8(self.data[a:b], self.scale[self._blocks(a, b)])
        return value.square_() if self.positive else value

    def write(self, a: int, b: int, value: torch.Tensor, generator: torch.Generator | None) -> None:
        if self.scale is not None:
            self.data[a:b], self.scale[self._blocks(a, b)] = rounding.to_float8(
                value.sqrt_() if self.positive else value, generator, floor=self.positive
            )
        elif generator is not None and self.data.dtype != torch.float32:
            self.data[a:b] = rounding.to_bfloat16(value, generator)

    def _blocks(self, a: int, b: int) -> slice:
        return slice(a // rounding.BLOCK, -(-b // rounding.BLOCK))


class _Bucket:
    """Parameters of one dtype, device, decay class and factor of the learning rate; master and moments lie in one flat
    buffer each."""

    def __init__(self, parameters: list[torch.nn.Parameter], names: list[str], decay: bool, factor: float, state: str):
        self.parameters, self.names, self.decay, self.factor = parameters, names, decay, factor
        self.sizes = [p.numel() for p in parameters]
        self.n, device = sum(self.sizes), parameters[0].device
        self.low = parameters[0].dtype != torch.float32
        self.shard = getattr(
            parameters[0], "is_shard", False
        )  # a part of parameters that other processes hold the rest of
        self.master = None
        if self.low and state == "float32":
            # filled in place: a narrow copy that comes and goes would leave holes between what stays
            self.master = torch.empty(self.n, device=device)
            for p, part in zip(parameters, self.master.split(self.sizes), strict=True):
                part.copy_(p.detach().reshape(-1))
        self.exp_avg = _Moments(self.n, state, device, positive=False)
        self.exp_avg_sq = _Moments(self.n, state, device, positive=True)
        self.accumulated: torch.Tensor | None = None
        self.steps = torch.zeros((), dtype=torch.float32, device=device if device.type == "cuda" else "cpu")

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges to work on. Only a parameter that is a bucket of its own is larger than one chunk."""
        size = CHUNK_ELEMENTS if len(self.parameters) == 1 else max(1, self.n)  # shards may be empty
        return ((a, min(a + size, self.n)) for a in range(0, self.n, size))

    def write(self, a: int, b: int, values: torch.Tensor) -> None:
        """Put `values` of the range into the parameters."""
        if len(self.parameters) == 1:
            self.parameters[0].data.view(-1)[a:b].copy_(values)
        else:
            for p, part in zip(self.parameters, values.split(self.sizes), strict=True):
                p.data.copy_(part.view_as(p))

    def weights(self, a: int, b: int) -> torch.Tensor:
        """fp32 [b - a], the master itself where there is one."""
        if self.master is not None:
            return self.master[a:b]
        return _flat([p.detach() for p in self.parameters], a, b).to(torch.float32, copy=len(self.parameters) == 1)

    def gradient(self, a: int, b: int, scale: float, summed: bool) -> torch.Tensor:
        """fp32 [b - a]; parameters without a gradient in this step count as zero. summed: of several micro-batches."""
        if summed:
            flat = self.accumulated[a:b].float()
        else:
            flat = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters], a, b).float()
        return flat * scale if scale != 1.0 else flat


def _flat(tensors: list[torch.Tensor], a: int, b: int) -> torch.Tensor:
    return tensors[0].reshape(-1)[a:b] if len(tensors) == 1 else torch.cat([t.reshape(-1) for t in tensors])


class AdamW:
    """`step(learning_rate)` reads the gradients, clips them by their global norm, updates, and clears them.

    state: "float32" (fp32 moments, and an fp32 master of narrower weights), "bfloat16" or "float8" (moments of that
    width, the weights as they are). The noise of rounding is a function of (seed, step, bucket) only: it needs no place
    in a checkpoint, and a resumed run is bit-identical. Weight decay applies to matrices, not to norms and biases.
    rates: (part of a name, factor): parameters of such a name learn so many times faster.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        *,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        eps=1e-8,
        seed=0,
        state="float32",
        rates: Sequence[tuple[str, float]] = (),
    ):
        self.betas, self.weight_decay, self.eps, self.seed, self.state_dtype = betas, weight_decay, eps, seed, state
        self.steps = 0
        self.accumulating = False
        self.sum_over_shards: Callable[[float], float] = float  # of a figure of this process' shards
        classes: dict[tuple, list[tuple[str, torch.nn.Parameter]]] = {}
        for name, p in named_parameters:
            if p.requires_grad:
                factor = next((factor for part, factor in rates if part in name), 1.0)
                kind = (str(p.device), p.dtype, p.ndim >= 2, factor, getattr(p, "is_shard", False))
                classes.setdefault(kind, []).append((name, p))
        self.buckets: list[_Bucket] = []
        for (_, _, decay, factor, _), members in classes.items():
            start = size = 0
            for i, (_, p) in enumerate(members):
                if i > start and size + p.numel() > CHUNK_ELEMENTS:
                    self._bucket(members[start:i], decay, factor)
                    start, size = i, 0
                size += p.numel()
            self._bucket(members[start:], decay, factor)
        self._place = {p: (bucket, i) for bucket in self.buckets for i, p in enumerate(bucket.parameters)}
        self._hooks = [p.register_post_accumulate_grad_hook(self.take) for p in self._place]

    def _bucket(self, members, decay, factor):
        parameters, names = [p for _, p in members], [name for name, _ in members]
        self.buckets.append(_Bucket(parameters, names, decay, factor, self.state_dtype))

    def _generator(self, i: int) -> torch.Generator:
        """The noise of bucket i in the step that was last begun."""
        generator = torch.Generator(self.buckets[i].parameters[0].device)
        return generator.manual_seed((self.seed * 1_000_003 + self.steps) * 4099 + i)

    # -- gradients of several micro-batches ----------------------------------------------------------------------------

    @torch.no_grad()
    def take(self, p: torch.nn.Parameter) -> None:
        """While accumulating: move a gradient into its sum as soon as the backward has made it, and free it."""
        if not self.accumulating or p.grad is None:
            return
        bucket, i = self._place[p]
        narrow = self.state_dtype != "float32"
        start = sum(bucket.sizes[:i])
        for a in range(0, p.numel(), CHUNK_ELEMENTS):
            grad = p.grad.reshape(-1)[a : a + CHUNK_ELEMENTS]
            total = bucket.accumulated[start + a : start + a + len(grad)]
            if narrow:
                total.copy_(rounding.to_bfloat16(total.float().add_(grad), self._sum_noise))
            else:
                total.add_(grad)
        p.grad = None

    def _make_sums(self) -> None:
        for bucket in self.buckets:
            if bucket.accumulated is None:
                # fp32, because micro-batches must not be added up in bf16; where memory is what counts, bf16 unbiased
                dtype = torch.float32 if self.state_dtype == "float32" else torch.bfloat16
                bucket.accumulated = torch.zeros(bucket.n, dtype=dtype, device=bucket.parameters[0].device)

    @torch.no_grad()
    def add_up(self, sum_over_processes: Callable[[torch.Tensor], None]) -> None:
        """The accumulated gradients become those of all processes; one that accumulated nothing counts as zero."""
        self.accumulating = True
        self._make_sums()
        for i, bucket in enumerate(self.buckets):
            if bucket.shard:
                continue  # added up when it was made
            generator = self._generator(i)
            for a, b in bucket.chunks():
                part = bucket.accumulated[a:b]
                whole = part.float()  # an fp32 sum itself; a bf16 one is added up in fp32
                sum_over_processes(whole)
                if whole.dtype != part.dtype:
                    part.copy_(rounding.to_bfloat16(whole, generator))

    def accumulate(self, number: int) -> None:
        """Say before the forward of each micro-batch but one that is the whole step which it is, from 0 on: its
        gradients are added to those before."""
        self.accumulating = True
        self._make_sums()
        if self.state_dtype != "float32":
            self._sum_noise = torch.Generator().manual_seed((self.seed * 1_000_003 + self.steps) * 4099 - 1 - number)

    def _norm(self) -> float:
        parts = [bucket for bucket in self.buckets if bucket.shard]
        if not parts:
            return self._norm_of(self.buckets)
        whole = self._norm_of([bucket for bucket in self.buckets if not bucket.shard])
        return (whole**2 + self.sum_over_shards(self._norm_of(parts) ** 2)) ** 0.5

    def _norm_of(self, buckets: list[_Bucket]) -> float:
        if self.accumulating:  # sums of an earlier step may lie there in a step of one micro-batch
            grads = [bucket.accumulated for bucket in buckets]
        else:
            grads = [p.grad for bucket in buckets for p in bucket.parameters if p.grad is not None]
        norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
        return float(torch.linalg.vector_norm(torch.stack([norm.cpu() for norm in norms]))) if norms else 0.0

    # -- the update ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float = 0.0) -> float:
        """One update. Returns the gradients' norm before clipping; where it is not finite nothing is changed."""
        norm = self._norm()
        summed, self.accumulating = self.accumulating, False
        if not norm < float("inf"):
            return norm
        scale = max_grad_norm / (norm + 1e-6) if max_grad_norm and norm > max_grad_norm else 1.0
        self.steps += 1
        for i, bucket in enumerate(self.buckets):
            generator = self._generator(i)
            for a, b in bucket.chunks():
                weights = bucket.weights(a, b)
                moments = [moment.read(a, b) for moment in (bucket.exp_avg, bucket.exp_avg_sq)]
                bucket.steps.fill_(self.steps - 1)
                adamw(
                    [weights],
                    [bucket.gradient(a, b, scale, summed)],
                    moments[:1],
                    moments[1:],
                    [],
                    [bucket.steps],
                    fused=weights.device.type in ("cpu", "cuda", "mps"),
                    amsgrad=False,
                    maximize=False,
                    beta1=self.betas[0],
                    beta2=self.betas[1],
                    lr=learning_rate * bucket.factor,
                    eps=self.eps,
                    weight_decay=self.weight_decay if bucket.decay else 0.0,
                )
                bucket.write(a, b, rounding.to_bfloat16(weights, generator) if bucket.low else weights)
                bucket.exp_avg.write(a, b, moments[0], generator)
                bucket.exp_avg_sq.write(a, b, moments[1], generator)
            if bucket.accumulated is not None:
                bucket.accumulated.zero_()
            for p in bucket.parameters:
                p.grad = None
        return norm

    @torch.no_grad()
    def refresh(self) -> None:
        """Write the working copy of this step: the master, stochastically rounded (at step 0: the master itself)."""
        for i, bucket in enumerate(self.buckets):
            if bucket.master is not None:
                generator = self._generator(i) if self.steps else None
                for a, b in bucket.chunks():
                    part = bucket.master[a:b]
                    bucket.write(a, b, rounding.to_bfloat16(part, generator) if generator else part)

    @torch.no_grad()
    def settle(self) -> None:
        """Write the nearest working copy, for evaluation and saving; `refresh` brings the training copy back."""
        for bucket in self.buckets:
            if bucket.master is not None:
                bucket.write(0, bucket.n, bucket.master)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the fp32 master in the place of the parameters and let go of the rest: the last thing done here."""
        for hook in self._hooks:
            hook.remove()
        for bucket in self.buckets:
            if bucket.master is not None:
                for p, part in zip(bucket.parameters, bucket.master.split(bucket.sizes), strict=True):
                    p.data = part.view(p.shape)
        self.buckets, self._place = [], {}

    # -- state ---------------------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, torch.Tensor]:
        """The trained weights by parameter name: the fp32 master, or the parameters where there is none. Not copies."""
        return {
            name: part
            for bucket in self.buckets
            for name, part in zip(
                bucket.names,
                [p.detach() for p in bucket.parameters] if bucket.master is None else _split(bucket, bucket.master),
                strict=True,
            )
        }

    def state(self) -> dict[str, torch.Tensor]:
        """Everything a checkpoint needs, by kind and parameter name (the scales of 8-bit moments by bucket). Not
        copies."""
        out = {f"weights.{name}": tensor for name, tensor in self.weights().items()}
        for kind in ("exp_avg", "exp_avg_sq"):
            for i, bucket in enumerate(self.buckets):
                moment = getattr(bucket, kind)
                parts = zip(bucket.names, _split(bucket, moment.data), strict=True)
                out |= {f"{kind}.{name}": part for name, part in parts}
                if moment.scale is not None:
                    out[f"{kind}_scale.{i}"] = moment.scale
        return out

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
        self.refresh()


def _split(bucket: _Bucket, flat: torch.Tensor) -> list[torch.Tensor]:
    return [part.view(p.shape) for p, part in zip(bucket.parameters, flat.split(bucket.sizes), strict=True)]

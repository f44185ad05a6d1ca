"""A model's decoder layers sharded over the processes of a training (FSDP2), for models that one process cannot hold
together with their gradients and optimizer state.

Not for dividing rows or adding up gradients (train/distributed.py). Rajbhandari et al., "ZeRO" (arXiv:1910.02054, stage
3), as torch's `fully_shard` does it: a process keeps 1/N of each weight of the layers, and gathers the rest of a layer
only while that layer computes. Embeddings, the final norm and the head stay whole in every process: the loss head
(models/head.py) uses the head's weight directly, and in small models that is the embedding's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunelet.errors import TuneletError
from tunelet.models import head
from tunelet.recipe import TrainSection
from tunelet.runs.environment import memory_mb
from tunelet.train.distributed import World
from tunelet.train.optimizer import BYTES, AdamW

FILL = 0.7  # of the memory there is: activations need some too


@dataclass(frozen=True)
class Shards:
    """A sharded model. `whole`: trained parameters that every process holds; `sharded`: the others that are trained,
    each with this process' part of it (which may be empty), a parameter that shares its memory."""

    world: World
    model: Any
    skeleton: Any  # the model before it was sharded, on the meta device
    whole: dict[str, nn.Parameter]
    sharded: dict[str, tuple[nn.Parameter, nn.Parameter]]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What this process' optimizer works on. The whole ones first: their place decides over the noise of rounding,
        which has to be the same everywhere."""
        yield from self.whole.items()
        for name, (_, part) in self.sharded.items():
            yield name, part

    def connect(self, optimizer: AdamW) -> None:
        """Hand the optimizer its part of every gradient, as soon as the gradient is added up over the processes."""
        optimizer.sum_over_shards = lambda figure: self.world.sums(figure)[0]
        for p, part in self.sharded.values():

            def take(p: nn.Parameter, part: nn.Parameter = part) -> None:
                part.grad, p.grad = p.grad.to_local(), None
                optimizer.take(part)

            p.register_post_accumulate_grad_hook(take)

    def gathered(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The optimizer's `state()` or `weights()` of the whole parameters, on the CPU of process 0, with the names and
        shapes they have without sharding; {} elsewhere. All processes have to call it."""
        from torch.distributed.tensor import DTensor

        out = {}
        for key, tensor in tensors.items():
            p = self._sharded(key)
            if p is not None:
                place = {"shape": p.shape, "stride": p.stride(), "run_check": False}
                tensor = DTensor.from_local(tensor, p.device_mesh, p.placements, **place).full_tensor()
            if self.world.first:
                out[key] = tensor.to("cpu", copy=True)
        return out

    def scattered(self, tensors: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The inverse: what this process' `tensors` are in process 0's `given`, which are whole."""
        out = {}
        for key, like in tensors.items():
            p = self._sharded(key)
            shape = like.shape if p is None else p.shape
            full = given[key].to(like.device) if self.world.first else like.new_empty(shape)
            self.world.spread([full])
            if p is not None:
                start = self.world.rank * -(-len(full) // self.world.size)
                full = full[start : start + len(like)]
            out[key] = full
        return out

    def _sharded(self, key: str) -> nn.Parameter | None:
        """The sharded parameter that a key of the optimizer's state or weights is of."""
        found = self.sharded.get(key) or self.sharded.get(key.partition(".")[2])
        return found[0] if found else None

    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Make the model in process 0 what it was before it was sharded, with these weights where it was trained. What
        was frozen stays without values: it is as it was loaded."""
        self.model._modules = self.skeleton._modules
        owners = dict(self.model.named_modules(remove_duplicate=False))
        tied = {id(p): weights[name] for name, p in self.model.named_parameters() if name in weights}
        for module in owners.values():
            for name, p in module._parameters.items():
                if id(p) in tied:
                    module._parameters[name] = tied[id(p)] = _as_parameter(tied[id(p)])


def _as_parameter(tensor: torch.Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def shard_if_wanted(model: Any, settings: TrainSection, on: str, world: World, console: Any) -> Shards | None:
    """Shard `model` where `train.parallel` says so, or is "auto" and one process could not hold the whole. Says which,
    and why. None in one process, and where the model stays whole."""
    if world.size == 1:
        return None
    parallel, why = settings.parallel, "asked for"
    if parallel == "auto":
        need, there = _need(model, settings) / 1e9, _memory(on, world) / 1e9
        fits = need <= FILL * there
        parallel = "ddp" if fits else "fsdp"
        why = f"weights, gradients and optimizer state take {need:.1f} of {there:.1f} GB for each process"
        parallel, why = world.told([parallel, why])
    console.print(f"{world.size} processes, {parallel} ({why})", markup=False, highlight=False)
    return shard(model, settings, world) if parallel == "fsdp" else None


def _need(model: Any, settings: TrainSection) -> int:
    """Bytes of weights, gradients and optimizer state in a process that holds all of them."""
    state = BYTES["float32" if settings.optimizer_state == "auto" else settings.optimizer_state]
    gradient = 4 if state == BYTES["float32"] else 2
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return sum(p.numel() * p.element_size() for p in parameters) + trained * (state + gradient)


def _memory(on: str, world: World) -> int:
    """Bytes of memory that this process may count on."""
    if on == "cuda":
        return torch.cuda.get_device_properties().total_memory
    return int((memory_mb() or 8000) * 1e6) // world.local_size


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder layers. Raises TuneletError where there is no list of them."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise TuneletError(
            "train.parallel = fsdp cannot be used with this model.",
            why="its decoder layers are not in a list that could be sharded layer by layer",
            fix="--set train.parallel=ddp",
        )
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def shard(model: Any, settings: TrainSection, world: World) -> Shards:
    """Shard the layers of `model`, in place. Raises TuneletError where it cannot be."""
    if settings.optimizer_state == "float8":
        raise TuneletError(
            "train.optimizer_state = float8 does not go with train.parallel = fsdp.",
            why="8-bit moments are kept in blocks, and a shard would end within one",
            fix="--set train.optimizer_state=bfloat16: of its bytes each process holds its share only.",
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    head.packs(model), head.is_plain(model)  # found out while it is whole, and kept
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers, body = layers_of(lm.base_model), lm.base_model
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    skeleton = copy.deepcopy(model, memo | {id(buffer): buffer for buffer in model.buffers()})
    mesh = init_device_mesh(next(model.parameters()).device.type, (world.size,))
    sums = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, mp_policy=sums)
    fully_shard(body, mesh=mesh, ignored_params={p for p in body.parameters() if not isinstance(p, DTensor)})
    for module in [*layers, body]:
        module.set_gradient_divide_factor(1.0)  # sums: the loss is already divided by the targets of the whole step
        module.set_force_sum_reduction_for_comms(True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = {name: p for name, p in trained.items() if not isinstance(p, DTensor)}
    sharded = {}
    for name, p in trained.items():
        if isinstance(p, DTensor):
            part = nn.Parameter(p.to_local().detach())
            part.is_shard = True
            sharded[name] = (p, part)
    return Shards(world, model, skeleton, whole, sharded)

"""Training with several processes that `torchrun` started: who this process is, how a step's rows are divided, and sums
over all processes.

Not for sharding a model (train/sharding.py) and not for starting processes. In one process nothing of torch.distributed
is imported and every function here returns at once what it was given.

Every process holds the model, computes its rows of a step, and the sum of all gradients is added up before the
optimizer's step, which then is the same arithmetic everywhere. That is what torch's DistributedDataParallel does; its
wrapper does not fit here, because it counts on one call of the wrapped module's forward, and the loss head
(models/head.py) calls the body and uses the head's weight directly.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tunelet.errors import TuneletError

if TYPE_CHECKING:
    import torch

    from tunelet.data.examples import Tokens

# How long a process waits for the others. One that ends is noticed at once; this is for a machine that falls silent,
# and has to be longer than what process 0 does alone (writing a checkpoint, training a tokenizer).
PATIENCE = timedelta(hours=1)
FAILED = "tunelet/failed"


@dataclass(frozen=True)
class World:
    """The processes of this training. rank: this one's number of `size`; local_*: the same on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Process 0 prints, writes the run's files and holds its lock."""
        return self.rank == 0

    def mine(self, rows: Sequence[Tokens]) -> list[Tokens]:
        """The rows of a step that this process computes."""
        return divide(rows, self.size)[self.rank]

    def sums(self, *figures: float) -> list[float]:
        """Each figure added up over all processes, in float64; the same numbers everywhere."""
        if self.size == 1:
            return list(figures)
        import torch

        together = torch.tensor(figures, dtype=torch.float64)
        self.add_up(together)
        return together.tolist()

    def add_up(self, tensor: torch.Tensor) -> None:
        """`tensor` becomes, in place, the sum over all processes, the same bits everywhere."""
        import torch.distributed as dist

        with _together():
            dist.all_reduce(tensor)

    def spread(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the values that process 0 has in these tensors, of any dtype, in place."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        for tensor in tensors:
            whole = tensor.detach().contiguous()
            with _together():
                dist.broadcast(whole.reshape(-1).view(torch.uint8), 0)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(whole)

    def told(self, value: Any = None) -> Any:
        """Process 0's `value` (what JSON can hold), in every process."""
        if self.size == 1:
            return value
        import torch

        raw = bytearray(json.dumps(value).encode() if self.first else b"")
        size = torch.tensor([len(raw)])
        self.spread([size])
        data = torch.frombuffer(raw, dtype=torch.uint8) if self.first else torch.empty(int(size), dtype=torch.uint8)
        self.spread([data])
        return json.loads(bytes(data.numpy()))


ALONE = World()
_here = ALONE


def world() -> World:
    """The processes that this one trains with: inside `joined`, else this one alone."""
    return _here


def asked() -> World:
    """What torchrun says in the environment; ALONE where it started one process or did not start this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return World(*(int(os.environ[name]) for name in names))


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The block runs together with all processes of this training; alone, where torchrun started no others.

    An error in one of them ends all. It is raised on in the process where it came first, to be told there; the others
    leave by SystemExit with the same exit code and say nothing.
    """
    global _here
    here = asked()
    if here.size == 1:
        yield here
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(here.local_rank)
    with _together():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    _here = here
    try:
        yield here
        dist.barrier()
    finally:
        _here = ALONE
        dist.destroy_process_group()


@contextlib.contextmanager
def _together() -> Iterator[None]:
    yield


def divide(rows: Sequence[Tokens], parts: int) -> list[list[Tokens]]:
    """`rows` in `parts` lists of about the same number of tokens, a function of the rows only. Some may be empty.

    The longest first, each to the list with the fewest tokens (Graham, "Bounds on Multiprocessing Timing Anomalies",
    1969: at most 4/3 of the best possible); in each list the rows keep their order.
    """
    if parts == 1:
        return [list(rows)]
    held, chosen = [0] * parts, [[] for _ in range(parts)]
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        least = held.index(min(held))
        held[least] += len(rows[i].ids)
        chosen[least].append(i)
    return [[rows[i] for i in sorted(part)] for part in chosen]

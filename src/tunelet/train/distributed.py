"""Training with several processes that `torchrun` started: who this process is, how a step's rows are divided, sums
over all processes, and what happens when one of them fails.

Not for sharding a model (train/sharding.py) and not for starting processes. In one process nothing of torch.distributed
is imported, and every function here returns at once what it was given.

Every process holds the model and computes its rows of a step; the gradients are added up over all processes before the
optimizer's step, which then is the same arithmetic everywhere. That is what torch's DistributedDataParallel does. Its
wrapper does not fit here: it counts on one call of the wrapped module's forward, and the loss head (models/head.py)
calls the body and uses the head's weight directly.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunelet.errors import TuneletError

if TYPE_CHECKING:
    import torch

    from tunelet.data.examples import Tokens

# How long a process waits for the others. One that ends is noticed at once; this is for a machine that falls silent,
# and has to be longer than what process 0 does alone (checking data, writing a checkpoint).
PATIENCE = timedelta(hours=1)
# A mistake that all processes find is told by process 0: the others give it this long to do so.
COURTESY = 3.0  # seconds
FAILED = "failed"


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
        if self.size == 1:
            return
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
        """Process 0's `value` (of what JSON can hold), in every process."""
        if self.size == 1:
            return value
        import torch

        raw = bytearray(json.dumps(value).encode() if self.first else b"")
        size = torch.tensor([len(raw)])
        self.spread([size])
        data = torch.frombuffer(raw, dtype=torch.uint8) if self.first else torch.empty(int(size), dtype=torch.uint8)
        self.spread([data])
        return json.loads(bytes(data.numpy()))

    def shared(self, mine: dict[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """`given` of process 0, in every process; `mine`: tensors of the same names and shapes, overwritten."""
        if self.size == 1:
            return given
        if self.first:
            for name, tensor in mine.items():
                tensor.copy_(given[name])
        self.spread(mine.values())
        return mine


ALONE = World()
_here, _store, _joins = ALONE, None, 0


def world() -> World:
    """The processes that this one trains with: inside `joined`, else this one alone."""
    return _here


def asked() -> World:
    """What torchrun says in the environment; ALONE where it started one process or did not start this one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if not all(name in os.environ for name in names) or os.environ["WORLD_SIZE"] == "1":
        return ALONE
    return World(*(int(os.environ[name]) for name in names))


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The block runs together with all processes of this training; alone, where torchrun started no others.

    An error in one process ends all: it is raised on in one of them, to be told there, and the others leave by
    SystemExit with the same exit code and say nothing.
    """
    global _here, _store, _joins
    here = asked()
    if here.size == 1:
        yield here
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(here.local_rank)
    with _together():
        _joins += 1  # addresses and notes that an earlier group left in the store are not this one's
        _store = dist.PrefixStore(f"tunelet-{_joins}", next(dist.rendezvous("env://", timeout=PATIENCE))[0])
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=_store, rank=here.rank, world_size=here.size, timeout=PATIENCE)
    _here = here
    try:
        yield here
        with _together():
            dist.barrier()
        dist.destroy_process_group()
    except BaseException as error:
        # The group is left as it is: to take it down, the processes would have to wait for each other once more.
        if not _is_ours_to_tell(error, here):
            raise SystemExit(_exit_code(error)) from None
        raise
    finally:
        _here = ALONE


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)


class Lost(TuneletError):
    """Another process of this training has failed; it, or the first to notice, has told why."""


def _is_ours_to_tell(error: BaseException, here: World) -> bool:
    """Whether no other process has told of an error yet. Leaves a note of this one for the others."""
    told = {"process": here.rank, "code": _exit_code(error)}
    if isinstance(error, TuneletError):
        told |= {"what": error.what, "why": error.why, "fix": error.fix}
    else:
        place = traceback.extract_tb(error.__traceback__)[-1]
        told["what"] = str(error) or type(error).__name__
        told["why"] = f"{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}"
    if not here.first and not isinstance(error, Lost):
        _note()
    note = json.dumps(told)
    with contextlib.suppress(RuntimeError):  # the store is gone where the process that kept it is
        return _store.compare_set(FAILED, "", note).decode() == note
    return True


def _note() -> dict[str, Any]:
    """What a process has left about its error, as soon as there is something; {} after a few seconds without."""
    until = time.monotonic() + COURTESY
    with contextlib.suppress(RuntimeError):
        while time.monotonic() < until:
            if _store.check([FAILED]):
                return json.loads(_store.get(FAILED))
            time.sleep(0.05)
    return {}


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around all that processes do together: where it fails because another has failed, that is what is raised."""
    try:
        yield
    except RuntimeError as error:  # all errors of torch.distributed are
        note = _note()
        if note:
            lost = Lost(f"Process {note['process']}: {note['what']}", why=note["why"], fix=note.get("fix", ""))
            lost.exit_code = note["code"]
            raise lost from None
        raise Lost(
            "Another process of this training has ended, or cannot be reached.",
            why=str(error).strip().splitlines()[0].rpartition("] ")[2].split(". ")[0],
            fix="Where the system ended it for lack of memory: fewer processes, a smaller train.tokens_per_batch, or "
            "--set train.parallel=fsdp. The same command goes on from the last checkpoint.",
        ) from error


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

"""Tokens -> Batch: laying rows into one flat stream, the order of rows, and windows for first training.

Not for tokenising (render.py) and not for moving a batch to a device (the loop does that).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunelet.data.examples import Batch, Tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Streams are filled up to a multiple of this: a matrix product of a shape never seen before costs its compilation by
# oneDNN and a place in its cache, and rows of changing length made a new shape at every step.
MULTIPLE = 64
POOL = 64  # batches whose rows are sorted by length together: enough to group well, few enough to stay random


def make_batch(rows: Sequence[Tokens]) -> Batch:
    """Lay rows one after the other in one flat stream; see `Batch` for the shapes. Its length is a multiple of 64.

    The first token of a row is never a target: nothing in its own row predicts it. Rows may hold tuples, lists or
    numpy arrays. Raises ValueError where there is no row or a row is empty.
    """
    import torch

    if not rows:
        raise ValueError("a batch needs at least one row")
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
    if not lengths.all():
        raise ValueError(f"{rows[int(lengths.argmin())].origin}: a row without tokens")
    segments = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([np.asarray(row.ids, dtype=np.int64) for row in rows])
    mask = np.concatenate([np.asarray(row.mask, dtype=bool) for row in rows])
    if len(mask) != len(ids):
        raise ValueError(f"{len(ids)} ids and {len(mask)} mask entries")
    mask[segments[:-1]] = False
    targets_at = np.flatnonzero(mask)
    positions = np.arange(segments[-1], dtype=np.int64) - np.repeat(segments[:-1], lengths)
    before = targets_at - 1  # the token that predicts each target
    owners, branches, reference = np.repeat(np.arange(len(rows)), lengths), [()] * len(rows), []
    if any(row.branches for row in rows):
        owners, first = np.empty(len(ids), dtype=np.int64), 0
        for number, (row, start) in enumerate(zip(rows, segments[:-1].tolist(), strict=True)):
            for begin, end in row.sequences:
                owners[start + begin : start + end] = first
                first += 1
            shared = row.branches[0] if row.branches else 0
            for begin, (_, end) in zip(row.branches, row.sequences, strict=bool(row.branches)):
                positions[start + begin : start + end] = np.arange(shared, shared + end - begin)
                before[targets_at == start + begin] = start + shared - 1
            branches[number] = tuple(start + begin for begin in row.branches)
    for row in rows:
        reference += row.reference
    fill = (0, int(-segments[-1] % MULTIPLE))
    return Batch(
        input_ids=torch.from_numpy(np.pad(ids, fill)),
        position_ids=torch.from_numpy(np.pad(positions, fill)),
        segments=torch.from_numpy(segments),
        loss_at=torch.from_numpy(before),
        targets=torch.from_numpy(ids[targets_at]),
        sequence_of=torch.from_numpy(owners[targets_at]),
        reference=torch.tensor(reference, dtype=torch.float32),
        labels=torch.tensor([row.label for row in rows]),
        branches=tuple(branches),
        origins=tuple(row.origin for row in rows),
    )


def order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n), a function of (seed, epoch) only, the same on every platform."""
    return _permutation(n, seed, epoch, 0).tolist()


def batches(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Row numbers of each batch of an epoch: every row once, rows of similar length together, batches in random order.

    A function of the arguments only. ceil(n / batch_size) batches; at most one of them is short. Rows are shuffled,
    sorted by length inside pools of 64 batches, cut, and the batches shuffled: memory stays even within a batch
    without the order becoming one from short to long.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    rows = _permutation(len(lengths), seed, epoch, 1)
    size = np.asarray(lengths, dtype=np.int64)
    cut: list[list[int]] = []
    for start in range(0, len(rows), POOL * batch_size):
        pool = rows[start : start + POOL * batch_size]
        pool = pool[np.argsort(size[pool], kind="stable")]
        cut += [pool[i : i + batch_size].tolist() for i in range(0, len(pool), batch_size)]
    return [cut[i] for i in _permutation(len(cut), seed, epoch, 2)]


def windows(rows: Sequence[Tokens], length: int) -> list[Tokens]:
    """Documents laid one after the other and cut into windows of `length` tokens; the last may be shorter.

    All windows are views of one int32 array (4 bytes a token in all). A text row is trained as a whole, so its windows
    share one mask, [False, True, True, ...]; rows with other roles keep their own mask. A window's origin is that of
    the document its first token comes from. A last window of a single token has no target and is left out.
    """
    if length < 2:
        raise ValueError(f"a window needs at least 2 tokens, not {length}")
    rows = [row for row in rows if len(row.ids)]
    if not rows:
        return []
    starts = np.concatenate([[0], np.cumsum([len(row.ids) for row in rows])])
    ids = np.empty(int(starts[-1]), dtype=np.int32)
    for row, start in zip(rows, starts, strict=False):
        ids[start : start + len(row.ids)] = row.ids
    whole = all(role == "text" for row in rows for _, _, role in row.spans)
    mask = None if whole else np.concatenate([np.asarray(row.mask, dtype=bool) for row in rows])
    cuts = range(0, len(ids), length)
    owners = np.searchsorted(starts, np.fromiter(cuts, dtype=np.int64), side="right") - 1
    shared = text_mask(length)
    out = []
    for cut, owner in zip(cuts, owners, strict=True):
        part = ids[cut : cut + length]
        if len(part) < 2:
            continue
        part_mask = shared[: len(part)] if mask is None else mask[cut : cut + length]
        out.append(Tokens(part, part_mask, ((0, len(part), "text"),), rows[owner].origin))
    return out


def text_mask(length: int) -> NDArray[np.bool_]:
    """[length] bool: everything is a target but the first token. A read-only view of one shared array."""
    global _TEXT_MASK
    if length > len(_TEXT_MASK):
        grown = np.ones(max(length, 2 * len(_TEXT_MASK)), dtype=bool)
        grown[0] = False
        grown.flags.writeable = False
        _TEXT_MASK = grown
    return _TEXT_MASK[:length]


_TEXT_MASK = np.zeros(0, dtype=bool)


def _permutation(n: int, seed: int, epoch: int, purpose: int) -> NDArray[np.int64]:
    # PCG64's raw stream and SeedSequence are guaranteed never to change (NEP 19), Generator.permutation is not:
    # so the raw numbers are sorted here, and a tie (never seen) is broken by a stable sort.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, purpose]))
    return np.argsort(bits.random_raw(n), kind="stable") if n else np.zeros(0, dtype=np.int64)

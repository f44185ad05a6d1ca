"""Log-likelihoods of continuations given contexts, and whether each is what greedy decoding would write.

Not for making contexts (prompts.py) nor for what the figures mean (metrics.py). Tokenisation is lm-eval's (0.4.13,
models/huggingface.py). Sequences that begin alike (the same examples before many questions, one question before several
choices, choices of one token) are laid out as a tree: every token is computed once for all that go through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BATCH_TOKENS = 8192  # tokens of the stream of one forward
LAYOUT_TOKENS = 32768  # positions of its attention, where what is shared stands once for every sequence
BATCH_SIZE = 64  # sequences of one forward
STEP = 16  # lengths of attention's rows are multiples of this


@dataclass(frozen=True, slots=True)
class Request:
    """ids: [n] int32, context and continuation, cut from the left to what the model reads (plus the last token, which
    is only predicted). scored: how many of them, at the end, are the continuation."""

    ids: np.ndarray
    scored: int

    @property
    def read(self) -> np.ndarray:
        """[n - 1]: what the model is given."""
        return self.ids[:-1]


@dataclass(frozen=True, slots=True)
class Likelihood:
    """logprob: sum over the continuation's tokens, nats; greedy: each is the most probable one; tokens: how many."""

    logprob: float
    greedy: bool
    tokens: int


@dataclass(frozen=True)
class Laid:
    """Sequences of one forward as a tree. ids, positions: [T] int64, each node once. paths: for each sequence the
    places of its tokens in the stream; shared: how many of these at its beginning the sequence before it has too."""

    ids: np.ndarray
    positions: np.ndarray
    paths: list[np.ndarray]
    shared: list[int]


def score(
    model: Any,
    requests: Sequence[Request],
    *,
    batch_size: int = BATCH_SIZE,
    progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """The likelihood of every request, in their order, whatever the batches: differences are those of rounding.

    batch_size: most sequences of one forward. Softmax is in fp32, the head's product too.
    """
    import torch

    out: list[Likelihood | None] = [None] * len(requests)
    done = 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for members, sequences, shared in _batches(requests, batch_size):
                laid = lay(sequences, shared)
                found = _forward(model, laid, [[requests[place] for place in places] for places in members])
                for places, likelihoods in zip(members, found, strict=True):
                    for place, likelihood in zip(places, likelihoods, strict=True):
                        out[place] = likelihood
                    done += len(places)
                if progress:
                    progress(done, len(requests))
    finally:
        model.train(was_training)
    return [likelihood for likelihood in out if likelihood is not None]


def _batches(
    requests: Sequence[Request], batch_size: int
) -> Iterator[tuple[list[list[int]], list[np.ndarray], list[int]]]:
    """(places of the requests that read each sequence, the sequences, how much each shares with the one before).

    Sorted as texts are, so that those with one beginning follow one another: what a sequence shares with any before it,
    it shares with the last. Equal ones are one."""
    keys = [request.read.astype(">u4").tobytes() for request in requests]
    members: list[list[int]] = []
    sequences: list[np.ndarray] = []
    shared: list[int] = []
    tokens = layout = 0
    before = None
    for place in sorted(range(len(requests)), key=keys.__getitem__):
        if before is not None and keys[place] == keys[before]:
            members[-1].append(place)
            continue
        own = requests[place].read
        same = common(requests[before].read, own) if before is not None and members else 0
        length = -(-len(own) // STEP) * STEP
        full = tokens + len(own) - same > BATCH_TOKENS or layout + length > LAYOUT_TOKENS
        if members and (len(members) == batch_size or full):
            yield members, sequences, shared
            members, sequences, shared, tokens, layout, same = [], [], [], 0, 0, 0
        members.append([place])
        sequences.append(own)
        shared.append(same)
        tokens += len(own) - same
        layout += length
        before = place
    if members:
        yield members, sequences, shared


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with alike."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def lay(sequences: Sequence[np.ndarray], shared: Sequence[int]) -> Laid:
    """shared[i]: how many tokens sequence i has in common with sequence i - 1 at the beginning; 0 for the first."""
    ids, positions, paths, at = [], [], [], 0
    path = np.zeros(0, dtype=np.int64)
    for sequence, same in zip(sequences, shared, strict=True):
        new = len(sequence) - same
        path = np.concatenate([path[:same], np.arange(at, at + new)])
        ids.append(sequence[same:])
        positions.append(np.arange(same, same + new))
        paths.append(path)
        at += new
    return Laid(np.concatenate(ids).astype(np.int64), np.concatenate(positions), paths, list(shared))


def plan(laid: Laid, device: Any) -> Any:
    """models.attention.AttentionPlan of the tree: a row for every sequence that is not the beginning of the next, the
    longest first, those that only go on from what another brought apart from the others."""
    import torch

    from tunelet.models import attention

    leaves = [path for path, after in zip(laid.paths, [*laid.shared[1:], 0], strict=True) if after < len(path)]
    starts = _brought(leaves)
    total = len(laid.ids)
    if len({len(path) for path in leaves}) == 1 and sum(len(path) for path in leaves) == total:
        return attention.AttentionPlan((attention.Group(len(leaves), len(leaves[0])),), total, None, None)
    order = sorted(range(len(leaves)), key=lambda leaf: (starts[leaf] > 0, -len(leaves[leaf])))
    rows: list[list[int]] = []
    for leaf in order:
        length, longest = len(leaves[leaf]), len(leaves[rows[-1][0]]) if rows else 0
        near = length >= attention.FILL * longest or longest - length <= STEP
        if rows and near and (starts[leaf] > 0) == (starts[rows[-1][0]] > 0):
            rows[-1].append(leaf)
        else:
            rows.append([leaf])
    scatter, gather, groups, offset = np.full(total, -1, dtype=np.int64), [], [], 0
    for row in rows:
        length = -(-len(leaves[row[0]]) // STEP) * STEP
        # cut down to a multiple, so that shapes repeat from batch to batch
        groups.append(attention.Group(len(row), length, min(starts[leaf] for leaf in row) // STEP * STEP))
        for leaf in row:
            path = leaves[leaf]
            scatter[path[starts[leaf] :]] = np.arange(offset + starts[leaf], offset + len(path))
            gather.append(np.pad(path, (0, length - len(path)), constant_values=path[0]))
            offset += length
    return attention.AttentionPlan(
        tuple(groups),
        total,
        torch.from_numpy(np.concatenate(gather)).to(device),
        torch.from_numpy(scatter).to(device),
    )


def _brought(leaves: Sequence[np.ndarray]) -> list[int]:
    """How much of each leaf's beginning an earlier *leaf* has brought. A sequence that is the beginning of the next has
    no row of its own: what it brought is the next one's to bring."""
    out, seen = [], -1  # places up to `seen` are laid out
    for path in leaves:
        out.append(int(np.searchsorted(path, seen, side="right")))
        seen = int(path[-1])
    return out


def _forward(model: Any, laid: Laid, members: Sequence[Sequence[Request]]) -> list[list[Likelihood]]:
    """For each sequence the likelihoods of the requests that read it."""
    import torch

    from tunelet.models import head, virtual

    lm = head.causal_lm(model)
    device = lm.get_input_embeddings().weight.device
    tree = virtual.of(lm) is None and head.packs(model)
    laid = laid if tree else _apart(laid)
    at, targets = [], []
    for path, requests in zip(laid.paths, members, strict=True):
        for request in requests:
            at.append(path[len(path) - request.scored :])
            targets.append(request.ids[-request.scored :])
    places, back = np.unique(np.concatenate(at), return_inverse=True)
    where = torch.from_numpy(places).to(device)
    rows = (_tree_rows if tree else _plain_rows)(model, lm, laid, where, device)
    wanted = np.concatenate(targets).astype(np.int64)
    logprob, best = np.empty(len(wanted)), np.empty(len(wanted), dtype=np.int64)
    for first, logp in rows:
        mine = np.flatnonzero((back >= first) & (back < first + len(logp)))
        row = torch.from_numpy(back[mine] - first).to(device)
        logprob[mine] = logp[row, torch.from_numpy(wanted[mine]).to(device)].double().cpu().numpy()
        best[mine] = logp.argmax(-1)[row].cpu().numpy()
    out, start = [], 0
    for requests in members:
        out.append([])
        for request in requests:
            part = slice(start, start + request.scored)
            greedy = bool((best[part] == wanted[part]).all())
            out[-1].append(Likelihood(float(logprob[part].sum()), greedy, request.scored))
            start += request.scored
    return out


def _apart(laid: Laid) -> Laid:
    """The same without sharing, for models whose rows cannot be laid out as a tree: recurrent layers, virtual
    tokens."""
    return lay([laid.ids[path] for path in laid.paths], [0] * len(laid.paths))


def _tree_rows(model: Any, lm: Any, laid: Laid, where: Any, device: Any) -> Iterator[tuple[int, Any]]:
    """(number of the first, [n, V] fp32 log-probabilities at the places `where`), in chunks."""
    import torch

    from tunelet.data.pack import MULTIPLE
    from tunelet.models import head

    fill = (0, -len(laid.ids) % MULTIPLE)
    inputs = {
        "input_ids": torch.from_numpy(np.pad(laid.ids, fill)).to(device)[None],
        "position_ids": torch.from_numpy(np.pad(laid.positions, fill)).to(device)[None],
        "segments": plan(laid, device),
        "use_cache": False,
    }
    if head.is_plain(model):
        yield from _plain_head(lm, lm.base_model(**inputs).last_hidden_state[0].index_select(0, where))
    else:
        yield 0, torch.log_softmax(lm(**inputs, logits_to_keep=where).logits[0], -1, dtype=torch.float32)


def _plain_rows(model: Any, lm: Any, laid: Laid, where: Any, device: Any) -> Iterator[tuple[int, Any]]:
    """As `_tree_rows`, of sequences that lie one after the other."""
    import torch

    from tunelet.data.examples import Batch
    from tunelet.models import head

    none = torch.empty(0, dtype=torch.int64)
    borders = torch.from_numpy(np.cumsum([0, *(len(path) for path in laid.paths)]))
    ids, positions = torch.from_numpy(laid.ids), torch.from_numpy(laid.positions)
    batch = Batch(ids, positions, borders, where.cpu(), none, none, none.float(), none.bool()).to(device)
    if head.is_plain(model):
        yield from _plain_head(lm, head.hidden_states(model, batch).index_select(0, where))
    else:
        yield 0, torch.log_softmax(head.own_logits(model, batch), -1, dtype=torch.float32)


def _plain_head(lm: Any, hidden: Any) -> Iterator[tuple[int, Any]]:
    from tunelet.models import head, sequences

    weight = lm.get_output_embeddings().weight
    factor, chunk = sequences.as_factor(weight), max(1, head.CHUNK_ELEMENTS // weight.shape[0])
    for start in range(0, len(hidden), chunk):
        yield start, sequences.logp_of(hidden[start : start + chunk], factor)

"""Batches, windows, orders: nothing is lost, nothing crosses a row, and a seed gives the same order anywhere."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunelet.data.examples import Origin, Tokens
from tunelet.data.pack import batches, make_batch, order, text_mask, windows


def row(ids, mask=None, role="assistant", line=1):
    mask = tuple(mask) if mask is not None else (False,) + (True,) * (len(ids) - 1)
    return Tokens(tuple(ids), mask, ((0, len(ids), role),), Origin("f", line))


def test_a_batch_by_hand():
    batch = make_batch([row([5, 6, 7], [True, False, True], line=1), row([8, 9], line=2), row([4], [True], line=3)])
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 4] + [0] * 58, "filled up to a multiple of 64"
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 0] + [0] * 58
    assert batch.tokens == 6
    assert batch.segments.tolist() == [0, 3, 5, 6]
    assert batch.loss_at.tolist() == [1, 3] and batch.targets.tolist() == [7, 9]
    assert [origin.line for origin in batch.origins] == [1, 2, 3]
    assert {
        str(t.dtype) for t in (batch.input_ids, batch.position_ids, batch.segments, batch.loss_at, batch.targets)
    } == {"torch.int64"}


rows = st.lists(
    st.lists(st.tuples(st.integers(0, 50_000), st.booleans()), min_size=1, max_size=12), min_size=1, max_size=8
)


@given(rows=rows, arrays=st.booleans())
def test_a_batch_holds_every_target_and_no_other(rows, arrays):
    made = []
    for tokens in rows:
        ids, mask = zip(*tokens, strict=True)
        if arrays:
            ids, mask = np.array(ids, dtype=np.int32), np.array(mask)
        made.append(Tokens(ids, mask, ((0, len(ids), "user"),), Origin("f", 1)))
    batch = make_batch(made)
    expected = [id_ for tokens in rows for n, (id_, trained) in enumerate(tokens) if trained and n]
    assert batch.targets.tolist() == expected
    assert batch.input_ids[batch.loss_at + 1].tolist() == expected
    assert len(expected) == sum(tokens.trained for tokens in made)
    firsts = set(batch.segments[:-1].tolist())
    assert not firsts & set((batch.loss_at + 1).tolist())
    assert batch.position_ids[batch.segments[:-1]].sum() == 0


def test_what_makes_no_batch():
    with pytest.raises(ValueError, match="at least one row"):
        make_batch([])
    with pytest.raises(ValueError, match="f, line 7: a row without tokens"):
        make_batch([row([1]), Tokens((), (), (), Origin("f", 7))])
    with pytest.raises(ValueError, match="3 ids and 2 mask entries"):
        make_batch([row([1, 2, 3], [True, False])])


def test_order_is_the_same_on_every_platform():
    assert order(8, 0, 0) == [3, 2, 1, 6, 0, 7, 4, 5]
    assert batches([1, 9, 2, 8, 3, 7, 4], 2, 0, 0) == [[4, 6], [0, 2], [5, 3], [1]]
    assert order(8, 0, 1) != order(8, 0, 0) != order(8, 1, 0)
    assert order(0, 0, 0) == [] and order(1, 5, 5) == [0]


@given(n=st.integers(0, 300), seed=st.integers(0, 2**40), epoch=st.integers(0, 100))
def test_order_is_a_permutation_of_seed_and_epoch(n, seed, epoch):
    assert sorted(order(n, seed, epoch)) == list(range(n))
    assert order(n, seed, epoch) == order(n, seed, epoch)


@given(
    lengths=st.lists(st.integers(1, 1000), max_size=400),
    size=st.integers(1, 9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 9),
)
def test_batches_hold_every_row_once(lengths, size, seed, epoch):
    made = batches(lengths, size, seed, epoch)
    assert Counter(n for batch in made for n in batch) == Counter(range(len(lengths)))
    assert len(made) == -(-len(lengths) // size)
    assert sum(len(batch) != size for batch in made) <= 1
    assert made == batches(np.array(lengths, dtype=np.int32), size, seed, epoch)


def test_batches_group_similar_lengths_in_random_order():
    lengths = np.random.default_rng(0).integers(10, 1000, 4000)
    made = batches(lengths, 8, 0, 0)
    padded = sum(max(lengths[n] for n in batch) * len(batch) for batch in made)
    assert padded < 1.05 * lengths.sum()
    means = [float(np.mean(lengths[batch])) for batch in made]
    half = len(means) // 2
    assert 0.8 < np.mean(means[:half]) / np.mean(means[half:]) < 1.25  # not from short to long
    assert made != batches(lengths, 8, 0, 1) and made != batches(lengths, 8, 1, 0)
    with pytest.raises(ValueError, match="batch_size"):
        batches(lengths, 0, 0, 0)


documents = st.lists(st.lists(st.integers(0, 500), min_size=0, max_size=30), max_size=12)


@given(documents=documents, length=st.integers(2, 17))
def test_windows_lose_nothing(documents, length):
    made = windows(
        [
            row(ids, role="text", line=n) if ids else Tokens((), (), (), Origin("f", n))
            for n, ids in enumerate(documents)
        ],
        length,
    )
    flat = [id_ for ids in documents for id_ in ids]
    kept = len(flat) - (1 if len(flat) % length == 1 else 0)
    assert [int(id_) for window in made for id_ in window.ids] == flat[:kept]
    assert all(len(window.ids) == length for window in made[:-1])
    owner = [n for n, ids in enumerate(documents) for _ in ids]
    for n, window in enumerate(made):
        assert window.origin.line == owner[n * length]
        assert list(window.mask) == [False] + [True] * (len(window.ids) - 1)
        assert window.trained == len(window.ids) - 1
        assert window.spans == ((0, len(window.ids), "text"),)


def test_windows_of_conversations_keep_their_masks():
    made = windows([row([1, 2, 3], [False, False, True]), row([4, 5, 6], [False, True, True])], 4)
    assert [window.mask.tolist() for window in made] == [[False, False, True, False], [True, True]]
    assert make_batch(made).targets.tolist() == [3, 6]


def test_windows_take_four_bytes_a_token_and_little_time():
    n, length = 2_000, 1_000
    documents = [
        Tokens(np.arange(length, dtype=np.int32), text_mask(length), ((0, length, "text"),), Origin("f", i))
        for i in range(n)
    ]
    started = time.process_time()
    made = windows(documents, 512)
    assert time.process_time() - started < 1.0  # 2M tokens; a loop over tokens would take several seconds
    assert made[0].ids.dtype == np.int32 and made[0].ids.base is made[1].ids.base
    assert made[0].mask.base is made[1].mask.base
    assert sum(len(window.ids) for window in made) == n * length
    with pytest.raises(ValueError, match="at least 2"):
        windows(documents, 1)
    assert windows([], 8) == []


def test_the_shared_mask_cannot_be_written_to():
    mask = text_mask(5)
    assert mask.tolist() == [False, True, True, True, True]
    with pytest.raises(ValueError):
        mask[0] = True

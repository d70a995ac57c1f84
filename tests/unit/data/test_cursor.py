"""The order of the data: the same whoever asks, every sequence once an epoch, resumed anywhere at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexa_train.data.cursor import Order, permutation

WORLDS = (1, 2, 3, 4, 6, 12)


def consumed(order: Order, step: int, *, world: int, microbatch: int, global_batch: int = 12) -> list[int]:
    """What all ranks together take in one step, rank by rank."""
    return [
        sequence
        for rank in range(world)
        for chunk in order.microbatches(step, global_batch=global_batch, microbatch=microbatch, rank=rank, world=world)
        for sequence in chunk
    ]


@given(count=st.integers(1, 40), total=st.integers(0, 200), seed=st.integers(0, 2**31 - 1), step=st.integers(0, 17))
def test_any_world_and_microbatch_takes_the_same_sequences_in_the_same_order(
    count: int, total: int, seed: int, step: int
) -> None:
    order = Order(count, total, seed)
    first, last = 12 * step, min(12 * step + 12, total)
    expected = [order.at(position) for position in range(first, last)]
    for world in WORLDS:
        for microbatch in (size for size in (1, 2, 3, 4, 6, 12) if (12 // world) % size == 0):
            assert consumed(order, step, world=world, microbatch=microbatch) == expected


@given(count=st.integers(1, 60), seed=st.integers(0, 2**31 - 1), epoch=st.integers(-1, 1000))
def test_every_epoch_takes_every_sequence_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(count, seed=seed, epoch=epoch).tolist()) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permutation(50, seed=seed, epoch=epoch).tolist()) for seed in range(3) for epoch in range(-1, 3)}
    assert len(orders) == 12


def test_the_order_of_a_seed_never_changes() -> None:
    # A resumed run relies on it, also across releases of numpy.
    assert permutation(10, seed=7, epoch=0).tolist() == [1, 9, 2, 8, 5, 0, 4, 3, 7, 6]


def test_an_order_cannot_be_spoilt_by_whoever_reads_it() -> None:
    with pytest.raises(ValueError, match="read-only"):
        permutation(5, seed=0, epoch=0)[0] = 3


def test_the_last_step_takes_what_is_left() -> None:
    order = Order(num_sequences=10, total=17, seed=0)
    assert len(consumed(order, 1, world=2, microbatch=3)) == 5
    assert consumed(order, 2, world=2, microbatch=3) == []


def test_every_rank_has_as_many_microbatches_in_the_last_step_as_in_any_other() -> None:
    order = Order(num_sequences=10, total=13, seed=0)
    chunks = [order.microbatches(1, global_batch=12, microbatch=3, rank=rank, world=2) for rank in (0, 1)]
    assert [[len(chunk) for chunk in rank] for rank in chunks] == [[1, 0], [0, 0]]


def test_an_epoch_ends_within_a_step() -> None:
    order = Order(num_sequences=8, total=24, seed=3)
    taken = [sequence for step in (0, 1) for sequence in consumed(order, step, world=1, microbatch=12)]
    assert [sorted(taken[start : start + 8]) for start in (0, 8, 16)] == [list(range(8))] * 3


def test_a_position_far_away_is_found_without_walking_there() -> None:
    permutation.cache_clear()
    Order(num_sequences=1000, total=10**15, seed=0).microbatches(10**12, global_batch=8, microbatch=8, rank=0, world=1)
    assert permutation.cache_info().misses == 1

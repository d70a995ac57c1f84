"""Packing: every sample once, never too much, few bins, and the same ones every time."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nexa_train.data.pack import pack


@given(
    lengths=st.lists(st.integers(1, 64), max_size=80),
    capacity=st.integers(64, 128),
)
def test_packed_bins_hold_every_sample_once_and_never_too_much(lengths: list[int], capacity: int) -> None:
    bins = pack(lengths, capacity)
    assert sorted(sample for members in bins for sample in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[sample] for sample in members) <= capacity for members in bins)
    assert pack(lengths, capacity) == bins


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80))
def test_packing_needs_at_most_twice_the_bins_that_the_tokens_would_fill(lengths: list[int]) -> None:
    fewest_possible = -(-sum(lengths) // 100)
    large = sum(length > 50 for length in lengths)
    # Any two bins together hold more than one bin takes, or they would be one.
    assert max(fewest_possible, large) <= len(pack(lengths, 100)) <= 2 * fewest_possible


def test_a_perfect_fit_is_found() -> None:
    assert pack([3, 5, 2, 6], 8) == [[3, 2], [1, 0]]


def test_packing_many_samples_fills_nearly_every_place() -> None:
    lengths = np.random.default_rng(0).integers(1, 512, size=100_000)
    bins = pack(lengths, 1024)
    assert lengths.sum() / (1024 * len(bins)) > 0.999

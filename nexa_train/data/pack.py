"""Lengths of samples -> which samples share a sequence. Pure; `prepare.py` lays them out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing, deterministic: samples -> bins of at most `capacity` tokens.

    Johnson 1973: at most 11/9 of the fewest bins. Runs in O(samples x log + samples x capacity/64) by
    keeping bins by their free room.
    """
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # Bit r set: some bin has exactly r tokens of room.
    bins: list[list[int]] = []
    longest_first = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    for sample in longest_first:
        need = int(lengths[sample])
        fitting = occupied >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            if not by_room[room]:
                occupied &= ~(1 << room)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(sample)
        by_room[room - need].append(chosen)
        occupied |= 1 << (room - need)
    return bins

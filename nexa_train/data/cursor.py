"""Position in the data -> which sequences come next. Pure; does not depend on the number of ranks.

The cursor is one number: sequences consumed since the start. Any position is reached in the time of one
permutation, so resuming costs the same after ten steps and after a million.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def permutation(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of `count` things in one epoch: int64 [count]. Philox (Salmon et al. 2011), keyed by both."""
    # Epochs from -1 on; Philox keys are unsigned.
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch + 1], dtype=np.uint64)))
    order = generator.permutation(count)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class Order:
    """The global order of sequences over all epochs.

    Attributes:
        num_sequences: in one epoch.
        total: sequences of the whole run; positions from there on are empty (the last, partial step).
        seed: of the permutations.
    """

    num_sequences: int
    total: int
    seed: int

    def at(self, position: int) -> int | None:
        """Which sequence stands at a position; None: after the end."""
        if position >= self.total:
            return None
        epoch, offset = divmod(position, self.num_sequences)
        return int(permutation(self.num_sequences, seed=self.seed, epoch=epoch)[offset])

    def microbatches(self, step: int, *, global_batch: int, microbatch: int, rank: int, world: int) -> list[list[int]]:
        """What one rank takes through the model in one step (steps count from 0), microbatch by microbatch.

        Rank r has the r-th block of the step's sequences. Positions after the end are left out, so a
        microbatch of the last step may be empty.
        """
        share = global_batch // world
        first = step * global_batch + rank * share
        found = [self.at(first + offset) for offset in range(share)]
        chunks = [found[start : start + microbatch] for start in range(0, share, microbatch)]
        return [[index for index in chunk if index is not None] for chunk in chunks]

"""Prepared data set -> tensors of a microbatch. The only part of the data pipeline that knows torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nexa_train.losses import IGNORE


@dataclass(frozen=True)
class Batch:
    """One microbatch; see `losses.CausalLoss.forward` for the tensors.

    Attributes:
        tokens: real ones, without padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    tokens: int


class Split:
    """One split of a prepared data set, memory-mapped: any sequence in constant time."""

    def __init__(self, folder: Path, split: str) -> None:
        def load(part: str) -> np.ndarray:
            array = np.load(folder / f"{split}.{part}.npy", mmap_mode="r", allow_pickle=False)
            return np.asarray(array)

        self._ids, self._targets, self._starts, self._bins = map(load, ("ids", "targets", "starts", "bins"))
        self._edges = self._starts[self._bins]
        self.num_sequences = len(self._bins) - 1

    def num_targets(self, sequences: Sequence[int]) -> int:
        """Target tokens in these sequences; first tokens never count, so nothing is lost by shifting."""
        return sum(int(self._targets[self._edges[s] : self._edges[s + 1]].sum()) for s in sequences)

    def num_tokens(self, sequences: Sequence[int]) -> int:
        """Real tokens in these sequences."""
        return sum(int(self._edges[sequence + 1] - self._edges[sequence]) for sequence in sequences)

    def labelled(self, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels as transformers takes them, int64 [length] each: the label of a token is itself."""
        span = slice(self._edges[sequence], self._edges[sequence + 1])
        ids = self._ids[span].astype(np.int64)
        return ids, np.where(self._targets[span] == 1, ids, IGNORE)

    def labelled_samples(self, sequence: int) -> list[tuple[Tensor, Tensor]]:
        """`labelled`, sample by sample."""
        ids, labels = map(torch.from_numpy, self.labelled(sequence))
        lengths = np.diff(self._starts[self._bins[sequence] : self._bins[sequence + 1] + 1]).tolist()
        return list(zip(torch.split(ids, lengths), torch.split(labels, lengths), strict=True))

    def batch(self, sequences: Sequence[int]) -> Batch:
        """The tensors of some sequences, [1, tokens]: one after another, without padding. None at all gives one
        token without a target, so that a rank with nothing left to do still takes part in the collectives."""
        rows = [self._row(sequence) for sequence in sequences] or [_nothing()]
        parts = [np.concatenate(part)[None] for part in zip(*rows, strict=True)]
        return self._batch(parts, sequences)

    def padded(self, sequences: Sequence[int]) -> Batch:
        """The same as [sequences, longest], as other libraries' trainers take it."""
        rows = [self._row(sequence) for sequence in sequences] or [_nothing()]
        length = max(len(row[0]) for row in rows)
        padded = [[_padded(part, length, index) for index, part in enumerate(row)] for row in rows]
        return self._batch([np.stack(part) for part in zip(*padded, strict=True)], sequences)

    def samples(self, sequences: Sequence[int]) -> list[int]:
        """The samples that these sequences hold, by their numbers in the prepared data set."""
        return [sample for each in sequences for sample in range(self._bins[each], self._bins[each + 1])]

    def _batch(self, parts: list[np.ndarray], sequences: Sequence[int]) -> Batch:
        input_ids, positions, targets = map(torch.from_numpy, parts)
        return Batch(input_ids, positions, targets, self.num_tokens(sequences))

    def _row(self, sequence: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [length] each: ids, positions, targets (shifted by one, so that position t predicts t + 1)."""
        start = self._edges[sequence]
        ids, labels = self.labelled(sequence)
        begins = self._starts[self._bins[sequence] : self._bins[sequence + 1]] - start
        positions = np.arange(len(ids), dtype=np.int64)
        positions -= np.repeat(begins, np.diff([*begins, len(ids)]))
        return ids, positions, np.concatenate([labels[1:], [IGNORE]])


def _nothing() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    zero = np.zeros(1, dtype=np.int64)
    return zero, zero, zero + IGNORE


def _padded(part: np.ndarray, length: int, index: int) -> np.ndarray:
    """Pad ids with 0, targets with IGNORE, and let positions run on: a jump would look like a new sample.

    Padding stands on the right, where a causal model's real tokens never look.
    """
    missing = length - len(part)
    if index == 1:
        return np.concatenate([part, part[-1] + 1 + np.arange(missing)])
    return np.concatenate([part, np.full(missing, IGNORE if index == 2 else 0)])

"""What a backend is: model, optimiser and parallelism behind five calls. Above it: `pipeline.py`.

A backend knows nothing of stores, artifacts, progress or signals. It takes a model through the steps of the
plan and hands its state over as pieces of named tensors, so that any backend can go on from what another one saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from nexa_train.config.spec import JobSpec
from nexa_train.data.batches import Split
from nexa_train.data.cursor import Order
from nexa_train.data.tokenizer import ChatTokenizer
from nexa_train.models.locate import Located
from nexa_train.plan import TrainPlan

if TYPE_CHECKING:
    from nexa_train.checkpoint.files import Saved


@dataclass(frozen=True)
class RankContext:
    """All that a rank works with; equal on every rank but for `rank`."""

    spec: JobSpec
    plan: TrainPlan
    located: Located
    tokenizer: ChatTokenizer
    train: Split
    validation: Split
    order: Order
    rank: int
    world: int
    should_stop: Callable[[], bool] = lambda: False
    """Whether to end, the same on every rank; a collective, so every rank asks equally often."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the run; known once the data is prepared."""
        assert self.plan.total_steps is not None  # noqa: S101 - a rank starts after preparation
        return self.plan.total_steps

    def microbatches(self, step: int) -> list[list[int]]:
        """The sequences of this rank in one step (from 0), microbatch by microbatch."""
        return self._of_rank(step, self.rank)

    def step_sequences(self, step: int) -> list[int]:
        """The sequences of this rank in one step."""
        return [sequence for micro in self.microbatches(step) for sequence in micro]

    def step_weight(self, step: int) -> int:
        """What the summed loss of one step is divided by: its `weight`, over all ranks.

        Counted from the data, not exchanged: every rank maps the same data set.
        """
        ranks = (self._of_rank(step, rank) for rank in range(self.world))
        return sum(self.weight(self.train, micro) for rank in ranks for micro in rank)

    def weight(self, split: Split, sequences: Sequence[int]) -> int:
        """What a mean loss over these sequences counts: their target tokens; for dpo their pairs."""
        return len(sequences) if self.spec.method.type == "dpo" else split.num_targets(sequences)

    def _of_rank(self, step: int, rank: int) -> list[list[int]]:
        return self.order.microbatches(
            step,
            global_batch=self.plan.global_batch,
            microbatch=self.plan.microbatch,
            rank=rank,
            world=self.world,
        )


@dataclass(frozen=True)
class StepMetrics:
    """One finished optimiser step, the same on every rank.

    Attributes:
        step: steps done, from 1. loss: mean over the step's target tokens, or pairs. grad_norm: before clipping.
        tokens: real tokens over all ranks, without padding.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int


@dataclass(frozen=True)
class Piece:
    """What one rank holds of one tensor, on the CPU, where training does not touch it.

    Attributes:
        tensor: contiguous; elements [start, start + tensor.numel()) of the whole tensor flattened. None is fine.
        start: of rows [first, last) of dim 0 it is first * (elements of a row).
        shape: of the whole tensor.
    """

    tensor: Tensor
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Staged:
    """One rank's pieces of the state after a step. Over all ranks they cover each tensor exactly once.

    So of what is whole on several ranks, one of them stages it.

    Attributes:
        weights: the trained ones, by their names in the transformers model (adapters: by PEFT's names).
        optimizer: `KEY.NAME` of every tensor that the optimiser keeps for a weight, as in `exp_avg.NAME`.
        step: optimiser steps done.
        copied: returns once the pieces hold their values; the backend sees to it that they are right.
    """

    weights: dict[str, Piece]
    optimizer: dict[str, Piece]
    step: int
    copied: Callable[[], None] = lambda: None

    def ready(self) -> Staged:
        """Itself, all copied."""
        self.copied()
        return self


class Backend(Protocol):
    """See the module. Calls are made on every rank, in the same order."""

    def setup(self) -> None:
        """Build model and optimiser, with the weights of the base model."""

    def restore(self, saved: Saved) -> None:
        """Go on from `saved`; each rank reads its own part of every tensor.

        Raises:
            DamagedError: tensors, or shapes, are not those of this model and optimiser.
        """

    def validate(self) -> float | None:
        """Mean loss over the validation split's target tokens, or pairs; None: none are, or a stop came between."""

    def train(self, after_step: Callable[[StepMetrics], bool]) -> None:
        """Take the remaining steps; ends early when `after_step` returns True.

        Raises:
            NonFiniteLossError: loss or gradient norm is NaN or infinite; before the optimiser moved.
        """

    def stage(self) -> Staged:
        """Copy this rank's pieces of the state after the last step, or begin to: no collective, no other wait.

        The memory may be that of the call before, whose pieces are written by then.
        """

    def describe(self) -> dict[str, bytes]:
        """Small files that make the saved weights loadable elsewhere: config.json or adapter_config.json."""

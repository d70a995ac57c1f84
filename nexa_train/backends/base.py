"""What a backend is: model, optimiser and parallelism behind five calls. Above it: `pipeline.py`.

A backend knows nothing of stores, artifacts, progress or signals. It takes a model through the steps of the
plan and hands its state over as named tensors, so that any backend can go on from what another one saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nexa_train.config.spec import JobSpec
from nexa_train.data.batches import Split
from nexa_train.data.cursor import Order
from nexa_train.data.tokenizer import ChatTokenizer
from nexa_train.models.locate import Located
from nexa_train.plan import TrainPlan


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
class TrainState:
    """What a checkpoint holds: whole tensors in float32 on the CPU; empty on every rank but 0.

    Attributes:
        weights: the trained ones, by their names in the transformers model (adapters: by PEFT's names).
        moments: `exp_avg.NAME`, `exp_avg_sq.NAME` for each of them.
        step: optimiser steps done.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    step: int


class Backend(Protocol):
    """See the module. Calls are made on every rank, in the same order."""

    def setup(self) -> None:
        """Build model and optimiser, with the weights of the base model."""

    def restore(self, state: TrainState) -> None:
        """Go on from `state`, which holds all tensors on every rank."""

    def validate(self) -> float | None:
        """Mean loss over the validation split's target tokens; None: nothing is held out."""

    def train(self, after_step: Callable[[StepMetrics], bool]) -> None:
        """Take the remaining steps; ends early when `after_step` returns True.

        Raises:
            NonFiniteLossError: loss or gradient norm is NaN or infinite; before the optimiser moved.
        """

    def state(self) -> TrainState:
        """A copy of the state after the last step, gathered on rank 0."""

    def describe(self) -> dict[str, bytes]:
        """Small files that make the saved weights loadable elsewhere: config.json or adapter_config.json."""

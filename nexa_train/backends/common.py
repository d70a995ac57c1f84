"""What backends have in common that build the model themselves and keep its state in torch: fsdp, deepspeed and hf."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from nexa_train.backends.base import RankContext, Staged, StepMetrics
from nexa_train.checkpoint import Saved, adapter_files, model_files

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel


class State(Protocol):
    """Weights and optimiser, out into pieces and back: `checkpoint.TorchState` or `deepspeed.ZeroState`."""

    def restore(self, saved: Saved) -> None:
        """See `base.Backend.restore`."""

    def stage(self, step: int) -> Staged:
        """See `base.Backend.stage`."""


class TorchBackend:
    """The calls of `base.Backend` that are the same for all of them.

    Attributes:
        causal: the transformers model, adapters within. lora: PEFT's configuration of them; None: all is trained.
        state: of model and optimiser. done: optimiser steps. A subclass's `setup` makes the first three.
    """

    causal: PreTrainedModel
    state: State

    def __init__(self, context: RankContext) -> None:
        self.context = context
        self.lora: LoraConfig | None = None
        self.done = 0

    def restore(self, saved: Saved) -> None:
        """See `base.Backend.restore`."""
        self.done = saved.step
        self.state.restore(saved)

    def stage(self) -> Staged:
        """See `base.Backend.stage`."""
        return self.state.stage(self.done)

    def describe(self) -> dict[str, bytes]:
        """See `base.Backend.describe`."""
        return model_files(self.causal) if self.lora is None else adapter_files(self.lora, self.context.located)

    def counted(self, after_step: Callable[[StepMetrics], bool]) -> Callable[[StepMetrics], bool]:
        """`after_step`, once the step that it is told of is counted as done."""

        def counted(metrics: StepMetrics) -> bool:
            self.done = metrics.step
            return after_step(metrics)

        return counted

"""What backends have in common: all keep a causal language model, and its state as torch has it or ZeRO."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from nexa_train.backends.base import RankContext, Staged, StepMetrics
from nexa_train.checkpoint import Saved, TorchState, adapter_files, model_files
from nexa_train.config.spec import LoraTuning
from nexa_train.models.build import Causal, build_model, inject_adapters, lora_config

if TYPE_CHECKING:
    from peft import LoraConfig


class State(Protocol):
    """Weights and optimiser, out into pieces and back: `checkpoint.TorchState` or `deepspeed.ZeroState`."""

    def restore(self, saved: Saved) -> None:
        """See `base.Backend.restore`."""

    def stage(self, step: int) -> Staged:
        """See `base.Backend.stage`."""


class TorchBackend:
    """The calls of `base.Backend` that are the same for all of them, and what several of them begin with.

    Attributes:
        causal: the model, adapters within. lora: PEFT's configuration of them; None: all is trained.
        state: of model and optimiser. done: optimiser steps. A subclass's `setup` makes the first three.
    """

    causal: Causal
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

    def build_native(self) -> None:
        """The model as the native loop takes it: adapters injected in place, on the CPU."""
        spec = self.context.spec
        self.causal = build_model(spec, self.context.located, self.context.tokenizer)
        if isinstance(spec.tuning, LoraTuning):
            self.lora = lora_config(spec.tuning, self.causal)
            inject_adapters(self.lora, self.causal)
        if spec.training.activation_checkpointing:
            self.causal.activation_checkpointing_enable({"use_reentrant": False})

    def torch_state(self, optimizer: torch.optim.Optimizer) -> TorchState:
        """Of the model and this optimiser, as `checkpoint` takes it."""
        context, adapter = self.context, self.lora is not None
        return TorchState(self.causal, optimizer, adapter=adapter, rank=context.rank, world=context.world)

    def counted(self, after_step: Callable[[StepMetrics], bool]) -> Callable[[StepMetrics], bool]:
        """`after_step`, once the step that it is told of is counted as done."""

        def counted(metrics: StepMetrics) -> bool:
            self.done = metrics.step
            return after_step(metrics)

        return counted

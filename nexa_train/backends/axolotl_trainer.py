"""Axolotl's trainers for sft and dpo, taken through the steps of the plan. Used by `axolotl.py` alone.

Named in the configuration (`trainer_cls`), so that Axolotl itself makes them. What is ours: which sequences come
and in what order, what a step's loss is divided by, the learning rate, and who hears of a finished step.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from axolotl.core.trainers import AxolotlTrainer
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from nexa_train.backends.base import RankContext, StepMetrics
from nexa_train.loop import check_finite, clip_gradients, derived_seed, summed
from nexa_train.losses import IGNORE
from nexa_train.optim import learning_rate, make_optimizer


class Microbatches(Dataset[dict[str, Tensor]]):
    """This rank's microbatches from one step (from 0) to the end of the plan; any of them in constant time."""

    def __init__(self, context: RankContext, start: int) -> None:
        self.context, self.start = context, start
        self.shape = pairs if context.spec.method.type == "dpo" else rows

    def __len__(self) -> int:
        return (self.context.total_steps - self.start) * self.context.plan.accumulation

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, number = divmod(index, self.context.plan.accumulation)
        batch = self.context.train.padded(self.context.microbatches(self.start + step)[number])
        return self.shape(batch.input_ids, batch.position_ids, batch.targets)


def rows(input_ids: Tensor, position_ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """A microbatch as transformers' causal models take it, which shift labels themselves; int64 [batch, length].

    Without a mask: padding stands on the right, and packed samples begin at position 0.
    """
    labels = torch.roll(targets, 1, dims=1)  # the last target of a row is always IGNORE
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}


def pairs(input_ids: Tensor, position_ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """A microbatch as TRL's DPO takes it: int64 [2 x batch, length], all chosen, then all rejected.

    Args:
        input_ids, position_ids, targets: int64 [batch, length]; each row a chosen sample and a rejected one, whose
            positions begin anew.
    """
    labels, counts = torch.roll(targets, 1, dims=1), torch.arange(input_ids.shape[1])
    begins = torch.where((position_ids == 0) & (counts > 0), counts, input_ids.shape[1]).min(dim=1).values
    halves = [(row, slice(0, int(begin))) for row, begin in enumerate(begins)]
    halves += [(row, slice(int(begin), None)) for row, begin in enumerate(begins)]
    ids = nn.utils.rnn.pad_sequence([input_ids[row, span] for row, span in halves], batch_first=True)
    counted = nn.utils.rnn.pad_sequence([labels[row, span] != IGNORE for row, span in halves], batch_first=True)
    # What comes after the last counted token has no part in the loss.
    seen = counted.flip(1).cumsum(1).flip(1) > 0
    return {"input_ids": ids, "attention_mask": seen.long(), "completion_mask": counted.long()}


class _Planned(Trainer):
    """Beneath Axolotl's trainers in name, above them in the order of calls."""

    context: RankContext
    optimizer: Any
    start = 0

    def prepare(self, context: RankContext) -> None:
        """Make the optimiser and wrap the model now, so that a checkpoint can be put into them."""
        self.context = context
        self.step_loss, self.step_norm, self.step_tokens = 0.0, 0.0, 0
        self.losses: list[float] = []  # this rank's part of the step's, microbatch by microbatch
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)  # progress is told elsewhere
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # TRL has adapters of 4-bit weights in bfloat16
        super()._prepare_for_training(context.total_steps, None, None)
        if self.is_deepspeed_enabled:
            self.deepspeed.step = torch.no_grad()(self.deepspeed.step)  # it gathers into views of weights
        self.accelerator.free_memory = lambda *kept: kept  # train() would have it forget what was prepared
        gc.freeze()  # Axolotl collects after every microbatch of dpo, a second each through all that was imported

    def go_on(self, start: int, after_step: Callable[[StepMetrics], bool]) -> None:
        """Take the steps from `start` (from 0) to the end, or until `after_step` returns True."""
        self.start = start
        self.add_callback(_AfterStep(self, after_step))
        self.train()

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.context.spec.optimizer, (model or self.model).named_parameters())
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Changes nothing: each step sets its own learning rate."""
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, lambda _: 1.0)
        return self.lr_scheduler

    def get_train_dataloader(self) -> Any:
        return DataLoader(Microbatches(self.context, self.start), batch_size=None)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        return self.model_wrapped, train_dataloader

    def _init_training_state(self, *args: Any) -> Any:
        found = super()._init_training_state(*args)
        self.state.global_step = self.start
        return found

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> float:
        """What the summed loss is divided by; ranks' gradients are averaged, not summed."""
        return self.context.step_weight(self.state.global_step) / self.context.world

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if not self.losses:
            self._begin_step()
        if self.is_deepspeed_enabled:  # before the forward pass, see `deepspeed.py`
            last = len(self.losses) + 1 == self.context.plan.accumulation
            self.deepspeed.set_gradient_accumulation_boundary(last)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        # Times the ranks, whose gradients are averaged.
        self.losses.append(loss.item() / self.context.world)
        return loss

    def _begin_step(self) -> None:
        """As in `loop.py`: dropout draws the same in a resumed run."""
        spec, step = self.context.spec, self.state.global_step
        torch.manual_seed(derived_seed(spec.training.seed, step, self.context.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(spec.optimizer, step, self.context.total_steps)

    def _clip_grad_norm(self, model: Any) -> float:
        if self.is_deepspeed_enabled:  # has clipped and moved already, or dropped what is not finite
            return float(self.deepspeed.get_global_grad_norm())
        return clip_gradients(list(model.parameters()), self.context.spec.optimizer.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called right before the optimiser moves: the last moment to refuse."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        tokens = self.context.train.num_tokens(self.context.step_sequences(self.state.global_step))
        sums = summed(torch.tensor([sum(self.losses), tokens], dtype=torch.float64), self.context.world)
        self.step_loss, self.step_norm, self.step_tokens = float(sums[0]), float(norm), int(sums[1])
        check_finite(self.context, self.state.global_step, self.step_loss, self.step_norm, self.losses)
        return norm

    def finished_step(self) -> StepMetrics:
        """The step that just ended; forgets its sums. The trainer has counted it already."""
        context, step = self.context, self.state.global_step - 1
        rate = learning_rate(context.spec.optimizer, step, context.total_steps)
        self.losses.clear()
        return StepMetrics(step + 1, self.step_loss, self.step_norm, rate, self.step_tokens)

    def summed_loss(self, input_ids: Tensor, position_ids: Tensor, targets: Tensor) -> Tensor:
        """Of one microbatch of the validation split, a scalar."""
        raise NotImplementedError


class SftTrainer(_Planned, AxolotlTrainer):
    """Axolotl's causal trainer. By its own count accumulation would change the loss: a mean of means."""

    def prepare(self, context: RankContext) -> None:
        self.model_accepts_loss_kwargs = True
        super().prepare(context)

    def summed_loss(self, input_ids: Tensor, position_ids: Tensor, targets: Tensor) -> Tensor:
        found = rows(input_ids, position_ids, targets)
        loss: Tensor = self.compute_loss(self.model_wrapped, found, num_items_in_batch=1.0)
        return loss


class DpoTrainer(_Planned, AxolotlDPOTrainer):
    """Axolotl's DPO trainer, which is TRL's. The reference is the base model: a second one, or adapters left out."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's is a mean over the microbatch's pairs, and then over microbatches; the last step may have fewer."""
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        return loss * (_num_pairs(inputs) * self.context.plan.accumulation / num_items_in_batch)

    def finished_step(self) -> StepMetrics:
        self._metrics["train"].clear()  # TRL's own, which nobody reads
        return super().finished_step()

    def summed_loss(self, input_ids: Tensor, position_ids: Tensor, targets: Tensor) -> Tensor:
        found = pairs(input_ids, position_ids, targets)
        loss: Tensor = super().compute_loss(self.model_wrapped, found) * _num_pairs(found)
        self._metrics["eval"].clear()
        return loss


def _num_pairs(inputs: dict[str, Tensor]) -> int:
    chosen = inputs["completion_mask"].chunk(2)[0]
    return int(chosen.any(dim=1).sum())


class Summed(nn.Module):
    """A trainer as `loop.mean_loss` takes a model: its forward pass is the summed loss."""

    def __init__(self, trainer: _Planned) -> None:
        super().__init__()
        self.model, self.trainer = trainer.model_wrapped, trainer

    def forward(self, input_ids: Tensor, position_ids: Tensor, targets: Tensor) -> Tensor:
        """See `_Planned.summed_loss`."""
        return self.trainer.summed_loss(input_ids, position_ids, targets)


class _AfterStep(TrainerCallback):
    """Tells the pipeline of each finished step, which publishes, and stops where it says so."""

    def __init__(self, trainer: _Planned, after_step: Callable[[StepMetrics], bool]) -> None:
        self.trainer, self.after_step = trainer, after_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop |= self.after_step(self.trainer.finished_step())
        return control

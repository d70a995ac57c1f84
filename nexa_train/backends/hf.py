"""transformers.Trainer with TRL's SFTTrainer; full tuning, LoRA and QLoRA by PEFT. One rank.

TRL runs the steps; which sequences, which learning rate and what is saved come from the plan, as on every
backend. Trainer's own checkpoints are not used: they are pickles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from nexa_train.backends.base import RankContext, Staged, StepMetrics
from nexa_train.cache import cache_folder
from nexa_train.checkpoint import Saved, TorchState, adapter_files, model_files
from nexa_train.config.spec import FullTuning
from nexa_train.errors import NonFiniteLossError
from nexa_train.loop import derived_seed, mean_loss
from nexa_train.losses import CausalLoss
from nexa_train.models.build import build_model, lora_config
from nexa_train.optim import learning_rate, make_optimizer

NEVER_CLIP = 1e30
"""Trainer measures the gradient's norm only where it clips."""


class HfBackend:
    """See `base.Backend`."""

    def __init__(self, context: RankContext) -> None:
        self.context = context
        self.lora: Any = None
        self.done = 0

    def setup(self) -> None:
        """Base model, adapters, optimiser; the Trainer itself is made when training starts."""
        spec = self.context.spec
        self.causal = build_model(spec, self.context.located, self.context.tokenizer)
        self.model = self.causal
        if not isinstance(spec.tuning, FullTuning):
            self.lora = lora_config(spec.tuning, self.causal)
            self.model = get_peft_model(self.causal, self.lora)
        if torch.cuda.is_available() and spec.tuning.type != "qlora":
            self.model.to("cuda")
        self.optimizer = make_optimizer(spec.optimizer, self.causal.named_parameters())
        self.torch_state = TorchState(
            self.causal,
            self.optimizer,
            adapter=self.lora is not None,
            rank=self.context.rank,
            world=self.context.world,
        )

    def restore(self, saved: Saved) -> None:
        """See `base.Backend.restore`."""
        self.done = saved.step
        self.torch_state.restore(saved)

    def validate(self) -> float | None:
        """See `loop.mean_loss`."""
        bf16 = self.context.spec.training.precision == "bf16"
        return mean_loss(CausalLoss(self.causal, bf16=bf16), self.context.validation, self.context)

    def train(self, after_step: Callable[[StepMetrics], bool]) -> None:
        """Let TRL take the remaining steps."""
        trainer = _Trainer(self, after_step)
        trainer.remove_callback(PrinterCallback)  # prints a dictionary at the end; progress is told elsewhere
        trainer.train()

    def stage(self) -> Staged:
        """See `base.Backend.stage`."""
        return self.torch_state.stage(self.done)

    def describe(self) -> dict[str, bytes]:
        """See `base.Backend.describe`."""
        return model_files(self.causal) if self.lora is None else adapter_files(self.lora, self.context.located)


class _Trainer(SFTTrainer):
    """TRL's trainer, fed in the plan's order from the step where the run stands."""

    def __init__(self, backend: HfBackend, after_step: Callable[[StepMetrics], bool]) -> None:
        context = backend.context
        self.backend, self.context, self.start = backend, context, backend.done
        self.step_loss, self.step_norm, self.microbatches_done = 0.0, 0.0, 0
        spec = context.spec.optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(
            backend.optimizer,
            lambda step: learning_rate(spec, step + self.start, context.total_steps) / spec.lr,
        )
        super().__init__(
            model=backend.model,
            args=sft_config(context, steps=context.total_steps - self.start),
            train_dataset=_rows(context),
            processing_class=_pad_token(AutoTokenizer.from_pretrained(context.located.folder, local_files_only=True)),
            optimizers=(backend.optimizer, schedule),
            callbacks=[_AfterStep(self, after_step)],
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> list[int]:
        order, batch = self.context.order, self.context.plan.global_batch
        found = (order.at(position) for position in range(self.start * batch, order.total))
        return [sequence for sequence in found if sequence is not None]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.microbatches_done == 0:
            # As in `loop.py`: dropout draws the same in a resumed run.
            step = self.start + self.state.global_step
            torch.manual_seed(derived_seed(self.context.spec.training.seed, step, self.context.rank))
        self.microbatches_done += 1
        loss: Tensor = super().training_step(*args, **kwargs)
        # Already divided by the target tokens of the whole step, so microbatches add up.
        self.step_loss += loss.item()
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called right before the optimiser moves: the last moment to refuse."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.step_norm = float(norm)
        if not (math.isfinite(self.step_loss) and math.isfinite(self.step_norm)):
            step = self.start + self.state.global_step
            raise NonFiniteLossError(
                f"step {step + 1}, rank {self.context.rank}: loss {self.step_loss}, gradient norm {self.step_norm}; "
                f"the optimiser did not move. The step's sequences were {self.context.step_sequences(step)}; "
                "look at them, or lower optimizer.lr"
            )
        return norm

    def finished_step(self, step: int) -> StepMetrics:
        """The step that just ended (from 0); forgets its sums."""
        spec, total = self.context.spec.optimizer, self.context.total_steps
        tokens = self.context.train.num_tokens(self.context.step_sequences(step))
        metrics = StepMetrics(step + 1, self.step_loss, self.step_norm, learning_rate(spec, step, total), tokens)
        self.step_loss, self.microbatches_done = 0.0, 0
        self.backend.done = metrics.step
        return metrics


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: _Trainer, after_step: Callable[[StepMetrics], bool]) -> None:
        self.trainer, self.after_step = trainer, after_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        """Trainer counts its own steps from 1 and has counted this one."""
        metrics = self.trainer.finished_step(self.trainer.start + state.global_step - 1)
        control.should_training_stop |= self.after_step(metrics)
        return control


def sft_config(context: RankContext, *, steps: int) -> SFTConfig:
    """What TRL is given: everything that the job says, and nothing of its own defaults that would change it."""
    spec = context.spec
    return SFTConfig(
        output_dir=str(cache_folder("hf")),  # must be named; nothing is saved by Trainer
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        seed=spec.training.seed,
        max_steps=steps,
        per_device_train_batch_size=context.plan.microbatch,
        gradient_accumulation_steps=context.plan.accumulation,
        max_grad_norm=spec.optimizer.max_grad_norm or NEVER_CLIP,
        activation_checkpointing=spec.training.activation_checkpointing,
        bf16=spec.training.precision == "bf16",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        loss_type="nll",
    )


def _rows(context: RankContext) -> Dataset:
    """Every sequence once; the sampler says in which order."""
    split = context.train
    pairs = [split.labelled(sequence) for sequence in range(split.num_sequences)]
    return Dataset.from_dict({"input_ids": [ids for ids, _ in pairs], "labels": [labels for _, labels in pairs]})


def _pad_token(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

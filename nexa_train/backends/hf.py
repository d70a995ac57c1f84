"""transformers.Trainer with TRL's SFTTrainer and DPOTrainer; full tuning, LoRA and QLoRA by PEFT; DDP over ranks.

TRL runs the steps; which sequences, which learning rate and what is saved come from the plan, as on every
backend. Trainer's own checkpoints are not used: they are pickles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from nexa_train.backend_config.trl import trl_config
from nexa_train.backends.base import StepMetrics
from nexa_train.backends.common import TorchBackend
from nexa_train.config.spec import DpoMethod, FullTuning
from nexa_train.loop import check_finite, clip_gradients, derived_seed, mean_loss, summed
from nexa_train.losses import IGNORE, make_loss
from nexa_train.models.attention import sample_edges
from nexa_train.models.build import build_model, build_reference, lora_config
from nexa_train.optim import learning_rate, make_optimizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = dict[str, Any]
"""What a model is called with: tensors, and how long samples are."""


class HfBackend(TorchBackend):
    """See `base.Backend`."""

    def setup(self) -> None:
        """Base model, adapters, optimiser; the Trainer itself is made when training starts."""
        spec, located, tokenizer = self.context.spec, self.context.located, self.context.tokenizer
        self.causal = build_model(spec, located, tokenizer)
        self.model: Any = self.causal
        if not isinstance(spec.tuning, FullTuning):
            self.lora = lora_config(spec.tuning, self.causal)
            self.model = get_peft_model(self.causal, self.lora)
        self.reference: PreTrainedModel | None = build_reference(spec, located, tokenizer)
        if torch.cuda.is_available() and spec.tuning.type != "qlora":
            self.model.to("cuda")
            if self.reference is not None:
                self.reference.to("cuda")  # TRL would, but validation comes before
        self.optimizer = make_optimizer(spec.optimizer, self.causal.named_parameters())
        self.state = self.torch_state(self.optimizer)

    def validate(self) -> float | None:
        """See `loop.mean_loss`."""
        spec, context = self.context.spec, self.context
        module = make_loss(spec.method, self.causal, self.reference, bf16=spec.training.precision == "bf16")
        if isinstance(spec.method, DpoMethod):
            # TRL takes preferences a sample a row, so this model's attention is transformers' own. All kinds of it
            # keep the samples of a pair apart where they are all there is: flash does not look into further rows.
            context = replace(context, plan=replace(context.plan, microbatch=1))
        return mean_loss(module, context.validation, context)

    def train(self, after_step: Callable[[StepMetrics], bool]) -> None:
        """Let TRL take the remaining steps."""
        if self.done < self.context.total_steps:
            kind = _Preferring if isinstance(self.context.spec.method, DpoMethod) else _Tuning
            trainer = kind(self, after_step)
            trainer.remove_callback(PrinterCallback)  # prints a dictionary at the end; progress is told elsewhere
            trainer.train()


class _Planned(Trainer):
    """What both of TRL's trainers are taught: the plan's microbatches, from the step where the run stands, and the
    plan's loss, summed over all ranks and divided by the weight of the step."""

    loss_is_scaled_for_ga = True
    columns: tuple[str, ...]
    """Of a row, as TRL looks for them; it looks at one and is given microbatches after that."""

    def __init__(self, backend: HfBackend, after_step: Callable[[StepMetrics], bool], **given: Any) -> None:
        context = backend.context
        self.backend, self.context, self.start = backend, context, backend.done
        self.step_loss, self.step_norm, self.step_tokens = 0.0, 0.0, 0
        self.losses: list[float] = []  # this rank's part of the step's, microbatch by microbatch
        spec = context.spec.optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(
            backend.optimizer,
            lambda step: learning_rate(spec, step + self.start, context.total_steps) / spec.lr,
        )
        # TRL casts the adapters of a quantised model to bfloat16, whatever the job says and a checkpoint held.
        self.trained = [parameter for parameter in backend.causal.parameters() if parameter.requires_grad]
        before = [parameter.data for parameter in self.trained]
        super().__init__(
            model=backend.model,
            train_dataset=Dataset.from_dict({column: [[0]] for column in self.columns}),
            processing_class=_pad_token(AutoTokenizer.from_pretrained(context.located.folder, local_files_only=True)),
            optimizers=(backend.optimizer, schedule),
            callbacks=[_AfterStep(self, backend.counted(after_step))],
            **given,
        )
        for parameter, data in zip(self.trained, before, strict=True):
            parameter.data = data

    def collate(self, sequences: list[int]) -> Inputs:
        """One microbatch, perhaps an empty one, as this trainer's loss reads it."""
        raise NotImplementedError

    def get_train_dataloader(self) -> DataLoader[Inputs]:
        """This rank's own microbatches, so that accelerate must not deal them out again."""
        return DataLoader(_Microbatches(self), batch_size=None, pin_memory=self.args.dataloader_pin_memory)

    def _get_num_items_in_batch(self, batch_samples: list[Inputs], device: torch.device) -> Tensor:
        return torch.tensor(self.context.step_weight(self.state.global_step), device=device)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.losses:
            # As in `loop.py`: dropout draws the same in a resumed run.
            torch.manual_seed(derived_seed(self.context.spec.training.seed, self.state.global_step, self.context.rank))
        loss: Tensor = super().training_step(*args, **kwargs)
        # Times the ranks, because DDP averages over them.
        self.losses.append(loss.item() / self.context.world)
        return loss

    def _clip_grad_norm(self, model: Any) -> None:
        """Not here, where it is only called if gradients are clipped."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """Called right before the optimiser moves: the moment to clip, and the last one to refuse."""
        norm = clip_gradients(self.trained, self.context.spec.optimizer.max_grad_norm)
        tokens = self.context.train.num_tokens(self.context.step_sequences(self.state.global_step))
        sums = summed(torch.tensor([sum(self.losses), tokens], dtype=torch.float64), self.context.world)
        self.step_loss, self.step_norm, self.step_tokens = float(sums[0]), norm, int(sums[1])
        check_finite(self.context, self.state.global_step, self.step_loss, self.step_norm, self.losses)
        return norm

    def finished_step(self) -> StepMetrics:
        """The step that just ended, which Trainer has counted; forgets its sums."""
        step, context = self.state.global_step - 1, self.context
        rate = learning_rate(context.spec.optimizer, step, context.total_steps)
        metrics = StepMetrics(step + 1, self.step_loss, self.step_norm, rate, self.step_tokens)
        self.losses.clear()
        self._metrics["train"].clear()  # TRL's own, which nobody would ever fetch
        return metrics


class _Tuning(_Planned, SFTTrainer):
    """Supervised fine-tuning on rows of samples, which our attention keeps apart; there is no padding."""

    columns = ("input_ids", "labels")

    def __init__(self, backend: HfBackend, after_step: Callable[[StepMetrics], bool]) -> None:
        args = SFTConfig(**trl_config(backend.context.spec, backend.context.plan))
        super().__init__(backend, after_step, args=args)

    def collate(self, sequences: list[int]) -> Inputs:
        batch = self.context.train.batch(sequences)
        edges = sample_edges(batch.position_ids)
        return {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "shift_labels": batch.targets,
            "edges": edges,
            "lengths": tuple(edges.diff().tolist()),
        }


class _Preferring(_Planned, DPOTrainer):
    """Preferences. The reference is the base model: whole and frozen, or the model without its adapters."""

    columns = ("prompt_ids", "chosen_ids", "rejected_ids")

    def __init__(self, backend: HfBackend, after_step: Callable[[StepMetrics], bool]) -> None:
        args = DPOConfig(**trl_config(backend.context.spec, backend.context.plan))
        super().__init__(backend, after_step, args=args, ref_model=backend.reference)
        if backend.lora is not None:
            # A copy of the adapters as they stand, which in a resumed run are trained ones.
            self.model.delete_adapter("ref")

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def collate(self, sequences: list[int]) -> Inputs:
        """All chosen ones, then all rejected ones.

        As many pairs on every rank, because TRL gathers what it measures of each: where the last step has fewer,
        pairs that say nothing.
        """
        nothing = (torch.zeros(2, dtype=torch.int64), torch.full((2,), IGNORE))
        pairs = [self.context.train.labelled_samples(sequence) for sequence in sequences]
        pairs += [[nothing, nothing]] * (self.context.plan.microbatch - len(pairs))
        samples = [pair[side] for side in (0, 1) for pair in pairs]
        ids = pad_sequence([ids for ids, _ in samples], batch_first=True)
        labels = pad_sequence([labels for _, labels in samples], batch_first=True, padding_value=IGNORE)
        real = torch.arange(ids.shape[1]) < torch.tensor([len(ids) for ids, _ in samples])[:, None]
        return {"input_ids": ids, "attention_mask": real.long(), "completion_mask": (labels != IGNORE).long()}

    def compute_loss(self, model: Any, inputs: Inputs, *_: Any, num_items_in_batch: Any = None, **__: Any) -> Tensor:
        """TRL's mean over the pairs of this microbatch, as its part of the mean over all pairs of the step."""
        pairs = len(inputs["input_ids"]) // 2
        silent = pairs - inputs["completion_mask"].any(dim=1).sum() // 2
        mean: Tensor = super().compute_loss(model, inputs)
        # A pair that says nothing has a loss of log 2 and no gradient.
        part: Tensor = (mean * pairs - silent * math.log(2)) * self.context.world / num_items_in_batch
        return part


class _Microbatches(IterableDataset[Inputs]):
    """This rank's part of the remaining steps, microbatch by microbatch; none is held."""

    def __init__(self, trainer: _Planned) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[Inputs]:
        context = self.trainer.context
        for step in range(self.trainer.start, context.total_steps):
            yield from map(self.trainer.collate, context.microbatches(step))


class _AfterStep(TrainerCallback):
    def __init__(self, trainer: _Planned, after_step: Callable[[StepMetrics], bool]) -> None:
        self.trainer, self.after_step = trainer, after_step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Trainer counts from the step where the run stands."""
        state.global_step = self.trainer.start

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop |= self.after_step(self.trainer.finished_step())
        return control


def _pad_token(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

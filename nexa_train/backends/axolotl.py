"""Axolotl, in an environment of its own (`make axolotl-env`, or the image trainer_image/heavy).

Its loader builds model and adapters from the configuration of `backend_config/axolotl.py`, its trainers
(`axolotl_trainer.py`) take the steps. Its own checkpoints are not used: they are pickles.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import TrainDatasetMeta
from axolotl.train import setup_model_and_trainer
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoTokenizer

from nexa_train.backend_config.axolotl import axolotl_config
from nexa_train.backends.axolotl_trainer import Microbatches, Summed
from nexa_train.backends.base import StepMetrics
from nexa_train.backends.common import TorchBackend
from nexa_train.backends.deepspeed import ZeroState, library
from nexa_train.checkpoint import model_files, trained_parameters
from nexa_train.config.spec import FullTuning
from nexa_train.errors import ConfigError
from nexa_train.loop import mean_loss
from nexa_train.models.build import build_model, check_targets
from nexa_train.models.pretrained import able_attention, check_flash, keep_trainable


class AxolotlBackend(TorchBackend):
    """See `base.Backend`."""

    def setup(self) -> None:
        """Have Axolotl check its configuration, then build model and trainer; the optimiser is made now, too."""
        check_flash(self.context.spec)
        if self.context.spec.axolotl.sharding == "deepspeed":
            library()
        self.folder = TemporaryDirectory(prefix="nexa-axolotl-")
        cfg = self._checked_config(Path(self.folder.name))
        torch.manual_seed(self.context.spec.training.seed)  # fresh adapters
        data = TrainDatasetMeta(Microbatches(self.context, 0), None, self.context.total_steps)
        try:
            self.trainer, *_ = setup_model_and_trainer(cfg, data)
        except ValueError as exc:
            if "arget modules" not in str(exc):
                raise
            raise ConfigError(f"tuning.target_modules: {exc}") from exc  # PEFT, where none of them matches
        keep_trainable(self.trainer.model)
        self.lora = _peft_config(self.trainer.model)
        self.causal = self.trainer.model if self.lora is None else self.trainer.model.get_base_model()
        if not isinstance(tuning := self.context.spec.tuning, FullTuning):
            check_targets(tuning, self.causal)
        shapes = {name: tuple(weight.shape) for name, weight in self._trained().items()}
        self.trainer.prepare(self.context)
        if self.trainer.is_deepspeed_enabled:
            self.state = ZeroState(self.trainer.deepspeed, self._trained(), shapes, self.context.rank)
        else:
            self.state = self.torch_state(self.trainer.optimizer.optimizer)

    def validate(self) -> float | None:
        """See `loop.mean_loss`."""
        return mean_loss(Summed(self.trainer), self.context.validation, self.context, padded=True)

    def train(self, after_step: Callable[[StepMetrics], bool]) -> None:
        """Let Axolotl's trainer take the remaining steps."""
        self.trainer.go_on(self.done, self.counted(after_step))

    def _trained(self) -> dict[str, nn.Parameter]:
        return dict(trained_parameters(self.causal, adapter=self.lora is not None))

    def _checked_config(self, folder: Path) -> Any:
        """Our configuration as Axolotl takes it: checked, with its defaults.

        Raises:
            ConfigError: with all that Axolotl has against it.
        """
        spec, plan = self.context.spec, self.context.plan
        base = self._base_model(folder)
        end = AutoTokenizer.from_pretrained(base, local_files_only=True).eos_token
        values = axolotl_config(spec, plan, base_model=str(base), padding=end, output=str(folder / "output"))
        values["attn_implementation"] = able_attention(values["attn_implementation"], spec, base)
        if values.get("deepspeed"):
            # As a file of ours, for it would leave one of its own behind.
            (folder / "deepspeed.json").write_text(json.dumps(values["deepspeed"]), encoding="utf-8")
            values["deepspeed"] = str(folder / "deepspeed.json")
        file = folder / "axolotl.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        try:
            cfg = load_cfg(str(file))
        except ValidationError as exc:
            raise ConfigError(f"backend: axolotl refuses what this job makes of it: {_complaints(exc)}") from exc
        cfg.torch_dtype = torch.float32  # weights; with bf16 the products run in it, as on every backend
        if not torch.cuda.is_available():
            cfg.device_map = None  # with several ranks it names a GPU
        return cfg

    def _base_model(self, folder: Path) -> Path:
        """Where the weights are; fresh ones are written first, the same on every rank."""
        located = self.context.located
        if located.scratch is None:
            return located.folder
        made = folder / "base"
        shutil.copytree(located.folder, made)  # the tokenizer's
        model = build_model(self.context.spec, located, self.context.tokenizer)
        for name, content in model_files(model).items():
            (made / name).write_bytes(content)
        # Not `save_pretrained`, which writes on one rank alone.
        save_file({name: weight.data for name, weight in model.named_parameters()}, made / "model.safetensors")
        return made


def _complaints(exc: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, error['loc'])) or 'together'}: {error['msg']}" for error in exc.errors())


def _peft_config(model: Any) -> Any:
    """Of the adapters that are trained; None: all weights are."""
    return model.peft_config["default"] if hasattr(model, "peft_config") else None

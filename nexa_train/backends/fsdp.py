"""Native PyTorch: the loop of `loop.py` over FSDP2 (`fully_shard`, Zhao et al. 2023); full tuning and LoRA.

With one rank nothing is sharded and no process group is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from nexa_train.backends.base import StepMetrics
from nexa_train.backends.common import TorchBackend
from nexa_train.loop import Engine
from nexa_train.losses import CausalLoss, PreferenceLoss, make_loss
from nexa_train.models.build import build_reference
from nexa_train.optim import make_optimizer


class FsdpBackend(TorchBackend):
    """See `base.Backend`."""

    def setup(self) -> None:
        """Build on every rank from the same seed, then keep only this rank's shards."""
        spec = self.context.spec
        self.build_native()
        reference = build_reference(spec, self.context.located, self.context.tokenizer)
        sharded, bf16 = self.context.world > 1, spec.training.precision == "bf16"
        module = make_loss(spec.method, self.causal, reference, bf16=bf16 and not sharded)
        if sharded:
            self._shard(module, bf16=bf16)  # moves a layer at a time: the whole model never stands on one GPU
        else:
            module.to(_device())
        self.optimizer = make_optimizer(spec.optimizer, module.named_parameters())
        self.state = self.torch_state(self.optimizer)
        self.engine = Engine(self.context, module, self.optimizer)

    def validate(self) -> float | None:
        """See `Engine.validate`."""
        loss = self.engine.validate()
        if isinstance(self.engine.module, FSDPModule):
            # The root stays whole after a pass without a backward one; its weights' moments belong to the shards.
            self.engine.module.reshard()
        return loss

    def train(self, after_step: Callable[[StepMetrics], bool]) -> None:
        """See `Engine.train`."""
        self.engine.train(self.done, self.counted(after_step))

    def _shard(self, module: CausalLoss | PreferenceLoss, *, bf16: bool) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32 if bf16 else None
        )
        if isinstance(module, PreferenceLoss) and module.reference is not None:
            _shard_layers(module.reference.causal, policy)
            fully_shard(module.reference, mp_policy=policy)
        _shard_layers(self.causal, policy)
        fully_shard(module, mp_policy=policy)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                # The loss is divided by the step's target tokens already: gradients are summed, not averaged.
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)  # gloo has no other; without it torch asks for one


def _shard_layers(causal: PreTrainedModel, policy: MixedPrecisionPolicy) -> None:
    for layer in causal.base_model.layers:
        fully_shard(layer, mp_policy=policy)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

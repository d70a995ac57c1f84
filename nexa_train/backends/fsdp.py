"""Native PyTorch: the loop of `loop.py` over FSDP2 (`fully_sharded.py`); full tuning and LoRA.

With one rank nothing is sharded and no process group is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nexa_train.backends.base import StepMetrics
from nexa_train.backends.common import TorchBackend
from nexa_train.loop import Engine
from nexa_train.losses import make_loss
from nexa_train.models.build import build_reference
from nexa_train.optim import make_optimizer


class FsdpBackend(TorchBackend):
    """See `base.Backend`."""

    def setup(self) -> None:
        """Build on every rank from the same seed, then keep only this rank's shards."""
        spec = self.context.spec
        self.build_native()
        reference = build_reference(spec, self.context.located, self.context.tokenizer)
        bf16 = spec.training.precision == "bf16"
        module = make_loss(spec.method, self.causal, reference, bf16=bf16 and not self._sharded)
        if self._sharded:
            from nexa_train.backends.fully_sharded import shard  # noqa: PLC0415 - one rank need not wait for it

            shard(module, self.causal, bf16=bf16)  # moves a layer at a time: the whole never stands on one GPU
        else:
            module.to(_device())
        self.optimizer = make_optimizer(spec.optimizer, module.named_parameters())
        self.state = self.torch_state(self.optimizer)
        self.engine = Engine(self.context, module, self.optimizer)

    def validate(self) -> float | None:
        """See `Engine.validate`."""
        loss = self.engine.validate()
        if self._sharded:
            from nexa_train.backends.fully_sharded import reshard  # noqa: PLC0415 - as in `setup`

            reshard(self.engine.module)
        return loss

    def train(self, after_step: Callable[[StepMetrics], bool]) -> None:
        """See `Engine.train`."""
        self.engine.train(self.done, self.counted(after_step))

    @property
    def _sharded(self) -> bool:
        return self.context.world > 1


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

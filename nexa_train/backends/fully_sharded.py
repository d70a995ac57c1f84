"""FSDP2 (`fully_shard`, Zhao et al. 2023) around a loss module: what ranks share out, and how gradients cross.

Imported by `fsdp.py` where there are several ranks: it takes a second, which one rank need not wait.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from nexa_train.losses import CausalLoss, PreferenceLoss
from nexa_train.models.build import Causal


def shard(module: CausalLoss | PreferenceLoss, causal: Causal, *, bf16: bool) -> None:
    """Keep of each weight this rank's rows alone; `causal` is the trained model within."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None,
        reduce_dtype=torch.float32 if bf16 else None,
        cast_forward_inputs=False,  # the embedding is in bf16 already, and rotary angles are to stay in float32
    )
    if isinstance(module, PreferenceLoss) and module.reference is not None:
        _shard_layers(module.reference.causal, policy)
        fully_shard(module.reference, mp_policy=policy)
    _shard_layers(causal, policy)
    fully_shard(module, mp_policy=policy)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            # The loss is divided by the step's target tokens already: gradients are summed, not averaged.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other; without it torch asks for one


def reshard(module: nn.Module) -> None:
    """After a pass without a backward one the root stays whole; its weights' moments belong to the shards."""
    assert isinstance(module, FSDPModule)  # noqa: S101 - `shard` made it one
    module.reshard()


def _shard_layers(causal: Causal, policy: MixedPrecisionPolicy) -> None:
    for layer in causal.base_model.layers:
        fully_shard(layer, mp_policy=policy)

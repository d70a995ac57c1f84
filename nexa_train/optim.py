"""The optimiser and its learning rate, the same objects for every backend that runs in torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from inspect import unwrap

import torch
from torch import nn

from nexa_train.config.spec import OptimizerSpec

WSD_DECAY_SHARE = 0.1
"""Part of the steps over which `wsd` decays (Hu et al. 2024, MiniCPM)."""


class AdamW(torch.optim.AdamW):
    """torch's own, which need not import its compiler.

    torch wraps these methods to keep its compiler out of them, and to know how it would it imports it: seconds of every
    rank's start. What was wrapped is called here, without gradients, as the wrapper would have it.
    """

    add_param_group = unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = unwrap(torch.optim.AdamW.zero_grad)
    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def learning_rate(spec: OptimizerSpec, step: int, total_steps: int) -> float:
    """The learning rate of one step; steps count from 0. Pure.

    Warm-up is linear over `warmup_steps` for every scheduler. Afterwards `constant` stays; `linear` and `cosine`
    (= `cosine_warmup`) fall towards the 0 that the step after the last would have; `wsd` stays, and falls
    linearly over its last tenth.
    """
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    remaining = max(1, total_steps - spec.warmup_steps)
    done = min(1.0, (step - spec.warmup_steps) / remaining)
    if spec.scheduler == "constant":
        factor = 1.0
    elif spec.scheduler == "linear":
        factor = 1.0 - done
    elif spec.scheduler == "wsd":
        factor = min(1.0, (1.0 - done) / WSD_DECAY_SHARE)
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * done))
    return spec.lr * factor


def make_optimizer(
    spec: OptimizerSpec, named: Iterable[tuple[str, nn.Parameter]], *, adamw: type[torch.optim.AdamW] = AdamW
) -> torch.optim.Optimizer:
    """torch's AdamW or Adafactor over the trainable parameters; no decay on vectors (norms, biases).

    Adafactor takes the learning rate as relative to the size of a weight: it moves by at most that part of its
    root mean square (Shazeer & Stern 2018, section 8).

    Args:
        adamw: torch's very class for a library that takes no other.
    """
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups = [
        {"params": [p for _, p in trained if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for _, p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    if spec.name == "adafactor":
        return torch.optim.Adafactor(filled, lr=spec.lr)
    beta1, beta2 = spec.betas
    return adamw(filled, lr=spec.lr, betas=(beta1, beta2), eps=spec.eps, fused=True)

"""Job -> in words, the objects that Nexa makes and hands to a library beside its configuration. Pure."""

from __future__ import annotations

from typing import Any

from nexa_train.backend_config.adapters import lora_arguments
from nexa_train.config.spec import FullTuning, JobSpec


def made_by_nexa(spec: JobSpec) -> dict[str, Any]:
    """`optimizer` and `lr_scheduler`, which are `optim.py`'s, and `peft_config`: the arguments of `peft.LoraConfig`."""
    chosen = spec.optimizer
    moments = {} if chosen.name == "adafactor" else {"betas": list(chosen.betas), "eps": chosen.eps}
    decay = {"matrices": chosen.weight_decay, "vectors": 0.0}
    adapters = {} if isinstance(spec.tuning, FullTuning) else {"peft_config": lora_arguments(spec.tuning)}
    return {
        "optimizer": {"name": chosen.name, "lr": chosen.lr, **moments, "weight_decay": decay},
        "lr_scheduler": {"name": chosen.scheduler, "warmup_steps": chosen.warmup_steps},
        **adapters,
    }

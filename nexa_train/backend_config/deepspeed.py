"""Job and plan -> the configuration that DeepSpeed is given. Pure.

What it does not say is not DeepSpeed's to decide: optimiser, learning rates, activation checkpointing and adapters are
the trainer's own, and checkpoints are Nexa's.
"""

from __future__ import annotations

from typing import Any

from nexa_train.backend_config.objects import made_by_nexa
from nexa_train.config.spec import JobSpec
from nexa_train.plan import TrainPlan

BUCKET_ELEMENTS = 1 << 23
"""Gradients that cross ranks at once, 32 MiB in float32, about what torch's DDP takes. A buffer of that size is made
at every microbatch, however small the model: of DeepSpeed's own 5e8 elements it would be 2 GB."""


def shown_config(spec: JobSpec, plan: TrainPlan) -> dict[str, Any]:
    """All that DeepSpeed is given, for people: `deepspeed_config`, and in words the objects beside it."""
    return {**deepspeed_config(spec, plan), **made_by_nexa(spec)}


def deepspeed_config(spec: JobSpec, plan: TrainPlan) -> dict[str, Any]:
    """What `deepspeed.initialize` is given (https://www.deepspeed.ai/docs/config-json)."""
    return {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.microbatch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": spec.optimizer.max_grad_norm,  # 0: never, to both
        "zero_optimization": {
            "stage": spec.deepspeed.zero_stage,
            "reduce_bucket_size": BUCKET_ELEMENTS,
            **_offload(spec),
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also where it runs on the CPU
        # Gradients cross ranks and add up in float32, as on fsdp.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        # A gradient that is not finite discards the step at every stage; by default not so in bf16.
        "bf16": {"enabled": spec.training.precision == "bf16", "check_grad_overflow": True},
    }


def _offload(spec: JobSpec) -> dict[str, Any]:
    host = {"device": "cpu", "pin_memory": spec.cluster.gpus_per_node > 0}
    moved = {"none": (), "optimizer": ("offload_optimizer",), "all": ("offload_optimizer", "offload_param")}
    return {part: dict(host) for part in moved[spec.deepspeed.offload]}

"""Job and plan -> the arguments of TRL's configuration, and what stands beside it. Pure.

`backends/hf.py` hands over the arguments as they are, and the rest as the objects that it describes.
"""

from __future__ import annotations

from typing import Any

from nexa_train.backend_config.adapters import quantization_arguments
from nexa_train.backend_config.objects import made_by_nexa
from nexa_train.config.spec import DpoMethod, JobSpec, QloraTuning
from nexa_train.plan import TrainPlan


def hf_config(spec: JobSpec, plan: TrainPlan) -> dict[str, Any]:
    """All that TRL and PEFT are given, for people: `trl_config`, and in words what `backends/hf.py` makes objects of.

    `quantization_config` has the arguments of `transformers.BitsAndBytesConfig`; see `made_by_nexa`, too.
    """
    return {**trl_config(spec, plan), **made_by_nexa(spec), **_quantization(spec, plan)}


def trl_config(spec: JobSpec, plan: TrainPlan) -> dict[str, Any]:
    """Arguments of `trl.SFTConfig`, or for method dpo of `trl.DPOConfig`.

    All that the job says, and nothing of TRL's defaults that would change it. Model, optimiser, learning rates
    and microbatches (packed or not, cut to length) are handed over as objects; see `hf_config`. `max_steps` is None
    until the data is prepared, where the job counts epochs.
    """
    gpu = spec.cluster.gpus_per_node > 0
    return {
        "output_dir": ".",  # must be named; Trainer's own checkpoints, which are pickles, are never written
        "save_strategy": "no",
        "logging_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not gpu,
        "seed": spec.training.seed,
        "max_steps": plan.total_steps,
        "max_length": None,
        "per_device_train_batch_size": plan.microbatch,
        "gradient_accumulation_steps": plan.accumulation,
        "average_tokens_across_devices": True,
        "max_grad_norm": spec.optimizer.max_grad_norm,
        "bf16": plan.precision == "bf16",
        "activation_checkpointing": spec.training.activation_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        # Without it DDP regroups gradients after its first step, and from three ranks on a resumed run would add
        # them up in another order.
        "ddp_find_unused_parameters": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": gpu,
        **_method(spec),
    }


def _method(spec: JobSpec) -> dict[str, Any]:
    if isinstance(spec.method, DpoMethod):
        return {"loss_type": ["sigmoid"], "beta": spec.method.beta, "disable_dropout": False}
    return {"loss_type": "nll", "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}


def _quantization(spec: JobSpec, plan: TrainPlan) -> dict[str, Any]:
    if not isinstance(spec.tuning, QloraTuning):
        return {}
    return {"quantization_config": quantization_arguments(spec.tuning, precision=plan.precision)}

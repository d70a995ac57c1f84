"""Job and plan -> the configuration that Axolotl is given. Pure.

Axolotl carries the training: its loader builds model and adapters, its trainer takes the steps. What it must not
decide is fixed here, or left to Nexa as on every backend: which sequences, in which order and with which masks
(the prepared data set), the learning rate of each step, validation, and what is saved.
"""

from __future__ import annotations

from typing import Any

from nexa_train.backend_config.deepspeed import deepspeed_config
from nexa_train.config.spec import FullTuning, JobSpec, QloraTuning
from nexa_train.errors import ConfigError
from nexa_train.plan import TrainPlan

VERSION = "0.19.0"
"""Of Axolotl, whose names these are."""

TRAINERS = {
    "sft": "nexa_train.backends.axolotl_trainer.SftTrainer",
    "dpo": "nexa_train.backends.axolotl_trainer.DpoTrainer",
}
"""Axolotl's own trainers, fed by the plan."""

NEVER_CLIP = 1e30
"""The trainer measures the gradient's norm only where it clips."""

_ATTENTION = {"auto": "sdpa", "sdpa": "sdpa", "eager": "eager", "flash": "flash_attention_2"}
_SCHEDULERS = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_warmup": "cosine",
    "wsd": "warmup_stable_decay",
}


def environment(spec: JobSpec) -> dict[str, str]:
    """Variables that Axolotl and the libraries beneath it read when they are imported; none for other backends."""
    if spec.backend != "axolotl":
        return {}
    # It reports to its makers unless told; and bitsandbytes looks for kernels on the hub.
    own = {"AXOLOTL_DO_NOT_TRACK": "1", "AXOLOTL_LOG_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1"}
    return own if spec.cluster.gpus_per_node else {**own, "ACCELERATE_USE_CPU": "true"}


def axolotl_config(
    spec: JobSpec,
    plan: TrainPlan,
    *,
    base_model: str | None = None,
    padding: str = "(the end token of the model)",
    output: str = "output",
) -> dict[str, Any]:
    """What Axolotl is given. Beside it weights are loaded in float32, and on a CPU without a device map.

    Args:
        base_model: folder of weights and tokenizer; None: not located yet, as the job names it.
        padding: the end token, as the tokenizer writes it.
        output: folder for what Axolotl insists on writing; nothing of it is kept.

    Raises:
        ConfigError: Axolotl has no way to say what the job asks for.
    """
    return {
        **_model(spec, plan, base_model or spec.model.name),
        "special_tokens": {"pad_token": padding},
        **_data(spec),
        **_tuning(spec),
        **_steps(spec, plan),
        **_optimizer(spec),
        **_precision(spec),
        **_sharding(spec, plan),
        **_left_to_nexa(output),
    }


def _model(spec: JobSpec, plan: TrainPlan, base_model: str) -> dict[str, Any]:
    if spec.model.attn == "flash" and spec.data.packing and plan.microbatch > 1:
        # transformers 5, modeling_flash_attention_utils.py: packed samples are looked for in a batch of one row.
        raise ConfigError(
            f"model.attn: flash on backend axolotl keeps packed samples apart in microbatches of one sequence alone, "
            f"not of {plan.microbatch}; set training.microbatch_size_per_gpu 1, or model.attn sdpa"
        )
    return {
        "base_model": base_model,
        "model_type": "AutoModelForCausalLM",
        "tokenizer_type": "AutoTokenizer",
        "trust_remote_code": False,
        "sequence_len": spec.model.max_seq_len,
        "attn_implementation": _ATTENTION[spec.model.attn],
    }


def _data(spec: JobSpec) -> dict[str, Any]:
    """The data set is named alone: rows come as tensors, tokenised, masked and, where asked for, packed."""
    method = {"rl": "dpo", "rl_beta": spec.method.beta} if spec.method.type == "dpo" else {}
    return {
        **method,
        "trainer_cls": TRAINERS[spec.method.type],
        "datasets": [{"path": spec.data.remote_uri}],
        "sample_packing": False,
        "remove_unused_columns": False,
        "val_set_size": 0.0,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": spec.cluster.gpus_per_node > 0,
    }


def _tuning(spec: JobSpec) -> dict[str, Any]:
    tuning = spec.tuning
    if isinstance(tuning, FullTuning):
        return {}
    alpha = tuning.resolved_alpha
    if alpha != int(alpha):
        raise ConfigError(f"tuning.alpha: {alpha} is not available on backend axolotl, which takes whole numbers")
    # Its fused kernels run on GPUs alone and are switched on unless told.
    kernels = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False)
    targets = {"lora_target_modules": list(tuning.target_modules)} if tuning.target_modules else {}
    return {
        "adapter": tuning.type,
        "lora_r": tuning.rank,
        "lora_alpha": int(alpha),
        "lora_dropout": tuning.dropout,
        "lora_target_linear": not targets,
        **targets,
        **kernels,
        **(_quantization(tuning) if isinstance(tuning, QloraTuning) else {}),
    }


def _quantization(tuning: QloraTuning) -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "bnb_config_kwargs": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": tuning.double_quant},
    }


def _steps(spec: JobSpec, plan: TrainPlan) -> dict[str, Any]:
    length = {"max_steps": plan.total_steps} if plan.total_steps else {"num_epochs": spec.training.epochs or 1.0}
    checkpointing = spec.training.activation_checkpointing
    return {
        **length,
        "micro_batch_size": plan.microbatch,
        "gradient_accumulation_steps": plan.accumulation,
        "seed": spec.training.seed,
        "gradient_checkpointing": checkpointing,
        **({"gradient_checkpointing_kwargs": {"use_reentrant": False}} if checkpointing else {}),
    }


def _optimizer(spec: JobSpec) -> dict[str, Any]:
    optimizer, by_deepspeed = spec.optimizer, spec.axolotl.sharding == "deepspeed"
    return {
        "optimizer": "adamw_torch",
        "learning_rate": optimizer.lr,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "max_grad_norm": optimizer.max_grad_norm if by_deepspeed else optimizer.max_grad_norm or NEVER_CLIP,
        # The shape; the values are `optim.learning_rate`'s, as on every backend.
        "lr_scheduler": _SCHEDULERS[optimizer.scheduler],
        "warmup_steps": optimizer.warmup_steps,
    }


def _precision(spec: JobSpec) -> dict[str, Any]:
    return {"bf16": spec.training.precision == "bf16", "fp16": False, "tf32": False}


def _sharding(spec: JobSpec, plan: TrainPlan) -> dict[str, Any]:
    sharding = spec.axolotl.sharding
    if sharding == "none":
        return {"ddp_find_unused_parameters": False} if plan.world_size > 1 else {}
    if problem := _not_sharded(spec, plan):
        raise ConfigError(f"axolotl.sharding: {sharding} {problem}")
    if sharding == "deepspeed":
        return {"deepspeed": deepspeed_config(spec, plan)}
    return {
        "fsdp_version": 2,
        "fsdp_config": {
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "cpu_ram_efficient_loading": False,
            "offload_params": False,
            "reshard_after_forward": True,
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    }


def _not_sharded(spec: JobSpec, plan: TrainPlan) -> str:
    """Why this job cannot be sharded so; empty: it can."""
    if plan.world_size == 1:
        return "has nothing to share out over one rank; use none"
    if spec.cluster.gpus_per_node == 0:
        # accelerate 1.13, state.py: on a CPU neither becomes the type of a distributed run.
        return "needs GPUs, on a CPU accelerate would shard nothing; use none"
    if spec.tuning.type == "qlora":
        return "takes tuning.type full and lora in this version, not qlora; use none"
    if spec.axolotl.sharding == "fsdp":
        return ""
    if spec.deepspeed.zero_stage == 3:
        return "takes deepspeed.zero_stage 1 and 2 in this version, not 3; use those, or fsdp"
    if spec.method.type != "sft":
        return "takes method.type sft in this version; use none, or fsdp"
    return ""


def _left_to_nexa(output: str) -> dict[str, Any]:
    """Its checkpoints are pickles and its reports go elsewhere: progress and manifests are Nexa's."""
    return {
        "output_dir": output,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "include_tkps": False,
        "logging_steps": 1_000_000_000,
    }

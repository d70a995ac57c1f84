"""Job -> TrainPlan: everything about a run that is decided before a rank starts. Pure.

Comes after the configuration and before launching. `nexa plan` prints it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from nexa_train.config.spec import JobSpec
from nexa_train.errors import ConfigError
from nexa_train.registry import Architecture

GIB = 1 << 30
ASSUMED_BYTES_PER_RANK = {"gpu": 80 * GIB, "cpu": 8 * GIB}
"""Memory that `microbatch_size_per_gpu: auto` plans for where the job does not say."""

_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{unit}i": 1 << (10 * power) for power, unit in enumerate("KMGT", start=1)
}


@dataclass(frozen=True)
class Memory:
    """Estimated peak bytes of one rank, by what holds them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class TrainPlan:
    """A run, decided.

    Attributes:
        world_size: ranks; nodes x ranks_per_node.
        microbatch x accumulation x world_size = global_batch, in sequences.
        total_steps: optimiser steps; None until the number of sequences is known (epochs).
        total_sequences: consumed over the run; the last step may be partial. None like total_steps.
        threads: CPU threads of a rank. precision: fp32 or bf16, as this machine can.
        memory, checkpoint_bytes: estimates; None where the model's sizes are not known without its weights.
    """

    nodes: int
    ranks_per_node: int
    world_size: int
    global_batch: int
    microbatch: int
    accumulation: int
    total_steps: int | None
    total_sequences: int | None
    save_every: int
    threads: int
    precision: str
    memory: Memory | None
    checkpoint_bytes: int | None


def make_plan(
    spec: JobSpec,
    *,
    num_sequences: int | None = None,
    architecture: Architecture | None = None,
    threads: int = 1,
    microbatch: int | None = None,
    too_large: int | None = None,
    precision: str | None = None,
) -> TrainPlan:
    """Decide a run.

    Args:
        num_sequences: in the prepared data, an epoch; None: not prepared.
        architecture: of the model, where known.
        threads: CPU threads of a rank where cluster.threads_per_rank does not say.
        microbatch: what `auto` resolved to when this run began. It stays, or with more ranks becomes the largest
            below it that divides what is left to each.
        too_large: the smallest microbatch that ran out of memory since then; `auto` stays below it.
        precision: what this machine can do of what the job asks for; None: all.
    """
    if precision is not None:
        spec = in_precision(spec, precision)
    cluster, training = spec.cluster, spec.training
    per_rank = training.global_batch_size // cluster.world_size
    chosen = _below(per_rank, _microbatch(spec, architecture, microbatch), too_large)
    total = training.max_steps * training.global_batch_size if training.max_steps else None
    if total is None and num_sequences is not None:
        total = max(1, round((training.epochs or 1.0) * num_sequences))
    return TrainPlan(
        nodes=cluster.num_nodes,
        ranks_per_node=cluster.ranks_per_node,
        world_size=cluster.world_size,
        global_batch=training.global_batch_size,
        microbatch=chosen,
        accumulation=per_rank // chosen,
        total_steps=None if total is None else math.ceil(total / training.global_batch_size),
        total_sequences=total,
        save_every=training.save_every_steps,
        threads=cluster.threads_per_rank or threads,
        precision=training.precision,
        memory=estimate_memory(spec, architecture, chosen) if architecture else None,
        checkpoint_bytes=estimate_checkpoint(spec, architecture) if architecture else None,
    )


def in_precision(spec: JobSpec, precision: str) -> JobSpec:
    """The same job in the number format that a machine has."""
    return spec.model_copy(update={"training": spec.training.model_copy(update={"precision": precision})})


def estimate_memory(spec: JobSpec, architecture: Architecture, microbatch: int) -> Memory:
    """Peak bytes of a rank: float32 weights, gradients and two moments, shared out as the backend does.

    Activations follow Korthikanti et al. 2022, 34 bytes a token, layer and channel in 16 bit, with linear
    attention memory; and the logits of one chunk of the loss. For dpo a sequence is two samples, and a model that
    is tuned in full has its reference beside it.
    """
    trained = _trained(spec, architecture)
    stored = 4 * architecture.num_parameters
    if spec.tuning.type == "qlora":
        stored -= int(3.45 * architecture.num_linear_parameters)  # 4 bits and the quantisation constants
    weights, gradients, moments = _sharing(spec)
    width = 2 if spec.training.precision == "bf16" else 4
    tokens = microbatch * spec.model.max_seq_len
    if spec.method.type == "dpo":
        tokens *= 2
        stored *= 2 if spec.tuning.type == "full" else 1
    layers = 2 if spec.training.activation_checkpointing else architecture.n_layers
    activations = 17 * width * tokens * architecture.d_model * layers
    logits = 3 * 4 * min(tokens, 1024) * architecture.vocab_size
    # ZeRO moves float32 weights of its own beside those that it computes with.
    kept = 12 if _by_deepspeed(spec) else 8
    return Memory(stored // weights, 4 * trained // gradients, kept * trained // moments, activations + logits)


def _sharing(spec: JobSpec) -> tuple[int, int, int]:
    """Over how many ranks weights, gradients and the optimiser's state are each shared out."""
    all_of_it = {"fsdp": 3, "none": 0, "hf": 0, "deepspeed": spec.deepspeed.zero_stage}
    stage = all_of_it[spec.axolotl.sharding if spec.backend == "axolotl" else spec.backend]
    weights, gradients, moments = (spec.cluster.world_size if stage >= least else 1 for least in (3, 2, 1))
    return weights, gradients, moments


def _by_deepspeed(spec: JobSpec) -> bool:
    return "deepspeed" in (spec.backend, spec.axolotl.sharding)


def estimate_checkpoint(spec: JobSpec, architecture: Architecture) -> int:
    """Bytes of one checkpoint: trained weights and both moments, in float32."""
    return 12 * _trained(spec, architecture)


def parse_quantity(text: str) -> float:
    """A Kubernetes quantity such as `500m` or `4Gi`, as a number.

    Raises:
        ConfigError: not a quantity.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)", text)
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{text!r} is not a quantity; expected a number with a unit such as 500m or 4Gi")
    return float(match[1]) * _UNITS[match[2]]


def _trained(spec: JobSpec, architecture: Architecture) -> int:
    if spec.tuning.type == "full":
        return architecture.num_parameters
    return architecture.lora_parameters(spec.tuning.rank)


def _microbatch(spec: JobSpec, architecture: Architecture | None, frozen: int | None) -> int:
    training = spec.training
    per_rank = training.global_batch_size // spec.cluster.world_size
    if isinstance(training.microbatch_size_per_gpu, int):
        return training.microbatch_size_per_gpu
    if isinstance(training.grad_accumulation_steps, int):
        return per_rank // training.grad_accumulation_steps
    if frozen is not None:
        return frozen
    divisors = [size for size in range(per_rank, 0, -1) if per_rank % size == 0]
    if architecture is None:
        return 1
    budget = _budget(spec)
    return next((size for size in divisors if estimate_memory(spec, architecture, size).total <= budget), 1)


def _below(per_rank: int, microbatch: int, too_large: int | None) -> int:
    """The largest that divides a rank's share, is not above the microbatch and is smaller than what did not fit."""
    most = microbatch if too_large is None else min(microbatch, too_large - 1)
    return max((size for size in range(1, most + 1) if per_rank % size == 0), default=1)


def _budget(spec: JobSpec) -> float:
    if spec.cluster.gpus_per_node:
        return ASSUMED_BYTES_PER_RANK["gpu"]
    given = spec.cluster.resources.memory
    return 0.8 * parse_quantity(given) if given else ASSUMED_BYTES_PER_RANK["cpu"]

"""What this version can carry out: refuses by name what no backend would honour.

A key that a backend does not consume is an error here, before anything starts, and never dropped without
a word. Comes after loading; used by the command line, the trainer and the operator alike.
"""

from __future__ import annotations

import json
from typing import Any

from nexa_train.config.spec import COLUMNS, AxolotlSpec, DeepspeedSpec, JobSpec, OptimizerSpec
from nexa_train.errors import ConfigError

METHODS: dict[str, tuple[str, ...]] = {
    "fsdp": ("pretrain", "sft", "dpo"),
    "hf": ("sft", "dpo"),
    "deepspeed": ("pretrain", "sft"),
    "axolotl": ("sft", "dpo"),
}
TUNINGS: dict[str, tuple[str, ...]] = {
    "fsdp": ("full", "lora"),
    "hf": ("full", "lora", "qlora"),
    "deepspeed": ("full", "lora"),
    "axolotl": ("full", "lora", "qlora"),
}
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "fsdp": ("adamw", "adafactor"),
    "hf": ("adamw", "adafactor"),
    "deepspeed": ("adamw",),
    "axolotl": ("adamw",),
}
"""What each backend takes, tried by really training."""


MOST_BYTES = 120_000
"""Of a spec as JSON, without defaults."""


def check_supported(spec: JobSpec) -> None:
    """Refuse what this version cannot do.

    Raises:
        ConfigError: names every key that would not be honoured, with what is.
    """
    problems = [*_backend(spec), *_training(spec), *_rest(spec)]
    if problems:
        raise ConfigError("\n".join(problems))


def _backend(spec: JobSpec) -> list[str]:
    chosen = (
        ("method.type", spec.method.type, METHODS),
        ("tuning.type", spec.tuning.type, TUNINGS),
        ("optimizer.name", spec.optimizer.name, OPTIMIZERS),
    )
    problems = [
        f"{key}: {value} is not available on backend {spec.backend}, which takes {', '.join(table[spec.backend])}"
        for key, value, table in chosen
        if value not in table[spec.backend]
    ]
    return problems + _options_of_others(spec)


def _options_of_others(spec: JobSpec) -> list[str]:
    """Groups of options whose backend does not run."""
    problems = []
    by_deepspeed = spec.backend == "deepspeed" or (spec.backend == "axolotl" and spec.axolotl.sharding == "deepspeed")
    if spec.deepspeed != DeepspeedSpec() and not by_deepspeed:
        problems.append(f"deepspeed: would not be read on backend {spec.backend}; leave it out or use deepspeed")
    if spec.axolotl != AxolotlSpec() and spec.backend != "axolotl":
        problems.append(f"axolotl: would not be read on backend {spec.backend}; leave it out or use axolotl")
    return problems


def _training(spec: JobSpec) -> list[str]:
    problems = []
    if spec.method.type == "dpo" and spec.data.packing:
        problems.append("data.packing: method dpo takes pairs, which are not packed; leave it out")
    if spec.method.type == "dpo" and spec.backend == "axolotl" and spec.cluster.world_size > 1:
        # TRL as Axolotl pins it gathers a number for each pair, and ranks may hold unequal numbers of them.
        problems.append("backend: axolotl takes method dpo on one rank alone; use backend fsdp or hf for more")
    if spec.optimizer.name == "adafactor":
        if spec.backend == "fsdp" and spec.cluster.world_size > 1:
            problems.append("optimizer.name: torch's adafactor takes no sharded weights; use backend hf, or adamw")
        usual = OptimizerSpec()
        problems += [
            f"optimizer.{key}: adafactor has none; leave it out"
            for key in ("betas", "eps")
            if getattr(spec.optimizer, key) != getattr(usual, key)
        ]
    return problems


def _rest(spec: JobSpec) -> list[str]:
    problems = []
    if spec.model.attn == "flash" and spec.cluster.gpus_per_node == 0:
        problems.append("model.attn: flash runs on GPUs alone (cluster.gpus_per_node is 0); use auto, sdpa or eager")
    elif spec.model.attn == "flash" and spec.training.precision == "fp32":
        problems.append("model.attn: flash takes no fp32; set training.precision bf16, or use auto, sdpa or eager")
    if spec.model.from_scratch and spec.model.name != "tiny":
        problems.append(
            f"model: d_model, n_layers and n_heads build a new model, so name {spec.model.name} would not be read; "
            "give either"
        )
    if spec.trackers:
        problems.append(f"trackers: {', '.join(spec.trackers)} are not built into this version; leave it empty")
    uris = (spec.data.remote_uri, spec.data.validation.uri or "", spec.artifacts.uri)
    if any(uri.startswith("gs://") for uri in uris):
        problems.append("gs:// is not built into this version; use s3:// or a folder")
    if spec.artifacts.uri.lower().startswith("memory://"):
        problems.append("artifacts.uri: memory:// lasts as long as one process; use s3:// or a folder")
    fields = COLUMNS[spec.data.format]
    if unknown := sorted(set(spec.data.columns) - set(fields)):
        problems.append(f"data.columns: format {spec.data.format} has no {unknown[0]}; it has {', '.join(fields)}")
    elastic = spec.cluster.min_nodes not in (None, spec.cluster.num_nodes)
    if elastic and spec.training.grad_accumulation_steps != "auto":
        problems.append(
            "cluster.min_nodes: with grad_accumulation_steps given, fewer nodes would have to take more sequences at "
            "once than memory may hold; set it to auto"
        )
    # Of one variable of a process Linux takes no more (MAX_ARG_STRLEN, execve(2)).
    stated = spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    size = len(json.dumps(stated, ensure_ascii=False).encode())
    if size > MOST_BYTES:
        problems.append(
            f"spec: {size} bytes, and ranks are told it in a variable, which takes {MOST_BYTES}; put long texts into a "
            "ConfigMap or a file"
        )
    return problems


_ON_KUBERNETES_ALONE = (
    "artifacts.storage",
    "cluster.annotations",
    "cluster.gpu_resource",
    "cluster.labels",
    "cluster.min_nodes",
    "cluster.node_selector",
    "cluster.resources.extended",
    "cluster.shrink_after_seconds",
    "cluster.tolerations",
    "cluster.volumes",
    "data.storage",
    "image",
    "recovery.backoff_seconds",
    "recovery.max_backoff_seconds",
    "recovery.max_restarts",
    "recovery.rules",
    "schedule.deletion_policy",
    "schedule.managed_by",
    "schedule.priority",
    "schedule.runtime",
    "schedule.scheduler_name",
    "schedule.suspend",
    "schedule.ttl_seconds_after_finished",
)
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "here": (
        *_ON_KUBERNETES_ALONE,
        "recovery.grace_period_seconds",
        "schedule.active_deadline_seconds",
        "schedule.queue_name",
    ),
    "slurm": _ON_KUBERNETES_ALONE,
}
"""Keys that mean nothing in a place: one job file serves them all, so they are no error there, but are said."""


def without_meaning(spec: JobSpec, place: str) -> list[str]:
    """Keys of a job that are set and do nothing in `place` (`here` or `slurm`), sorted."""
    stated = spec.model_dump(mode="json", exclude_defaults=True)
    return [key for key in ELSEWHERE[place] if _stated(stated, key)]


def _stated(stated: dict[str, Any], dotted: str) -> bool:
    inside: Any = stated
    for key in dotted.split("."):
        inside = inside.get(key, {})
    return bool(inside)

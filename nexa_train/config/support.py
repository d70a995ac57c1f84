"""What this version can carry out: refuses by name what no backend would honour.

A key that a backend does not consume is an error here, before anything starts, and never dropped without
a word. Comes after loading; used by the command line, the trainer and the operator alike.
"""

from __future__ import annotations

from typing import Any

from nexa_train.config.spec import COLUMNS, JobSpec
from nexa_train.errors import ConfigError

METHODS: dict[str, tuple[str, ...]] = {"fsdp": ("sft", "pretrain"), "hf": ("sft",)}
TUNINGS: dict[str, tuple[str, ...]] = {"fsdp": ("full", "lora"), "hf": ("full", "lora", "qlora")}


def check_supported(spec: JobSpec) -> None:
    """Refuse what this version cannot do.

    Raises:
        ConfigError: names every key that would not be honoured, with what is.
    """
    problems = [*_backend(spec), *_training(spec), *_rest(spec)]
    if problems:
        raise ConfigError("\n".join(problems))


def _backend(spec: JobSpec) -> list[str]:
    backend = spec.backend
    if backend not in METHODS:
        return [f"backend: {backend} is not built into this version; available are {', '.join(sorted(METHODS))}"]
    problems = []
    if spec.method.type not in METHODS[backend]:
        takes = ", ".join(METHODS[backend])
        problems.append(f"method.type: {spec.method.type} is not available on backend {backend}, which takes {takes}")
    if spec.tuning.type not in TUNINGS[backend]:
        takes = ", ".join(TUNINGS[backend])
        problems.append(f"tuning.type: {spec.tuning.type} is not available on backend {backend}, which takes {takes}")
    return problems


def _training(spec: JobSpec) -> list[str]:
    problems = []
    if spec.backend == "hf" and spec.cluster.world_size > 1:
        problems.append("backend: hf runs one rank in this version; use backend fsdp for more")
    if spec.backend == "hf" and spec.data.packing:
        problems.append("data.packing: not available on backend hf in this version; use backend fsdp or false")
    if spec.training.precision == "bf16" and spec.cluster.gpus_per_node == 0:
        problems.append(
            "training.precision: bf16 on CPU (cluster.gpus_per_node 0) is hundreds of times slower: use fp32"
        )
    return problems


def _rest(spec: JobSpec) -> list[str]:
    problems = []
    if spec.model.attn == "flash":
        problems.append("model.attn: flash is not built into this version; use auto, sdpa or eager")
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
    fields = COLUMNS[spec.data.format]
    if unknown := sorted(set(spec.data.columns) - set(fields)):
        problems.append(f"data.columns: format {spec.data.format} has no {unknown[0]}; it has {', '.join(fields)}")
    if spec.cluster.min_nodes is not None:
        problems.append("cluster.min_nodes: elastic training is not built into this version; leave it out")
    return problems


_ON_KUBERNETES_ALONE = (
    "artifacts.storage",
    "cluster.annotations",
    "cluster.labels",
    "cluster.node_selector",
    "cluster.tolerations",
    "cluster.volumes",
    "data.storage",
    "image",
    "recovery.max_restarts",
    "recovery.rules",
    "schedule.deletion_policy",
    "schedule.managed_by",
    "schedule.priority",
    "schedule.runtime",
    "schedule.suspend",
    "schedule.ttl_seconds_after_finished",
)
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "here": (*_ON_KUBERNETES_ALONE, "schedule.active_deadline_seconds", "schedule.queue_name"),
    "slurm": _ON_KUBERNETES_ALONE,
}
"""Keys that mean nothing in a place: one job file serves them all, so they are no error there, but are said."""


def without_meaning(spec: JobSpec, place: str) -> list[str]:
    """Keys of a job that are set and do nothing in `place` (`here` or `slurm`), sorted."""
    stated = spec.model_dump(mode="json", exclude_defaults=True)
    return [key for key in ELSEWHERE[place] if _stated(stated, key)]


def _stated(stated: dict[str, Any], dotted: str) -> bool:
    group, _, key = dotted.partition(".")
    return bool(stated.get(group) if not key else stated.get(group, {}).get(key))

"""Job + attempt -> RunPlan: everything a runtime needs to know, decided. Comes after `spec.py`; pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nexa_operator import naming
from nexa_operator.errors import RuntimeUnavailableError
from nexa_train.config import Job
from nexa_train.config.protocol import (
    ENV_ATTEMPT,
    ENV_IMAGE,
    ENV_JOB,
    ENV_NUM_NODES,
    ENV_OUT_OF_MEMORY,
)
from nexa_train.config.spec import ClusterSpec

S3 = "s3://"


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What the administrator chose for jobs that do not say; `heavy_image`: for those on backend axolotl.

    Attributes:
        nvidia_devices: how names begin of devices whose plugin sets NVIDIA_VISIBLE_DEVICES.
    """

    image: str
    heavy_image: str = ""
    storage: str = ""
    nvidia_devices: tuple[str, ...] = ("nvidia.com/",)


def as_begun(defaults: Defaults, status: Mapping[str, Any], *, committed: bool) -> Defaults:
    """What the administrator chose, but for a run that has committed something what it did that with: later choices are
    for later runs."""
    image = status.get("image")
    if not committed or not image:
        return defaults
    return replace(defaults, image=image, heavy_image=image, storage=status.get("storage", ""))


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One attempt of one job: a gang of pods."""

    job_name: str
    namespace: str
    owner_uid: str
    run_id: str
    attempt: int
    name: str
    service: str | None
    """The headless Service by which the pods find pod 0; None: there is one pod, or they meet in the artifact store."""
    image: str
    cluster: ClusterSpec
    grace_seconds: int
    """For a last checkpoint, after SIGTERM."""
    min_pods: int
    """So many of the gang's are enough for a next attempt, if no more find a node."""
    asks_for_gpus: bool
    """Whether a device plugin of NVIDIA's tells its pods which GPUs are theirs."""
    environment: tuple[tuple[str, str], ...]
    """All of the protocol's but where pod 0 is, which the runtime knows."""
    storage: str | None
    priority_class: str | None
    scheduler: str | None
    """Of the pods; None: the cluster's own."""
    excluded_nodes: tuple[str, ...]
    queue: str | None
    """Kueue's; None: nobody is asked before the gang starts."""


def make_plan(
    job: Job,
    *,
    owner_uid: str,
    attempt: int,
    defaults: Defaults,
    num_nodes: int | None = None,
    excluded_nodes: tuple[str, ...] = (),
    out_of_memory_attempt: int | None = None,
) -> RunPlan:
    """The same job and attempt always give the same plan.

    Args:
        num_nodes: pods of this attempt; None: as many as the job asks for.
        excluded_nodes: names of nodes where no pod may go.
        out_of_memory_attempt: the one before, if it was killed for memory.

    Raises:
        RuntimeUnavailableError: see `image_of`.
    """
    name, namespace, least = job.metadata.name, job.metadata.namespace, job.spec.cluster.min_nodes
    job = job if num_nodes is None else _of_size(job, num_nodes)
    image = image_of(job, defaults)
    return RunPlan(
        job_name=name,
        namespace=namespace,
        owner_uid=owner_uid,
        run_id=job.run_id,
        attempt=attempt,
        name=naming.gang_name(name, attempt),
        service=_service(job),
        image=image,
        cluster=job.spec.cluster,
        grace_seconds=job.spec.recovery.grace_period_seconds,
        min_pods=min(job.spec.cluster.num_nodes, least or job.spec.cluster.num_nodes),
        asks_for_gpus=any(name.startswith(defaults.nvidia_devices) for name in _devices(job.spec.cluster)),
        environment=(
            (ENV_JOB, _as_json(job)),
            (ENV_ATTEMPT, str(attempt)),
            (ENV_NUM_NODES, str(job.spec.cluster.num_nodes)),
            (ENV_IMAGE, image),
            *(() if out_of_memory_attempt is None else ((ENV_OUT_OF_MEMORY, str(out_of_memory_attempt)),)),
        ),
        storage=storage_of(job, defaults),
        priority_class=job.spec.schedule.priority,
        scheduler=job.spec.schedule.scheduler_name,
        excluded_nodes=excluded_nodes,
        queue=job.spec.schedule.queue_name,
    )


def _devices(cluster: ClusterSpec) -> tuple[str, ...]:
    return (*((cluster.gpu_resource,) if cluster.gpus_per_node else ()), *cluster.resources.extended)


def _service(job: Job) -> str | None:
    """Pods have names where meeting in the artifact store does not do.

    A folder that nodes share may show a new file late (NFS: up to a minute). And a queue may start the same gang again
    with other pods, which would find what their forerunners said.
    """
    has_bucket, is_queued = job.spec.artifacts.uri.startswith(S3), job.spec.schedule.queue_name is not None
    needed = job.spec.cluster.num_nodes > 1 and (is_queued or not has_bucket)
    return naming.service_name(job.metadata.name) if needed else None


def image_of(job: Job, defaults: Defaults) -> str:
    """The trainer's image: the job's own, or the administrator's for its backend.

    Raises:
        RuntimeUnavailableError: there is none with Axolotl in it.
    """
    chosen = job.spec.image or (defaults.heavy_image if job.spec.backend == "axolotl" else defaults.image)
    if not chosen:
        raise RuntimeUnavailableError(
            "backend axolotl needs an image of its own, and this operator knows none: name one in spec.image, or have "
            "the administrator set trainerHeavyImage in the chart"
        )
    return chosen


def _of_size(job: Job, num_nodes: int) -> Job:
    """The same job on another number of nodes: the trainer reads its world's size from the description."""
    cluster = job.spec.cluster.model_copy(update={"num_nodes": num_nodes, "min_nodes": None})
    return job.model_copy(update={"spec": job.spec.model_copy(update={"cluster": cluster})})


def _as_json(job: Job) -> str:
    """What the job states, without defaults: a trainer's image of an older version forbids keys it does not know."""
    document = {
        "metadata": {"name": job.metadata.name, "namespace": job.metadata.namespace},
        "spec": job.as_manifest()["spec"],
    }
    # Not as ASCII, which takes six bytes for a letter with an accent: see `support.MOST_BYTES`.
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def storage_of(job: Job, defaults: Defaults) -> str | None:
    """The storage profile: the job's own, or the administrator's where the job needs one; None: it needs none."""
    named = job.spec.artifacts.storage or job.spec.data.storage
    if named or not defaults.storage:
        return named
    uris = (job.spec.artifacts.uri, job.spec.data.remote_uri, job.spec.data.validation.uri or "")
    return defaults.storage if any(uri.startswith(S3) for uri in uris) else None

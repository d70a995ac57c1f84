"""Body of a NexaTrainingJob -> validated `Job`. Comes first in a reconcile; pure.

The CRD has refused most mistakes; what only the models know (what this version can carry out) is refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

from nexa_operator.errors import RuntimeUnavailableError
from nexa_operator.naming import FIELD_MANAGER
from nexa_train.config import GROUP, Job
from nexa_train.config.load import job_from_object
from nexa_train.config.support import check_supported
from nexa_train.errors import ConfigError

OUR_NAME = f"{GROUP}/{FIELD_MANAGER}"
"""What `schedule.managedBy` says when it means this operator."""


def parse(body: Mapping[str, Any]) -> Job:
    """The job that an object describes.

    Raises:
        ConfigError: the description is wrong, for every operator.
        RuntimeUnavailableError: it is beyond this operator, which is older than the CRD.
    """
    job = _understood(body)
    check_supported(job.spec)
    _check_storage(job)
    _check_artifacts_outlive_pods(job)
    _check_queue_takes_it(job)
    return job


def is_ours(body: Mapping[str, Any]) -> bool:
    """Whether no other controller was named; asked before parsing, for another's job need not please us."""
    managed_by = ((body.get("spec") or {}).get("schedule") or {}).get("managedBy")
    return managed_by in (None, OUR_NAME)


def _understood(body: Mapping[str, Any]) -> Job:
    try:
        return job_from_object(body)
    except ConfigError as exc:
        seen = exc.__cause__.errors() if isinstance(exc.__cause__, ValidationError) else []
        if not seen or any(each["type"] != "extra_forbidden" for each in seen):
            raise
        # No mistake: the server keeps no key that its CRD does not know, and fills in defaults of those that it does.
        raise RuntimeUnavailableError(f"the CRD is of a later version than this operator: upgrade it: {exc}") from exc


def _check_storage(job: Job) -> None:
    data, artifacts = job.spec.data.storage, job.spec.artifacts.storage
    if data and artifacts and data != artifacts:
        raise ConfigError(
            f"data.storage {data} and artifacts.storage {artifacts} differ: both profiles would set the same "
            "AWS_* variables; name one profile that reaches both"
        )


def _check_artifacts_outlive_pods(job: Job) -> None:
    uri = job.spec.artifacts.uri.removeprefix("file://")
    mounts = [volume.mount_path for volume in job.spec.cluster.volumes if volume.claim and not volume.read_only]
    # What is spelled in another way may be anywhere: `..`, or of file:// an escape such as %2e.
    plain = ".." not in PurePosixPath(uri).parts and not (uri != job.spec.artifacts.uri and "%" in uri)
    if "://" not in uri and not (plain and any(PurePosixPath(uri).is_relative_to(mount) for mount in mounts)):
        raise ConfigError(
            f"artifacts.uri {uri} is a folder inside the pod and would be gone with it; "
            "use s3://, or a folder of a claim in cluster.volumes with readOnly false"
        )


def _check_queue_takes_it(job: Job) -> None:
    schedule = job.spec.schedule
    if schedule.queue_name is not None and job.spec.cluster.min_nodes is not None:
        raise ConfigError(
            f"cluster.minNodes with schedule.queueName {schedule.queue_name}: Kueue admits a gang as a whole; "
            "leave one of them out"
        )

"""Names and labels of everything that belongs to a job. Deterministic, so that creating twice is creating once.

A job's name has at most 45 characters; the longest name made from it, `NAME-a99999-4095` for the host name of a
pod, stays within the 63 of a DNS label.
"""

from __future__ import annotations

import hashlib

from nexa_train.config import GROUP

FIELD_MANAGER = "nexa-operator"
LABEL_JOB_UID = f"{GROUP}/job-uid"
LABEL_JOB_NAME = f"{GROUP}/job-name"
LABEL_ATTEMPT = f"{GROUP}/attempt"
LABEL_NODES = f"{GROUP}/nodes"
"""On what carries a gang: how many pods it has."""
LABEL_ROLE = f"{GROUP}/role"
"""Of Jobs that carry no gang, and of their pods."""
ROLE_ROOM, ROLE_REMOVAL = "room", "removal"
FINALIZER = f"{GROUP}/artifacts"
"""On jobs whose artifacts go with them."""
ANNOTATION_SPANS = f"{GROUP}/parting-spans"
"""On such a job that is being deleted: for how long an operator was there."""
STORAGE_PREFIX = "nexa-storage-"
"""A storage profile NAME is the ConfigMap and the Secret `nexa-storage-NAME` of the job's namespace."""


def gang_name(job_name: str, attempt: int) -> str:
    """The object that carries the ranks of one attempt."""
    return f"{job_name}-a{attempt}"


def room_name(job_name: str, attempt: int) -> str:
    """The Job whose pods show whether there is room for the rest of the gang."""
    return f"{gang_name(job_name, attempt)}-room"


def removal_name(job_name: str) -> str:
    """The Job that deletes what a deleted job's run wrote."""
    return f"{job_name}-removal"


def service_name(job_name: str) -> str:
    """The headless Service of all attempts: host names differ by attempt already, so one is enough."""
    return f"{job_name}-ranks"


def event_name(job_name: str, *parts: str) -> str:
    """The same happening always has the same name, so that it is told once."""
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return f"{job_name}.{digest[:16]}"

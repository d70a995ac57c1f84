"""kopf's events -> keys on the queue, and nothing else. First in the pipeline.

Only `on.event` is used: it keeps no state on objects, needs no finalizer and patches nothing. Handlers return
None, for kopf would write anything else to the object's status.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import kopf

from nexa_operator.naming import LABEL_JOB_NAME, LABEL_JOB_UID
from nexa_operator.reconcile import Key
from nexa_train.config import GROUP, PLURAL, VERSION

CHILDREN = (("batch", "v1", "jobs"), ("", "v1", "pods"))


def registry_of(enqueue: Callable[[Key], None], *, heard: Callable[[str], None]) -> kopf.OperatorRegistry:
    """All handlers, each putting the key of the job concerned on the queue; `heard`: of which kind there was news."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        # The same order as the operator's own connection.
        return kopf.login_with_kubeconfig(**arguments) or kopf.login_with_service_account(**arguments)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def job_changed(meta: Mapping[str, Any], **_: Any) -> None:
        heard(PLURAL)
        enqueue(Key(namespace=meta["namespace"], name=meta["name"], uid=meta["uid"]))

    async def child_changed(meta: Mapping[str, Any], resource: kopf.Resource, **_: Any) -> None:
        heard(resource.plural)
        labels = meta["labels"]
        enqueue(Key(namespace=meta["namespace"], name=labels[LABEL_JOB_NAME], uid=labels[LABEL_JOB_UID]))

    labelled = {LABEL_JOB_UID: kopf.PRESENT, LABEL_JOB_NAME: kopf.PRESENT}
    heard(PLURAL)
    for group, version, plural in CHILDREN:
        heard(plural)
        kopf.on.event(group, version, plural, labels=labelled, registry=registry)(child_changed)
    return registry

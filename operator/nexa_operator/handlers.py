"""kopf's events -> keys on the queue, and nothing else. First in the pipeline.

Only `on.event` is used: it keeps no state on objects, needs no finalizer and patches nothing. Handlers return
None, for kopf would write anything else to the object's status.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import kopf

from nexa_operator.kinds import JOBS, PODS
from nexa_operator.naming import LABEL_JOB_NAME, LABEL_JOB_UID
from nexa_operator.news import (
    LATER_SECONDS,
    NEWBORN_GANG,
    NEWBORN_POD,
    News,
    has_failed,
    sign_of_gang,
    sign_of_pod,
    sign_of_training_job,
)
from nexa_operator.reconcile import Key, key_of
from nexa_operator.workqueue import WorkQueue
from nexa_train.config import GROUP, PLURAL, VERSION

CHILDREN = (("batch", "v1", "jobs"), ("", "v1", "pods"))


Event = Mapping[str, Any]


def registry_of(
    changed: Callable[[Key, str], None],
    queue: WorkQueue[Key],
    *,
    is_over: Callable[[Key], bool],
    heard: Callable[[str], None],
) -> kopf.OperatorRegistry:
    """All handlers, each putting the key of the job concerned on the queue: at once if the job has changed, with its
    resourceVersion, or a pod has failed, soon if a child has changed, later if nothing is new.

    Args:
        is_over: whether nothing is left to do for a job, whatever becomes of its children.
        heard: told of which kind there was an event.
    """
    registry = kopf.OperatorRegistry()
    jobs = News(sign_of_training_job)
    children = {JOBS.plural: News(sign_of_gang, NEWBORN_GANG), PODS.plural: News(sign_of_pod, NEWBORN_POD)}

    @kopf.on.login(registry=registry)
    async def login(**arguments: Any) -> kopf.ConnectionInfo | None:
        # The same order as the operator's own connection.
        return kopf.login_with_kubeconfig(**arguments) or kopf.login_with_service_account(**arguments)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    async def job_changed(event: Event, **_: Any) -> None:
        heard(PLURAL)
        if jobs.is_new(event["type"], event["object"]):
            changed(key_of(event["object"]), event["object"]["metadata"]["resourceVersion"])

    async def child_changed(event: Event, resource: kopf.Resource, **_: Any) -> None:
        heard(resource.plural)
        body, news = event["object"], children[resource.plural]
        key, known, new = _key_of_owner(body), news.knows(body), news.is_new(event["type"], body)
        if known and is_over(key):
            return
        if new and has_failed(body):
            queue.add(key)
        elif new:
            queue.add_soon(key)
        else:
            queue.add_after(key, LATER_SECONDS)

    labelled = {LABEL_JOB_UID: kopf.PRESENT, LABEL_JOB_NAME: kopf.PRESENT}
    heard(PLURAL)
    for group, version, plural in CHILDREN:
        heard(plural)
        kopf.on.event(group, version, plural, labels=labelled, registry=registry)(child_changed)
    return registry


def _key_of_owner(body: Event) -> Key:
    metadata = body["metadata"]
    labels = metadata["labels"]
    return Key(namespace=metadata["namespace"], name=labels[LABEL_JOB_NAME], uid=labels[LABEL_JOB_UID])

"""Which events tell something new. Between kopf's handlers and the queue.

Objects change more often than what a look sees of them: the Job controller counts its pods in the status, every
status of ours comes back as an event, and a child that was just made is what its look expected. An event that tells
nothing new of a child is still answered, for what should follow may fail to come, but later, and by the same look as
all others of its kind. What comes back of a job is not, nor are the children of a job that is over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nexa_operator.naming import FINALIZER, LABEL_ROLE, ROLE_ROOM
from nexa_operator.reading import condition_of, controller_of, label_of

Body = Mapping[str, Any]

LATER_SECONDS = 5.0
"""After an event that told nothing new."""


@dataclass
class News:
    """What was last heard of each object of one kind, as far as a look would see it."""

    sign: Callable[[Body], object]
    newborn: object = None
    """The sign of one that was just made as it was asked for; None: each is news."""
    _heard: dict[str, object] = field(default_factory=dict)

    def knows(self, body: Body) -> bool:
        """Whether anything was heard of it before."""
        return body["metadata"]["uid"] in self._heard

    def is_new(self, change: str | None, body: Body) -> bool:
        """Whether it differs from what was heard before; `change` as the watch says it."""
        uid = body["metadata"]["uid"]
        if change == "DELETED":
            self._heard.pop(uid, None)
            return True
        sign, before = self.sign(body), self._heard.get(uid, self.newborn)
        self._heard[uid] = sign
        return sign != before


def sign_of_training_job(body: Body) -> object:
    """Its status is ours, and so is its finalizer: somebody who replaced the job may have taken that off unawares."""
    metadata = body["metadata"]
    held = FINALIZER in (metadata.get("finalizers") or ())
    return metadata.get("generation"), metadata.get("deletionTimestamp"), held


def sign_of_gang(body: Body) -> object:
    """Counters in a Job's status say less than its pods do."""
    conditions = (body.get("status") or {}).get("conditions") or []
    told = tuple((each["type"], each["status"], each.get("reason"), each.get("message")) for each in conditions)
    return sign_of_training_job(body), told


NEWBORN_GANG = sign_of_gang({"metadata": {"generation": 1}})


def sign_of_pod(body: Body) -> object:
    """That it found a node is awaited by nobody, but of those that look for room; and that it did its part by nobody
    where a Job tells when all have."""
    status = body.get("status") or {}
    scheduled = condition_of(status, "PodScheduled")
    states = _container_states(body)
    phase, ends = status.get("phase", "Pending"), [state["terminated"] for state in states if state.get("terminated")]
    if controller_of(body).get("kind") == "Job":
        phase = "Running" if phase == "Succeeded" else phase
        ends = [end for end in ends if end.get("exitCode") != 0]
    return (
        phase,
        status.get("reason"),
        body["metadata"].get("deletionTimestamp"),
        condition_of(status, "DisruptionTarget").get("status"),
        scheduled.get("message") if scheduled.get("status") == "False" else None,
        label_of(body, LABEL_ROLE) == ROLE_ROOM and scheduled.get("status") == "True",
        tuple(str(end) for end in ends),
        tuple(
            (waiting.get("reason"), waiting.get("message"))
            for state in states
            if (waiting := state.get("waiting")) and waiting.get("reason") not in _STARTING
        ),
    )


def has_failed(body: Body) -> bool:
    """Whether a container of a pod ended badly: its last words go with the pod."""
    return any((state.get("terminated") or {}).get("exitCode", 0) != 0 for state in _container_states(body))


def _container_states(body: Body) -> list[Body]:
    entries = (body.get("status") or {}).get("containerStatuses") or []
    return [entry.get("state") or {} for entry in entries]


_STARTING = ("ContainerCreating", "PodInitializing")
NEWBORN_POD = sign_of_pod({"metadata": {}})

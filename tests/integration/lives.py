"""The lives that `test_crashes.py` strikes: what befalls a job, and what must be the same in the end of each.

All that a life waits for comes about however the operator was disturbed. Nothing that time decides is compared.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.integration.harness import CHECKPOINT, NAMED
from tests.integration.lane import Lane, conditions, rank_of

_KINDS = ("jobs", "jobsets", "services", "pods")
"""Of what a job has."""
_KEPT = (
    "observedGeneration",
    "phase",
    "attempt",
    "numNodes",
    "restarts",
    "chargedRestarts",
    "lossesWithoutCheckpoint",
    "adaptedRestarts",
    "progress",
    "loss",
    "checkpoint",
)
_KEPT_OF_FAILURE = ("attempt", "cause", "exitCode", "charged", "checkpointStep")
SHRINK_SECONDS, BACKOFF_SECONDS, TTL_SECONDS = 3, 2, 5
_MORE_THAN_HALF = "40"
"""CPUs of a node: no two such pods fit on one."""
XID = "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."
_HALFWAY = CHECKPOINT.model_copy(update={"step": 5})


@dataclass(frozen=True)
class End:
    """What must be the same in the end: the last status, and what became of the artifacts."""

    status: dict[str, Any]
    conditions: dict[str, str]
    told: list[str]


@dataclass(frozen=True, kw_only=True)
class Life:
    """What befalls a job, and what is known of its end.

    Attributes:
        live: one life; returns the last status seen.
        ends: some of that status.
        left: children in the end.
        made: children that the operator ever made.
        told: what events say of its artifacts.
    """

    name: str
    live: Callable[[Lane, str], dict[str, Any]]
    ends: dict[str, Any]
    left: list[str]
    made: list[str]
    told: list[str] = field(default_factory=list)

    def lead(self, lane: Lane, name: str) -> End:
        """To its end."""
        seen = self.live(lane, name)
        lane.wait(lambda: _children(lane, name) == self.left, f"of its children are left {self.left}")
        status = lane.status(name) or seen
        told = [event["reason"] for event in lane.events(name) if event["reason"].startswith("Artifacts")]
        return End(_kept(status), conditions(status), told)


def _stopped(lane: Lane, name: str) -> dict[str, Any]:
    lane.submit(name, **NAMED)  # with a Service there is one more write to be killed at
    _run(lane, name, attempt=0)
    _lose(lane, name, attempt=0, checkpoint=_HALFWAY)
    _run(lane, name, attempt=1)
    lane.change(name, schedule={"suspend": True})
    lane.wait_true(name, "Suspended", attempt=1)
    lane.wait(lambda: not lane.pods(f"{name}-a1"), "no pods while suspended")
    lane.change(name, schedule={"suspend": False})
    _run(lane, name, attempt=2)
    return _succeed(lane, name, attempt=2)


STOPPED = Life(
    name="stopped",
    live=_stopped,
    ends={"phase": "Succeeded", "attempt": 2, "restarts": 1, "chargedRestarts": 1},
    left=["jobs/-a2", "pods/-a2-0", "pods/-a2-1", "services/-ranks"],
    made=["jobs/-a0", "jobs/-a1", "jobs/-a2", "services/-ranks"],
)
"""A rank is lost; the job is suspended, resumed, and succeeds."""


def _parting(lane: Lane, name: str) -> dict[str, Any]:
    lane.submit(name, schedule={"deletionPolicy": "Delete"}, cluster=lane.place)
    _run(lane, name, attempt=0, placed=True)
    _lose(lane, name, attempt=0, checkpoint=_HALFWAY)
    _run(lane, name, attempt=1, placed=True)
    status = lane.status(name)
    lane.api.delete(lane.path("nexatrainingjobs", name))
    gangs = [f"{name}-a0", f"{name}-a1"]
    lane.wait_asked_to_go(*gangs)
    for gang in gangs:
        assert f"jobs/{name}-removal" not in lane.proxy.story.created, f"artifacts go while ranks of {gang} may write"
        lane.end_pods(gang)
    (pod,) = lane.wait(lambda: lane.pods_beside(name, "removal"), "a pod removes artifacts")
    assert lane.api.get(lane.path("nexatrainingjobs", name)), "held until they are gone"
    lane.say(pod, "Succeeded")
    lane.wait_gone(name)
    return status


PARTING = Life(
    name="parting",
    live=_parting,
    ends={"phase": "Running", "attempt": 1, "restarts": 1},
    left=[],
    made=["jobs/-a0", "jobs/-a1", "jobs/-removal"],
    told=["ArtifactsRemoved"],
)
"""It takes its artifacts with it: deleted while one attempt runs and a rank of the one before has not ended yet."""


def _elastic(lane: Lane, name: str) -> dict[str, Any]:
    _, second = lane.nodes
    lane.cordon(second)
    wanted = {"minNodes": 1, "shrinkAfterSeconds": SHRINK_SECONDS, "resources": {"cpu": _MORE_THAN_HALF}}
    lane.submit(name, cluster={**lane.place, **wanted})
    lane.wait(lambda: lane.pods(f"{name}-a1"), "an attempt with fewer pods")
    lane.end_pods(f"{name}-a0")
    _run(lane, name, attempt=1, num_pods=1, placed=True)
    lane.wait(lambda: any(map(_finds_no_node, lane.pods_beside(name, "room"))), "a pod asks for room")
    lane.cordon(second, False)
    lane.end_pods(f"{name}-a1")
    _run(lane, name, attempt=2, placed=True)
    return _succeed(lane, name, attempt=2)


def _finds_no_node(pod: dict[str, Any]) -> bool:
    return conditions(pod["status"]).get("PodScheduled") == "False"


ELASTIC = Life(
    name="elastic",
    live=_elastic,
    ends={"phase": "Succeeded", "attempt": 2, "numNodes": 2, "restarts": 0},
    left=["jobs/-a2", "pods/-a2-0", "pods/-a2-1"],
    made=["jobs/-a0", "jobs/-a1", "jobs/-a1-room", "jobs/-a2"],
)
"""There is room for one pod of two: it goes on with that one, grows when there is room for both, and succeeds."""


def _worn_out(lane: Lane, name: str) -> dict[str, Any]:
    recovery, schedule = {"maxRestarts": 2, "backoffSeconds": BACKOFF_SECONDS}, {"ttlSecondsAfterFinished": TTL_SECONDS}
    lane.submit(name, cluster=lane.place, recovery=recovery, schedule=schedule)
    _run(lane, name, attempt=0, placed=True)
    broken = next(pod["spec"]["nodeName"] for pod in lane.pods(f"{name}-a0") if rank_of(pod) == 1)
    _lose(lane, name, attempt=0, log=XID)
    _run(lane, name, attempt=1, placed=True)
    assert broken not in {pod["spec"]["nodeName"] for pod in lane.pods(f"{name}-a1")}, "on the node that was broken"
    lost = time.time()
    _lose(lane, name, attempt=1)
    _run(lane, name, attempt=2, placed=True)
    third = lane.api.get(lane.path("jobs", f"{name}-a2")) or {}
    begun = datetime.datetime.fromisoformat(third["metadata"]["creationTimestamp"]).timestamp()
    assert begun >= int(lost + BACKOFF_SECONDS), "the third attempt waits for its time"
    _lose(lane, name, attempt=2)
    status = lane.wait_true(name, "Failed", attempt=2)
    for attempt in range(3):
        lane.end_pods(f"{name}-a{attempt}")
    lane.wait_gone(name)
    return status


WORN_OUT = Life(
    name="worn-out",
    live=_worn_out,
    ends={"phase": "Failed", "attempt": 2, "restarts": 2, "chargedRestarts": 2, "excluded": 1},
    left=[],
    made=["jobs/-a0", "jobs/-a1", "jobs/-a2"],
)
"""It loses a rank on a broken node, another, waits, a third, which is one too many; its time to live ends it."""


def _by_jobset(lane: Lane, name: str) -> dict[str, Any]:
    lane.submit(name, schedule={"runtime": "jobset"}, **NAMED)
    _run(lane, name, attempt=0)
    _lose(lane, name, attempt=0, checkpoint=_HALFWAY)
    _run(lane, name, attempt=1)
    return _succeed(lane, name, attempt=1)


BY_JOBSET = Life(
    name="jobset",
    live=_by_jobset,
    ends={"phase": "Succeeded", "attempt": 1, "restarts": 1, "chargedRestarts": 1},
    left=["jobs/-a1-r-0", "jobsets/-a1", "pods/-a1-r-0-0", "pods/-a1-r-0-1", "services/-ranks"],
    made=["jobsets/-a0", "jobsets/-a1", "services/-ranks"],
)
"""On another runtime, whose own objects nobody tells the operator of: a rank is lost, and it succeeds."""


LIVES = (STOPPED, PARTING, ELASTIC, WORN_OUT, BY_JOBSET)


def _run(lane: Lane, name: str, *, attempt: int, num_pods: int = 2, placed: bool = False) -> None:
    """All its pods run; `placed`: once each has a node."""
    gang = f"{name}-a{attempt}"
    if placed:
        lane.wait_placed(gang, num_pods)
    lane.play(gang, "Running", num_pods=num_pods)
    lane.wait_true(name, "Running", attempt=attempt)


def _lose(lane: Lane, name: str, *, attempt: int, **said: Any) -> None:
    """One of two ranks."""
    lane.play(f"{name}-a{attempt}", "Failed", ranks=[1], **{"exit_code": 1, "cause": "Oops", **said})


def _succeed(lane: Lane, name: str, *, attempt: int) -> dict[str, Any]:
    said = {"exit_code": 0, "step": 10, "total_steps": 10, "loss": 1.5, "checkpoint": CHECKPOINT}
    lane.play(f"{name}-a{attempt}", "Succeeded", **said)
    return lane.wait_true(name, "Succeeded", attempt=attempt)


def _kept(status: dict[str, Any]) -> dict[str, Any]:
    """What time does not decide."""
    failure = status.get("lastFailure", {})
    return (
        {key: status.get(key) for key in _KEPT}
        | {f"failed {key}": failure.get(key) for key in _KEPT_OF_FAILURE}
        | {"excluded": len(status.get("excludedNodes", ())), "keys": sorted(status)}
    )


def _children(lane: Lane, name: str) -> list[str]:
    """By kind, and by name without what differs from life to life."""
    labels = f"train.nexa.dev/job-name={name}"
    found = ((kind, child["metadata"]) for kind in _KINDS for child in lane.api.list(lane.path(kind), labels=labels))
    return sorted(f"{kind}/{_called(metadata).removeprefix(name)}" for kind, metadata in found)


def _called(metadata: dict[str, Any]) -> str:
    """Pods have a random end of their names."""
    given: str = metadata.get("generateName") or metadata["name"]
    return given.rstrip("-")

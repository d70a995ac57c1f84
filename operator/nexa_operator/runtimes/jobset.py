"""RunPlan -> JobSet, and a headless Service where one is needed, as plain dicts; pure.

One replicated job of one Job, which is the default runtime's: the same fields, the same facts. The JobSet restarts
nothing (`maxRestarts: 0`), for an attempt is one gang.
"""

from __future__ import annotations

from collections.abc import Sequence

from nexa_operator.kinds import JOBS, JOBSETS, Kind
from nexa_operator.plan import RunPlan
from nexa_operator.queueing import gang_hint
from nexa_operator.reading import Body, first_true, owner_uid
from nexa_operator.runtimes import job, pod
from nexa_operator.runtimes.base import Object, State, failure_of, is_suspended

KIND = JOBSETS
PARTS: tuple[Kind, ...] = (JOBS,)
PROVIDER = "JobSet (jobset.sigs.k8s.io)"
CONTAINER = pod.CONTAINER

REPLICATED = "r"
"""Short: a pod's name holds it too, and JobSet wants that within 63 characters with its suffix."""

index = job.index
suspension = job.suspension


def objects(plan: RunPlan) -> tuple[tuple[Kind, Object], ...]:
    """The JobSet, after the Service that its pods find each other by, if any."""
    return *pod.services(plan), (KIND, gang(plan))


def gang(plan: RunPlan) -> Object:
    """The JobSet of one attempt."""
    spec: Object = {
        "network": _network(plan),
        "successPolicy": {"operator": "All"},
        "failurePolicy": {"maxRestarts": 0},
        "replicatedJobs": [
            {
                "name": REPLICATED,
                "replicas": 1,
                "template": {
                    # By these the operator hears of the Job.
                    "metadata": {"labels": pod.labels(plan), **gang_hint(plan)},
                    "spec": job.job_spec(plan, host=pod.host_of(plan, f"{plan.name}-{REPLICATED}-0-0")),
                },
            }
        ],
    }
    if plan.queue is not None:
        spec["suspend"] = True
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": pod.gang_metadata(plan),
        "spec": spec,
    }


def _network(plan: RunPlan) -> Object:
    """No Service but ours: one for all attempts, whose host names differ already."""
    if plan.service is None:
        return {"enableDNSHostnames": False}
    return {"enableDNSHostnames": True, "subdomain": plan.service, "publishNotReadyAddresses": True}


def owners(gang: Body, parts: Sequence[Body]) -> frozenset[str]:
    """Pods are its Job's."""
    return frozenset(part["metadata"]["uid"] for part in _jobs(gang, parts))


def state(gang: Body, parts: Sequence[Body], pods: Sequence[Body]) -> State:
    """By its Job, which knows earlier and says more; by its own conditions where there is none."""
    jobs = [job.state(part, (), ()) for part in _jobs(gang, parts)]
    stands = is_suspended(gang, gang["spec"].get("suspend"))
    failures = [(each.failure, each.failure_message) for each in jobs if each.failure]
    failure, message = (failures or [failure_of(gang, "Failed")])[0]
    return State(
        suspended=stands or any(each.suspended for each in jobs),
        complete=bool(first_true(gang, "Completed")) or any(each.complete for each in jobs),
        failure=failure,
        failure_message=message,
        num_replaced=0 if any(_has_started(pod) for pod in pods) else _num_pods(gang),
    )


def _has_started(pod: Body) -> bool:
    phase: str = (pod.get("status") or {}).get("phase", "Pending")
    return phase != "Pending"


def _num_pods(gang: Body) -> int:
    """All, for a Job that somebody deletes is made anew with all its pods; one that is gone its Job calls a failure."""
    completions: int = gang["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"]
    return completions


def _jobs(gang: Body, parts: Sequence[Body]) -> list[Body]:
    return [part for part in parts if owner_uid(part) == gang["metadata"]["uid"]]

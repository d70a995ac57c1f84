"""RunPlan -> indexed Job, and a headless Service where one is needed, as plain dicts; pure. The default runtime.

The gang lives and dies as one: `backoffLimit: 0`, no pod restarts. Neither podFailurePolicy nor
backoffLimitPerIndex: with them only terminal pods count as failed, and a node that died never makes its pods
terminal, so the attempt would hang.
"""

from __future__ import annotations

from collections.abc import Sequence

from nexa_operator.kinds import JOBS, Kind
from nexa_operator.plan import RunPlan
from nexa_operator.queueing import gang_hint
from nexa_operator.reading import Body, first_true, label_of
from nexa_operator.runtimes import pod
from nexa_operator.runtimes.base import Object, State, failure_of, is_suspended

KIND = JOBS
PARTS: tuple[Kind, ...] = ()
PROVIDER = "Kubernetes"
CONTAINER = pod.CONTAINER

LABEL_INDEX = "batch.kubernetes.io/job-completion-index"


def objects(plan: RunPlan) -> tuple[tuple[Kind, Object], ...]:
    """The Job, after the Service that its pods find each other by, if any."""
    return *pod.services(plan), (KIND, gang(plan))


def gang(plan: RunPlan) -> Object:
    """The indexed Job of one attempt."""
    spec = job_spec(plan, host=pod.host_of(plan, f"{plan.name}-0"))
    if plan.queue is not None:
        spec["suspend"] = True
    metadata = {**pod.gang_metadata(plan), **gang_hint(plan)}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def job_spec(plan: RunPlan, *, host: str | None) -> Object:
    """Of an indexed Job, whoever makes it; `host`: see `pod.template`."""
    return {
        "completionMode": "Indexed",
        "completions": plan.cluster.num_nodes,
        "parallelism": plan.cluster.num_nodes,
        "backoffLimit": 0,
        # Kueue may let a gang go again while its ranks still commit: others in their place would not find that yet.
        "podReplacementPolicy": "TerminatingOrFailed" if plan.queue is None else "Failed",
        "template": pod.template(plan, host=host),
    }


def suspension() -> Object:
    """Its controller then deletes the pods, which is no failure."""
    return {"suspend": True}


def owners(gang: Body, parts: Sequence[Body]) -> frozenset[str]:
    """Pods are the Job's own."""
    return frozenset({gang["metadata"]["uid"]})


def index(pod: Body) -> str:
    """By the label that the Job's controller puts on it."""
    return label_of(pod, LABEL_INDEX)


def state(gang: Body, parts: Sequence[Body], pods: Sequence[Body]) -> State:
    """By its conditions. Failed waits for terminating pods, FailureTarget does not; so for success."""
    failure, message = failure_of(gang, "FailureTarget", "Failed")
    return State(
        suspended=is_suspended(gang, gang["spec"].get("suspend")),
        complete=bool(first_true(gang, "SuccessCriteriaMet", "Complete")),
        failure=failure,
        failure_message=message,
    )

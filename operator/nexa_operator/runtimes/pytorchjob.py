"""RunPlan -> PyTorchJob, as plain dicts; pure.

Workers only. A Master would make training-operator put a container before every worker that waits for it: of
another image, and not restricted. Without one it also sets no RANK, WORLD_SIZE or MASTER_ADDR, which are not the
ranks' but the pods', and it calls the job successful when all workers are, not when the first is.

No `backoffLimit`: at its first failure training-operator would delete every pod, with the last words of the one
that failed. With `restartPolicy: Never` it restarts nothing either way. What it still does is to replace a pod that
somebody deleted; `observe.py` sees that.

No deadline: training-operator looks at it only when something else happens, and the operator keeps one for all
attempts.
"""

from __future__ import annotations

from collections.abc import Sequence

from nexa_operator.kinds import PYTORCHJOBS, Kind
from nexa_operator.plan import RunPlan
from nexa_operator.reading import Body, first_true, label_of
from nexa_operator.runtimes import pod
from nexa_operator.runtimes.base import Object, State, failure_of, is_suspended
from nexa_train.config.protocol import ENV_NODE_INDEX

KIND = PYTORCHJOBS
PARTS: tuple[Kind, ...] = ()
PROVIDER = "Kubeflow's training-operator"
CONTAINER = "pytorch"
"""The only name that training-operator accepts."""

LABEL_INDEX = "training.kubeflow.org/replica-index"


def objects(plan: RunPlan) -> tuple[tuple[Kind, Object], ...]:
    """The PyTorchJob alone: training-operator makes a Service for each pod."""
    return ((KIND, gang(plan)),)


def gang(plan: RunPlan) -> Object:
    """The PyTorchJob of one attempt."""
    # As with a Job: when it has failed, what still runs ends, and what failed stays for its logs.
    policy: Object = {"cleanPodPolicy": "Running"}
    if plan.queue is not None:
        policy["suspend"] = True
    if plan.min_pods < plan.cluster.num_nodes:
        # Read where training-operator was told to make a PodGroup, which otherwise asks for all of them or none.
        policy["schedulingPolicy"] = {"minAvailable": plan.min_pods}
    by_label = {"fieldRef": {"fieldPath": f"metadata.labels['{LABEL_INDEX}']"}}
    template = pod.template(
        plan,
        host=f"{plan.name}-worker-0",
        container=CONTAINER,
        variables=[{"name": ENV_NODE_INDEX, "valueFrom": by_label}],
    )
    # Its Service has the pod's name. The restart policy is the replicas'.
    for other in ("subdomain", "restartPolicy"):
        template["spec"].pop(other, None)
    workers = {"replicas": plan.cluster.num_nodes, "restartPolicy": "Never", "template": template}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": pod.gang_metadata(plan),
        "spec": {"runPolicy": policy, "pytorchReplicaSpecs": {"Worker": workers}},
    }


def suspension() -> Object:
    """training-operator then deletes the pods, which is no failure."""
    return {"runPolicy": {"suspend": True}}


def owners(gang: Body, parts: Sequence[Body]) -> frozenset[str]:
    """Pods are the PyTorchJob's own."""
    return frozenset({gang["metadata"]["uid"]})


def index(pod: Body) -> str:
    """By the label that training-operator puts on it."""
    return label_of(pod, LABEL_INDEX)


def state(gang: Body, parts: Sequence[Body], pods: Sequence[Body]) -> State:
    """By its pods where they know earlier: nothing tells the operator of a change of the PyTorchJob itself."""
    failure, message = failure_of(gang, "Failed")
    done = {index(pod) for pod in pods if (pod.get("status") or {}).get("phase") == "Succeeded"}
    return State(
        suspended=is_suspended(gang, (gang["spec"].get("runPolicy") or {}).get("suspend")),
        complete=bool(first_true(gang, "Succeeded")) or len(done) == _num_workers(gang),
        failure=failure,
        failure_message=message,
        num_replaced=_num_workers(gang),
    )


def _num_workers(gang: Body) -> int:
    replicas: int = gang["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"]
    return replicas

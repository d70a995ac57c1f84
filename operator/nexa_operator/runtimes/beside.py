"""RunPlan -> Jobs that run beside a gang or after it: one asks for room, one removes what the run wrote. Pure."""

from __future__ import annotations

from nexa_operator import naming
from nexa_operator.plan import RunPlan
from nexa_operator.runtimes import pod
from nexa_operator.runtimes.base import Object

REMOVAL_SECONDS = 600
"""Within which the artifacts of a deleted job are gone, or are left where they are."""

_MOST = 2**31 - 1
"""Pods that ask for room may be evicted as often as it takes."""
_POD_GROUPS = (
    "scheduling.k8s.io/group-name",
    "scheduling.x-k8s.io/pod-group",
    "pod-group.scheduling.sigs.k8s.io",
    "pod-group.scheduling.sigs.k8s.io/name",
)
"""By which schedulers know the pods of a gang; these are none of it, and would be held back until it is complete."""
_SMALL = {"cpu": "100m", "memory": "256Mi"}


def room(plan: RunPlan, *, num_pods: int) -> Object:
    """Pods that find a node where pods of the gang would find one, and do nothing there."""
    template = pod.template(plan, host="")
    container = template["spec"]["containers"][0]
    container |= {"command": ["python", "-c", "import signal; signal.pause()"], "env": [pod.NO_DEVICES]}
    for key in ("envFrom", "ports"):
        container.pop(key, None)
    template["spec"]["terminationGracePeriodSeconds"] = 0  # they are in the way of what they made room for
    return _job(plan, naming.room_name(plan.job_name, plan.attempt), naming.ROLE_ROOM, template, num_pods=num_pods)


def removal(plan: RunPlan) -> Object:
    """One pod that deletes the run from the store; it needs no GPU and none of the user's variables."""
    template = pod.template(plan, host="")
    container = template["spec"]["containers"][0]
    container |= {
        "command": ["python", "-m", "nexa_train.removal"],
        "resources": {"requests": dict(_SMALL), "limits": dict(_SMALL)},
        "env": [*(each for each in container["env"] if each != pod.NO_DEVICES), pod.NO_DEVICES],
    }
    container.pop("ports", None)
    template["spec"]["terminationGracePeriodSeconds"] = 0  # it has nothing to finish: another one begins where it ended
    document = _job(plan, naming.removal_name(plan.job_name), naming.ROLE_REMOVAL, template, num_pods=1)
    document["spec"] |= {"backoffLimit": 3, "activeDeadlineSeconds": REMOVAL_SECONDS}
    return document


def _job(plan: RunPlan, name: str, role: str, template: Object, *, num_pods: int) -> Object:
    metadata = pod.gang_metadata(plan) | {"name": name}
    metadata["labels"] = {**pod.labels(plan), naming.LABEL_ROLE: role}
    for told in ("labels", "annotations"):
        of_gang = template["metadata"][told]
        template["metadata"][told] = {key: of_gang[key] for key in of_gang if key not in _POD_GROUPS}
    template["metadata"]["labels"][naming.LABEL_ROLE] = role
    spec = {"parallelism": num_pods, "completions": num_pods, "backoffLimit": _MOST, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}

"""What the operator says to Kueue and to schedulers, by labels and annotations, and what Kueue answers. Pure.

Kueue owns `suspend` and the scheduling fields of whatever carries its label: the operator creates that suspended
and patches neither. A queue's order and preemption go by the pods' PriorityClass, which Kueue reads by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nexa_operator.kinds import WORKLOADS
from nexa_operator.plan import RunPlan
from nexa_operator.reading import Body, condition_of

LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
LABEL_PRIORITY = "kueue.x-k8s.io/priority-class"
"""Of a WorkloadPriorityClass, which wins over the pods' PriorityClass in the queue and nowhere else."""
ANNOTATION_GANG_SIZE = "scheduling.volcano.sh/group-min-member"
"""Volcano reads it of a pod's owner, where that is a Job, and makes the PodGroup by itself."""
LABEL_GANG_UID = "kueue.x-k8s.io/job-uid"


def labels(queue: str | None, pod_labels: Mapping[str, str]) -> dict[str, str]:
    """What Kueue looks for on the gang's object."""
    if queue is None:
        return {}
    kept = {LABEL_PRIORITY: pod_labels[LABEL_PRIORITY]} if LABEL_PRIORITY in pod_labels else {}
    return {LABEL_QUEUE: queue, **kept}


def gang_hint(plan: RunPlan) -> Mapping[str, Mapping[str, str]]:
    """Metadata of a Job whose pods are to start together or not at all, for a scheduler that was asked for by name.

    With `minNodes` so many are enough: by how many more find a node the next attempt's size is decided.
    """
    return {} if plan.scheduler is None else {"annotations": {ANNOTATION_GANG_SIZE: str(plan.min_pods)}}


def waits_for(queue: str, workloads: Iterable[Body] | None) -> str:
    """Why a gang is not admitted, in Kueue's words where it has said any; no list: the cluster has no Kueue."""
    waits = f"waits for admission by queue {queue}"
    if workloads is None:
        return f"{waits}, and the cluster does not serve {WORKLOADS.plural}.{WORKLOADS.group}: install Kueue"
    said = (condition_of(workload.get("status") or {}, "QuotaReserved") for workload in workloads)
    why = next((condition.get("message", "") for condition in said if condition.get("status") == "False"), "")
    return f"{waits}: {why}" if why else waits

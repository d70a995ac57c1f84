"""RunPlan -> the parts that all runtimes share: the pod, its Service, labels and owner. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from nexa_operator import naming, queueing
from nexa_operator.kinds import SERVICES, Kind
from nexa_operator.plan import RunPlan
from nexa_operator.runtimes.base import Object
from nexa_train.config import API_VERSION, KIND
from nexa_train.config.protocol import (
    ENV_GANG,
    ENV_NODE_ADDRESS,
    ENV_RDZV_ENDPOINT,
    PROGRESS_PORT,
    RDZV_PORT,
    TERMINATION_LOG,
)
from nexa_train.config.spec import Toleration, Volume

CONTAINER = "trainer"
USER_ID = 65532
NODE_TROUBLE_SECONDS = {"node.kubernetes.io/unreachable": 5, "node.kubernetes.io/not-ready": 30}
"""A node that is silent was given its time before the taint; one that is not ready may only restart its runtime."""

NO_DEVICES: Object = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"}
"""An image may say `all`, by which NVIDIA's container runtime would give a pod every GPU of its node, asked for or not.
Where GPUs are asked for their plugin says which."""

_MEETING: tuple[Object, ...] = (
    {"name": ENV_NODE_ADDRESS, "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    # Never twice, while an attempt of one number can come twice: where a job's status was lost.
    {
        "name": ENV_GANG,
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}},
    },
)


def services(plan: RunPlan) -> tuple[tuple[Kind, Object], ...]:
    """What gives every pod a host name where they need one, from before it is ready: ranks must find pod 0 for that."""
    if plan.service is None:
        return ()
    service: Object = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": plan.service,
            "namespace": plan.namespace,
            "labels": _owner_labels(plan),
            "ownerReferences": [_owner_reference(plan)],
        },
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": _owner_labels(plan),
            "ports": [
                {"name": "rendezvous", "port": RDZV_PORT, "protocol": "TCP"},
                {"name": "progress", "port": PROGRESS_PORT, "protocol": "TCP"},
            ],
        },
    }
    return ((SERVICES, service),)


def host_of(plan: RunPlan, pod: str) -> str | None:
    """The host name that the Service gives to the pod of a name; None: there is no Service."""
    return None if plan.service is None else f"{pod}.{plan.service}.{plan.namespace}"


def gang_metadata(plan: RunPlan) -> Object:
    """Of the object that carries the gang."""
    return {
        "name": plan.name,
        "namespace": plan.namespace,
        "labels": {
            **labels(plan),
            naming.LABEL_NODES: str(plan.cluster.num_nodes),
            **queueing.labels(plan.queue, plan.cluster.labels),
        },
        "ownerReferences": [_owner_reference(plan)],
    }


def template(
    plan: RunPlan, *, host: str | None, container: str = CONTAINER, variables: Sequence[Object] = ()
) -> Object:
    """The template of every pod of the gang.

    Args:
        host: where pod 0 is found; None: the pods meet in the artifact store, where there are several.
        container: the trainer's name.
        variables: of the environment, besides the protocol's and the user's.
    """
    return {
        "metadata": {
            # Ours win: they are how the operator and the Service find the pods.
            "labels": {**plan.cluster.labels, **labels(plan)},
            "annotations": dict(plan.cluster.annotations),
        },
        "spec": _pod_spec(plan, _container(plan, host, container, variables)),
    }


def labels(plan: RunPlan) -> dict[str, str]:
    """By which the operator finds whatever belongs to an attempt."""
    return {**_owner_labels(plan), naming.LABEL_ATTEMPT: str(plan.attempt)}


def _owner_labels(plan: RunPlan) -> dict[str, str]:
    return {naming.LABEL_JOB_UID: plan.owner_uid, naming.LABEL_JOB_NAME: plan.job_name}


def _owner_reference(plan: RunPlan) -> Object:
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": plan.job_name,
        "uid": plan.owner_uid,
        "controller": True,
        # True would need the right to update finalizers, and only slows deletion down.
        "blockOwnerDeletion": False,
    }


def _pod_spec(plan: RunPlan, container: Object) -> Object:
    spec: Object = {
        "restartPolicy": "Never",
        **({} if plan.service is None else {"subdomain": plan.service}),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": plan.grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "nexa-tmp", "emptyDir": {}},
            {"name": "nexa-shm", "emptyDir": {"medium": "Memory"}},
            *(_volume(volume) for volume in plan.cluster.volumes),
        ],
    }
    if plan.cluster.node_selector:
        spec["nodeSelector"] = dict(plan.cluster.node_selector)
    spec["tolerations"] = [*(_toleration(toleration) for toleration in plan.cluster.tolerations), *_stays(plan)]
    if plan.excluded_nodes:
        spec["affinity"] = {"nodeAffinity": _away_from(plan.excluded_nodes)}
    if plan.priority_class is not None:
        spec["priorityClassName"] = plan.priority_class
    if plan.scheduler is not None:
        spec["schedulerName"] = plan.scheduler
    return spec


def _away_from(nodes: Sequence[str]) -> Object:
    # By the node's name, which its labels need not repeat; the API takes one name a requirement.
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    return {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": fields}]}}


def _container(plan: RunPlan, host: str | None, name: str, variables: Sequence[Object]) -> Object:
    container: Object = {
        "name": name,
        "image": plan.image,
        "imagePullPolicy": "IfNotPresent",
        "ports": [{"name": "progress", "containerPort": PROGRESS_PORT, "protocol": "TCP"}],
        "env": [*_environment(plan, host), *variables],
        "terminationMessagePath": TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",  # of what dies whole only its log is left
        "resources": _resources(plan),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [
            {"name": "nexa-tmp", "mountPath": "/tmp"},  # noqa: S108 - a path in the pod
            {"name": "nexa-shm", "mountPath": "/dev/shm"},  # noqa: S108
            *(_mount(volume) for volume in plan.cluster.volumes),
        ],
    }
    if plan.storage is not None:
        profile = f"{naming.STORAGE_PREFIX}{plan.storage}"
        container["envFrom"] = [{"configMapRef": {"name": profile}}, {"secretRef": {"name": profile}}]
    return container


def _environment(plan: RunPlan, host: str | None) -> list[Object]:
    """The last of two equal names wins, so the protocol's variables stand behind the user's."""
    ours = {**dict(plan.environment), **({} if host is None else {ENV_RDZV_ENDPOINT: f"{host}:{RDZV_PORT}"})}
    values = {"HOME": "/tmp", **{item.name: item.value for item in plan.cluster.env}, **ours}  # noqa: S108
    # A dollar in a value would be expanded; doubling it is how Kubernetes spells a dollar.
    said = [{"name": name, "value": value.replace("$", "$$")} for name, value in values.items()]
    if not plan.asks_for_gpus:
        said.append(NO_DEVICES)
    return [*said, *_MEETING] if host is None and plan.cluster.num_nodes > 1 else said


def _resources(plan: RunPlan) -> Object:
    amounts = {"cpu": plan.cluster.resources.cpu, "memory": plan.cluster.resources.memory}
    if plan.cluster.gpus_per_node:
        amounts[plan.cluster.gpu_resource] = str(plan.cluster.gpus_per_node)
    amounts |= {name: str(count) for name, count in sorted(plan.cluster.resources.extended.items())}
    given = {name: amount for name, amount in amounts.items() if amount is not None}
    return {"requests": given, "limits": given} if given else {}


def _stays(plan: RunPlan) -> list[Object]:
    """How long a pod is left on a node in trouble; without these the server says 300 s for both."""
    told = {toleration.key for toleration in plan.cluster.tolerations}
    return [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds}
        for key, seconds in NODE_TROUBLE_SECONDS.items()
        if key not in told
    ]


def _toleration(toleration: Toleration) -> Object:
    return toleration.model_dump(mode="json", by_alias=True, exclude_none=True)


def _volume(volume: Volume) -> Object:
    if volume.claim is not None:
        claim = {"claimName": volume.claim, "readOnly": volume.read_only}
        return {"name": volume.name, "persistentVolumeClaim": claim}
    return {"name": volume.name, "configMap": {"name": volume.config_map}}


def _mount(volume: Volume) -> Object:
    return {"name": volume.name, "mountPath": volume.mount_path, "readOnly": volume.read_only}

"""The sides of `benchmarks.operator`: what a job of two pods is to each, and how its controller is started."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import yaml

from benchmarks.fleet import NAMESPACE, Object, Side, condition_is_true
from benchmarks.machine import REPOSITORY
from nexa_operator.plan import Defaults, make_plan
from nexa_operator.runtimes import job as job_runtime
from nexa_train.config import API_VERSION, GROUP, KIND, PLURAL, VERSION
from nexa_train.config.load import job_from_object
from tests.cluster.control_plane import ControlPlane
from tests.cluster.controllers import start_training_operator
from tests.cluster.process import Process, start
from tests.cluster.run import run
from tests.cluster.tools import TOOLS, binary

OPERATOR_NAMESPACE = "nexa-system"
OPERATOR_USER = f"system:serviceaccount:{OPERATOR_NAMESPACE}:nexa"
IMAGE = "trainer:benchmark"

_JOBS = "/apis/batch/v1/namespaces/{}/jobs"
_PYTORCH_JOBS = "/apis/kubeflow.org/v1/namespaces/{}/pytorchjobs"
_TRAINING_JOBS = f"/apis/{GROUP}/{VERSION}/namespaces/{{}}/{PLURAL}"


def plain() -> Side:
    """Nobody but Kubernetes: the least that has two pods with an index each."""

    def job(name: str) -> Object:
        pod = {"restartPolicy": "Never", "containers": [{"name": "trainer", "image": IMAGE}]}
        spec = {"completionMode": "Indexed", "completions": 2, "parallelism": 2, "backoffLimit": 0}
        return _named(name, apiVersion="batch/v1", kind="Job", spec=spec | {"template": {"spec": pod}})

    return Side("plain Jobs", _JOBS, job, _complete)


def by_hand() -> Side:
    """The very Job that Nexa makes: ranks find each other, nobody looks after them."""

    def job(name: str) -> Object:
        described = job_from_object(_training_job(name))
        plan = make_plan(described, owner_uid=name, attempt=0, defaults=Defaults(image=IMAGE))
        ((_, gang),) = job_runtime.objects(plan)
        del gang["metadata"]["ownerReferences"]
        gang["metadata"]["name"] = name
        return gang

    return Side("the same by hand", _JOBS, job, _complete)


def nexa() -> Side:
    """The operator as its chart installs it, with its rights and its defaults, as a process of this machine."""
    return Side("nexa", _TRAINING_JOBS, _training_job, _succeeded, begin=_begin_nexa)


def training_operators() -> tuple[list[Side], list[str]]:
    """The training-operator as it ships (its client's limits are no setting), or the reason why not."""
    if not TOOLS["trainingoperator"].built:
        return [], ["training-operator: left out, not built (python -m tests.cluster.tools trainingoperator)"]
    return [Side("training-operator", _PYTORCH_JOBS, _pytorch_job, _succeeded, begin=start_training_operator)], []


def _complete(body: Object) -> bool:
    return condition_is_true(body, "Complete")


def _succeeded(body: Object) -> bool:
    return condition_is_true(body, "Succeeded")


def _named(name: str, **more: object) -> Object:
    return {**more, "metadata": {"name": name, "namespace": NAMESPACE}}


def _pytorch_job(name: str) -> Object:
    pod = {"containers": [{"name": "pytorch", "image": IMAGE}]}
    replicas = {role: {"replicas": 1, "template": {"spec": pod}} for role in ("Master", "Worker")}
    spec = {"pytorchReplicaSpecs": replicas}
    return _named(name, apiVersion="kubeflow.org/v1", kind="PyTorchJob", spec=spec)


def _training_job(name: str) -> Object:
    spec = {
        "data": {"remoteUri": "stdlib:docstrings"},
        "training": {"maxSteps": 10, "globalBatchSize": 8},
        "artifacts": {"uri": "s3://models"},
        "cluster": {"numNodes": 2},
    }
    return _named(name, apiVersion=API_VERSION, kind=KIND, spec=spec)


def _begin_nexa(plane: ControlPlane) -> Process:
    plane.kubectl("create", "namespace", OPERATOR_NAMESPACE)
    chart = run([binary("helm"), "template", "nexa", REPOSITORY / "helm" / "nexa", "--namespace", OPERATOR_NAMESPACE])
    # Without the Deployment: the operator is a process here.
    items = [item for item in yaml.safe_load_all(chart.stdout) if item and item["kind"] != "Deployment"]
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": items})
    plane.kubectl("apply", "--server-side", "--filename=-", input=everything)
    plane.kubectl("wait", "--for=condition=Established", "--timeout=30s", f"crd/{PLURAL}.{GROUP}")
    token = plane.kubectl("--namespace", OPERATOR_NAMESPACE, "create", "token", "nexa").stdout.strip()
    environment = {
        "KUBECONFIG": str(_kubeconfig_with(plane, token)),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "operator")]),
        "NEXA_TRAINER_IMAGE": IMAGE,
        "NEXA_METRICS_PORT": "0",
        "NEXA_LEASE_NAMESPACE": OPERATOR_NAMESPACE,
    }
    operator = start(plane.ledger, "controller", [sys.executable, "-m", "nexa_operator.main"], env=environment)
    held = '"event": "lease"'
    operator.wait_until(lambda: held in operator.log.read_text(), timeout_seconds=60, what="holds its Lease")
    return operator


def _kubeconfig_with(plane: ControlPlane, token: str) -> Path:
    """The cluster's, with the rights of a token and no others."""
    config = yaml.safe_load(plane.kubeconfig.read_text())
    config["users"] = [{"name": user["name"], "user": {"token": token}} for user in config["users"]]
    file = plane.ledger.folder / "operator.kubeconfig"
    file.write_text(json.dumps(config))
    return file

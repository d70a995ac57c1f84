"""Controllers that others make, as processes before a control plane: JobSet, Kueue, training-operator.

Comes after `control_plane`. Each brings its CRDs and its webhooks, which the API server reaches on loopback; those that
only say something about pods, Deployments and kinds that Nexa does not make are left out. They go with the cluster.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.control_plane import ControlPlane
from tests.cluster.network import answers, free_ports
from tests.cluster.process import Process, start
from tests.cluster.run import wait_until
from tests.cluster.tools import binary, module_files

_LOOPBACK = "127.0.0.1"
_READY_SECONDS = 60
_TRAINING_OPERATOR = "trainingoperator"
_LIMITS = {"qps": 500, "burst": 1000}

Object = dict[str, Any]


def start_jobset(plane: ControlPlane) -> Process:
    """JobSet's controller with its webhooks for JobSets."""
    return _start_configured(
        plane,
        tool="jobset",
        api_version="config.jobset.x-k8s.io/v1alpha1",
        resources={"jobsets"},
    )


def start_kueue(plane: ControlPlane) -> Process:
    """Kueue's controller, which manages what names a queue: Jobs, JobSets and PyTorchJobs."""
    own = {"clusterqueues", "cohorts", "localqueues", "resourceflavors", "workloads", "workloads/status"}
    return _start_configured(
        plane,
        tool="kueue",
        api_version="config.kueue.x-k8s.io/v1beta1",
        resources={"jobs", "jobsets", "pytorchjobs", *own},
        manageJobsWithoutQueueName=False,
        integrations={"frameworks": ["batch/job", "jobset.x-k8s.io/jobset", "kubeflow.org/pytorchjob"]},
        featureGates={"MultiKueue": False, "ProvisioningACC": False, "VisibilityOnDemand": False},
    )


def start_training_operator(plane: ControlPlane) -> Process:
    """training-operator for PyTorchJobs, with its webhook.

    It makes its certificate itself, for the name of a Service, and reads it from a folder into which its Deployment
    mounts it. So it is started twice: to make it, and with it.
    """
    namespace, name = "kubeflow", "training-operator"
    _serve_crds(plane, _TRAINING_OPERATOR)
    port, probe = free_ports(2)
    external = {"type": "ExternalName", "externalName": "localhost"}
    secret = f"{name}-webhook-cert"
    _apply(
        plane,
        [
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret, "namespace": namespace}},
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": name, "namespace": namespace},
                "spec": external,
            },
            *_webhooks(
                _TRAINING_OPERATOR,
                {"pytorchjobs"},
                lambda path: {"service": {"name": name, "namespace": namespace, "port": port, "path": path}},
                name="validator.training-operator.kubeflow.org",
            ),
        ],
    )
    folder = plane.ledger.folder / name
    serving = folder / "k8s-webhook-server" / "serving-certs"
    serving.mkdir(parents=True)
    command: list[str | Path] = [
        binary("training-operator"),
        f"--kubeconfig={plane.kubeconfig}",
        "--enable-scheme=pytorchjob",
        "--metrics-bind-address=0",
        f"--health-probe-bind-address={_LOOPBACK}:{probe}",
        f"--webhook-server-port={port}",
    ]
    environment = {"MY_POD_NAMESPACE": namespace, "TMPDIR": str(folder)}

    def certificate() -> dict[str, str] | None:
        shown = plane.kubectl("--namespace", namespace, "get", f"secret/{secret}", "--output=json")
        data: dict[str, str] = json.loads(shown.stdout).get("data") or {}
        return data if "tls.crt" in data else None

    first = start(plane.ledger, name, command, env=environment)
    made = wait_until(certificate, timeout_seconds=_READY_SECONDS, what="a certificate", detail=first.said)
    first.stop()
    for part in ("tls.crt", "tls.key"):
        (serving / part).write_bytes(base64.b64decode(made[part]))
    # It looks whether a certificate is mounted here, whatever TMPDIR says, and reads another.
    mounted = Path("/tmp/k8s-webhook-server/serving-certs/tls.crt")
    mounted.parent.mkdir(parents=True, exist_ok=True)
    mounted.touch()
    second = start(plane.ledger, name, command, env=environment)
    _wait_ready(second, probe)
    mounted.unlink(missing_ok=True)  # it looked when it started
    for parent in mounted.parents[:2]:
        with suppress(OSError):  # somebody else's, or another start's
            parent.rmdir()
    return second


def _start_configured(
    plane: ControlPlane, *, tool: str, api_version: str, resources: Collection[str], **more: object
) -> Process:
    """One that reads a file of settings and takes certificates that others made."""
    _serve_crds(plane, tool)
    port, probe = free_ports(2)
    folder = plane.ledger.folder / tool
    folder.mkdir()
    plane.pki.issue(tool, subject=f"/CN={tool}", addresses=[_LOOPBACK])
    shutil.copyfile(plane.pki.certificate(tool), folder / "tls.crt")
    shutil.copyfile(plane.pki.key(tool), folder / "tls.key")
    settings = {
        "apiVersion": api_version,
        "kind": "Configuration",
        "leaderElection": {"leaderElect": False},
        "metrics": {"bindAddress": "0"},
        "health": {"healthProbeBindAddress": f"{_LOOPBACK}:{probe}"},
        "webhook": {"host": _LOOPBACK, "port": port, "certDir": str(folder)},
        "internalCertManagement": {"enable": False},
        "clientConnection": _LIMITS,
        **more,
    }
    file = folder / "settings.yaml"
    file.write_text(json.dumps(settings))
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"{tool}-system"}}
    _apply(plane, [namespace])
    command: list[str | Path] = [binary(tool), f"--config={file}"]
    process = start(plane.ledger, tool, command, env={"KUBECONFIG": str(plane.kubeconfig)})
    _wait_ready(process, probe)
    authority = base64.b64encode(plane.pki.ca.read_bytes()).decode()

    def client(path: str) -> Object:
        return {"url": f"https://{_LOOPBACK}:{port}{path}", "caBundle": authority}

    _apply(plane, _webhooks(tool, resources, client, name=tool))
    return process


def _wait_ready(process: Process, probe: int) -> None:
    ready = f"http://{_LOOPBACK}:{probe}/readyz"
    process.wait_until(lambda: answers(ready), timeout_seconds=_READY_SECONDS, what="/readyz")


def _serve_crds(plane: ControlPlane, tool: str) -> None:
    documents = [each for each in _shipped(tool) if each["kind"] == "CustomResourceDefinition"]
    _apply(plane, documents)
    names = [f"crd/{each['metadata']['name']}" for each in documents]
    established = ("wait", "--for=condition=Established", f"--timeout={_READY_SECONDS}s", *names)
    # kubectl gives up on one that has no conditions yet.
    wait_until(lambda: plane.kubectl(*established), timeout_seconds=_READY_SECONDS, what=f"CRDs of {tool} are served")


def _webhooks(tool: str, resources: Collection[str], client: Callable[[str], Object], *, name: str) -> list[Object]:
    """What the module ships, for these resources alone, reached otherwise than in a cluster."""
    configurations = [each for each in _shipped(tool) if each["kind"].endswith("WebhookConfiguration")]
    for configuration in configurations:
        configuration["metadata"] = {"name": name}
        kept = [hook for hook in configuration["webhooks"] if _touches(hook, resources)]
        for hook in kept:
            hook["clientConfig"] = client(hook["clientConfig"]["service"]["path"])
        configuration["webhooks"] = kept
    return configurations


def _touches(hook: Object, resources: Collection[str]) -> bool:
    return any(resource in resources for rule in hook["rules"] for resource in rule["resources"])


def _shipped(tool: str) -> list[Object]:
    return [each for file in module_files(tool) for each in yaml.safe_load_all(file.read_text()) if each]


def _apply(plane: ControlPlane, documents: list[Object]) -> None:
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})
    plane.kubectl("apply", "--server-side", "--filename=-", input=everything)

"""An operator as a process, a namespace to use it in, and the chart's rights: what the tests of this folder share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from nexa_operator.kinds import TRAINING_JOBS
from nexa_train.config.protocol import CheckpointRef, Termination
from tests.cluster.api import Api, Refused
from tests.cluster.cluster import Cluster
from tests.cluster.errors import ClusterError
from tests.cluster.run import run, wait_until
from tests.cluster.tools import binary

ROOT = Path(__file__).resolve().parents[2]
STARTED_SECONDS = 30
REACTED_SECONDS = 60


class Operator:
    """`python -m nexa_operator.main`, started, killed and started again."""

    def __init__(self, kubeconfig: Path, log: Path, **environment: str) -> None:
        self._log, self.kubeconfig = log, kubeconfig
        self._environment = {
            **os.environ,
            "KUBECONFIG": str(kubeconfig),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "operator")]),
            "NEXA_TRAINER_IMAGE": "trainer:test",
            "NEXA_METRICS_PORT": "0",
            "NEXA_PROGRESS_INTERVAL_SECONDS": "1",
            **environment,
        }
        self.process = self._spawn()

    def _spawn(self) -> subprocess.Popen[bytes]:
        with self._log.open("a") as sink:
            return subprocess.Popen(
                [sys.executable, "-m", "nexa_operator.main"], env=self._environment, stderr=sink, cwd=self._log.parent
            )

    def start(self) -> None:
        """Start it anew, and never two: one that still runs is killed first."""
        self.kill()
        self.process = self._spawn()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=15)

    @property
    def said(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]

    def metrics(self) -> str:
        """What it tells Prometheus now, where it was started once."""
        (port,) = (record["metrics_port"] for record in self.said if record["event"] == "started")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())


class Namespace:
    """One namespace of the cluster, and what a test does in it."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace

    def kubectl(self, *arguments: str, **options: Any) -> str:
        return self.cluster.kubectl("--namespace", self.namespace, *arguments, **options).stdout

    def get(self, what: str) -> dict[str, Any] | None:
        done = self.cluster.kubectl("--namespace", self.namespace, "get", what, "--output=json", check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def list(self, kind: str) -> list[dict[str, Any]]:
        return json.loads(self.kubectl("get", kind, "--output=json"))["items"]

    def submit(self, name: str, *, nodes: int = 2, **spec: Any) -> None:
        self.kubectl("create", "--filename=-", input=json.dumps(manifest(name, nodes=nodes, **spec)))

    def job(self, name: str) -> dict[str, Any]:
        seen = self.get(f"ntj/{name}")
        assert seen is not None
        return seen

    def status(self, name: str) -> dict[str, Any]:
        return self.job(name).get("status", {})

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        return next((item for item in self.status(name).get("conditions", []) if item["type"] == kind), {})

    def wait_true(self, name: str, kind: str) -> dict[str, Any]:
        def is_true() -> dict[str, Any] | None:
            condition = self.condition(name, kind)
            return condition if condition.get("status") == "True" else None

        return self.wait(is_true, f"{name} is {kind}", name)

    def wait(self, seen: Callable[[], Any], what: str, name: str = "") -> Any:
        detail = (lambda: json.dumps(self.status(name), indent=1)) if name else (lambda: "")
        return wait_until(seen, timeout_seconds=REACTED_SECONDS, what=what, detail=detail)

    def pods(self, gang: str) -> list[dict[str, Any]]:
        pods = [pod for pod in self.list("pods") if pod["metadata"]["labels"].get("job-name") == gang]
        return sorted(
            pods, key=lambda pod: pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index", "")
        )

    def wait_pods(self, gang: str, count: int) -> list[dict[str, Any]]:
        return self.wait(lambda: pods if len(pods := self.pods(gang)) == count else None, f"{count} pods of {gang}")

    def bind(self, pods: list[dict[str, Any]], node: str) -> None:
        """Where no kubelet is, a pod that is deleted stays."""
        for name in (pod["metadata"]["name"] for pod in pods):
            target = {"kind": "Node", "name": node}
            binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
            where = f"/api/v1/namespaces/{self.namespace}/pods/{name}/binding"
            self.kubectl("create", "--raw", where, "--filename=-", input=json.dumps(binding))

    def play_kubelet(self, pod: dict[str, Any], phase: str, *, words: Termination | None = None, **more: Any) -> None:
        """Set a pod's status as a kubelet would."""
        status = pod_status(phase, words=words, **more)
        name = pod["metadata"]["name"]
        self.kubectl(
            "patch", f"pod/{name}", "--subresource=status", "--type=merge", f"--patch={json.dumps({'status': status})}"
        )


NAMED = {
    "artifacts": {"uri": "/mnt/models"},
    "cluster": {
        "volumes": [{"name": "models", "mountPath": "/mnt/models", "claim": "models", "readOnly": False}],
    },
}
"""Pods of such a job find each other by the names that a Service gives them."""


def manifest(name: str, *, nodes: int = 2, **spec: Any) -> dict[str, Any]:
    """A small valid job; a keyword replaces or adds a group."""
    return {
        "apiVersion": "train.nexa.dev/v1alpha1",
        "kind": "NexaTrainingJob",
        "metadata": {"name": name},
        "spec": {
            "data": {"remoteUri": "stdlib:docstrings"},
            "training": {"maxSteps": 10, "globalBatchSize": 8},
            "artifacts": {"uri": "s3://models"},
            "cluster": {"numNodes": nodes, **spec.pop("cluster", {})},
            **spec,
        },
    }


def create_job(api: Api, namespace: str, name: str, spec: dict[str, Any]) -> bool:
    """A NexaTrainingJob of that spec; False if an admission policy of the chart's denies it."""
    try:
        api.create(TRAINING_JOBS.path(namespace), {**manifest(name), "spec": spec})
    except Refused as refused:
        if "ValidatingAdmissionPolicy" not in refused.message:
            raise
        return False
    return True


def pod_status(phase: str, *, words: Termination | None = None, **more: Any) -> dict[str, Any]:
    """A pod's status as a kubelet would write it."""
    state: dict[str, Any] = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    if phase in ("Succeeded", "Failed"):
        code = words.exit_code if words else (0 if phase == "Succeeded" else 1)
        state = {"terminated": {"exitCode": more.pop("code", code), "reason": "Completed" if not code else "Error"}}
        if words:
            state["terminated"]["message"] = words.as_bytes().decode()
    name = more.pop("container", "trainer")
    trainer = {"name": name, "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    return {"phase": phase, "containerStatuses": [trainer], **more}


@contextmanager
def new_namespace(cluster: Cluster) -> Iterator[Namespace]:
    """One in which pods can be made; deleted afterwards."""
    namespace = f"t-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", namespace)
    wait_until(
        lambda: cluster.kubectl("-n", namespace, "get", "sa/default", check=False).returncode == 0,
        timeout_seconds=STARTED_SECONDS,
        what="service account",
    )
    yield Namespace(cluster, namespace)
    cluster.kubectl("delete", "namespace", namespace, "--wait=false", "--ignore-not-found")


QUEUE = "team"


def open_queue(cluster: Cluster, namespace: str, **quota: str) -> None:
    """Kueue's LocalQueue `QUEUE`, with a quota of its own, in which what is of lower priority gives way."""
    flavor = {"name": namespace, "resources": [{"name": key, "nominalQuota": amount} for key, amount in quota.items()]}
    spec = {
        "namespaceSelector": {},
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [{"coveredResources": list(quota), "flavors": [flavor]}],
    }
    documents: list[dict[str, Any]] = [
        {"kind": "ResourceFlavor", "metadata": {"name": namespace}, "spec": {}},
        {"kind": "ClusterQueue", "metadata": {"name": namespace}, "spec": spec},
        {
            "kind": "LocalQueue",
            "metadata": {"name": QUEUE, "namespace": namespace},
            "spec": {"clusterQueue": namespace},
        },
    ]
    for document in documents:
        document["apiVersion"] = "kueue.x-k8s.io/v1beta1"
    apply_all(cluster, documents)


RELEASE_NAMESPACE = "nexa-system"
OPERATOR_USER = f"system:serviceaccount:{RELEASE_NAMESPACE}:nexa"


def prepare_operator(cluster: Cluster, folder: Path) -> Path:
    """Install all that an operator needs; returns its kubeconfig."""
    cluster.kubectl("create", "namespace", RELEASE_NAMESPACE, check=False)
    install_chart(cluster)
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=30s", "crd/nexatrainingjobs.train.nexa.dev")
    return kubeconfig_of_operator(cluster, folder)


def install_chart(cluster: Cluster, *values: str) -> None:
    """All of the chart but its Deployment: the operator of these tests is a process on this machine."""
    documents = render_chart(*values)
    apply_all(cluster, documents, "--dry-run=server")
    apply_all(cluster, [item for item in documents if item["kind"] != "Deployment"])


def render_chart(*values: str) -> list[dict[str, Any]]:
    try:
        helm = binary("helm")
    except ClusterError as exc:
        pytest.skip(f"no helm: {str(exc).splitlines()[0]}")
    chosen = [argument for value in values for argument in ("--set", value)]
    done = run([helm, "template", "nexa", ROOT / "helm" / "nexa", "--namespace", RELEASE_NAMESPACE, *chosen])
    return [item for item in yaml.safe_load_all(done.stdout) if item]


def apply_all(cluster: Cluster, documents: list[dict[str, Any]], *options: str) -> None:
    everything = json.dumps({"apiVersion": "v1", "kind": "List", "items": documents})
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "--filename=-", *options, input=everything)


def kubeconfig_of_operator(cluster: Cluster, folder: Path) -> Path:
    """With the rights of the chart's ServiceAccount and no others."""
    token = cluster.kubectl("--namespace", RELEASE_NAMESPACE, "create", "token", "nexa").stdout.strip()
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    config["users"] = [{"name": user["name"], "user": {"token": token}} for user in config["users"]]
    file = folder / "kubeconfig"
    file.write_text(json.dumps(config))
    return file


def kubeconfig_through(endpoint: str, kubeconfig: Path, file: Path) -> Path:
    """The same rights by way of a proxy that speaks plain HTTP."""
    config = yaml.safe_load(kubeconfig.read_text())
    config["clusters"] = [{"name": cluster["name"], "cluster": {"server": endpoint}} for cluster in config["clusters"]]
    file.write_text(json.dumps(config))
    return file


def words(**given: Any) -> Termination:
    return Termination.model_validate({"run_id": "r", "exit_code": 0, "cause": "Succeeded", **given})


CHECKPOINT = CheckpointRef(
    step=10, uri="s3://models/checkpoints/r/step-00000010", digest="d" * 64, weights_digest="w" * 64
)

"""The real node that the other e2e tests stand on: restricted pods run, find each other by name, and leave nothing."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator

import pytest

from tests.cluster import host
from tests.cluster.cluster import ExternalCluster
from tests.cluster.footprint import footprint
from tests.cluster.images import PAUSE_IMAGE, pause_archive
from tests.cluster.minio import MinioServer
from tests.cluster.node import RealCluster, start_real_cluster
from tests.cluster.run import wait_until

pytestmark = pytest.mark.e2e

AnyCluster = RealCluster | ExternalCluster

_RESTRICTED_POD = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
_RESTRICTED_CONTAINER = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@pytest.fixture(scope="session")
def busybox(real_cluster: AnyCluster) -> str:
    """The image of the pods here; a cluster that the tests start has it already."""
    if isinstance(real_cluster, ExternalCluster):
        real_cluster.load_image(pause_archive())
    return PAUSE_IMAGE


@pytest.fixture
def namespace(real_cluster: AnyCluster, busybox: str) -> Iterator[str]:
    """One that admits only pods of the restricted kind."""
    name = f"node-{secrets.token_hex(3)}"
    real_cluster.kubectl("create", "namespace", name)
    real_cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    wait_until(
        lambda: (
            real_cluster.kubectl("get", "serviceaccount/default", f"--namespace={name}", check=False).returncode == 0
        ),
        timeout_seconds=30,
        what=f"namespace {name} has its service account",
    )
    yield name
    real_cluster.kubectl("delete", "namespace", name, "--timeout=60s")


def a_gang(name: str, script: str, *, num_pods: int = 2, env: dict[str, str] | None = None) -> list[dict[str, object]]:
    """A headless Service and an indexed Job whose pods have names under it, as Nexa makes them."""
    container = {
        "name": "main",
        "image": PAUSE_IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["/bin/sh", "-ec", script],
        "env": [{"name": key, "value": value} for key, value in (env or {}).items()],
        "securityContext": _RESTRICTED_CONTAINER,
        "resources": {"limits": {"cpu": "500m", "memory": "64Mi"}},
    }
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": _RESTRICTED_POD,
        "containers": [container],
    }
    template = {"metadata": {"labels": {"gang": name}}, "spec": pod}
    job = {"completionMode": "Indexed", "completions": num_pods, "parallelism": num_pods, "backoffLimit": 0}
    service = {"clusterIP": "None", "selector": {"gang": name}, "publishNotReadyAddresses": True}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {**job, "template": template}},
    ]


def run_gang(cluster: AnyCluster, namespace: str, objects: list[dict[str, object]]) -> dict[str, str]:
    """Apply, wait for the end, and return each pod's log by its index."""
    in_namespace = f"--namespace={namespace}"
    document = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    cluster.kubectl("apply", in_namespace, "--filename=-", input=document)
    job = wait_until(
        lambda: _ended(json.loads(cluster.kubectl("get", "jobs", in_namespace, "--output=json").stdout)["items"][0]),
        timeout_seconds=90,
        what="the Job ended",
        detail=lambda: cluster.kubectl("describe", "pods", in_namespace).stdout,
    )
    logs = {
        pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]: cluster.kubectl(
            "logs", in_namespace, pod["metadata"]["name"]
        ).stdout
        for pod in json.loads(cluster.kubectl("get", "pods", in_namespace, "--output=json").stdout)["items"]
    }
    assert job == "Complete", logs
    return logs


def _ended(job: dict[str, object]) -> str | None:
    status = job["status"]
    assert isinstance(status, dict)
    true = [each["type"] for each in status.get("conditions", []) if each["status"] == "True"]
    return next((kind for kind in true if kind in ("Complete", "Failed")), None)


def test_two_restricted_pods_find_each_other_by_name(real_cluster: AnyCluster, namespace: str) -> None:
    script = f"""
        other=gang-$((1 - JOB_COMPLETION_INDEX)).gang
        b=/bin/busybox
        $b nc -l -p 7000 -e $b echo hello from $JOB_COMPLETION_INDEX &
        until $b nslookup $other.{namespace}.svc.cluster.local >/dev/null 2>&1; do $b sleep 0.2; done
        until answer=$($b nc $other 7000 </dev/null 2>/dev/null); do $b sleep 0.2; done
        echo $answer
        wait
    """
    logs = run_gang(real_cluster, namespace, a_gang("gang", script))
    assert logs == {"0": "hello from 1\n", "1": "hello from 0\n"}


def test_the_root_file_system_of_a_restricted_pod_is_read_only(real_cluster: AnyCluster, namespace: str) -> None:
    script = "/bin/busybox id -u; /bin/busybox touch /x 2>&1 || echo refused"
    log = run_gang(real_cluster, namespace, a_gang("solo", script, num_pods=1))["0"]
    assert log.startswith("65532\n")
    assert "Read-only file system" in log
    assert log.endswith("refused\n")


def test_a_pod_reaches_the_object_store(real_cluster: AnyCluster, namespace: str, cluster_minio: MinioServer) -> None:
    script = "/bin/busybox wget -q -O - $AWS_ENDPOINT_URL/minio/health/live && echo alive"
    log = run_gang(real_cluster, namespace, a_gang("store", script, num_pods=1, env=cluster_minio.env()))["0"]
    assert log == "alive\n"


def test_a_pod_reaches_the_api_server_through_its_service(real_cluster: AnyCluster, namespace: str) -> None:
    """By cluster address, so by kube-proxy's rules."""
    script = "/bin/busybox nc -w 5 $KUBERNETES_SERVICE_HOST $KUBERNETES_SERVICE_PORT </dev/null && echo connected"
    assert run_gang(real_cluster, namespace, a_gang("api", script, num_pods=1))["0"] == "connected\n"


def test_a_node_that_is_stopped_while_pods_run_leaves_nothing() -> None:
    host.require_node()
    cluster = start_real_cluster()
    forever = json.dumps(a_gang("forever", "while :; do /bin/busybox sleep 1; done")[1])
    cluster.kubectl("apply", "--filename=-", input=forever)
    cluster.kubectl("wait", "--for=jsonpath={.status.ready}=2", "--timeout=60s", "job/forever")
    assert "KUBE-SERVICES" in cluster.on_node(["iptables-save"]).stdout
    assert footprint(cluster)
    cluster.stop()
    assert not footprint(cluster), footprint(cluster)

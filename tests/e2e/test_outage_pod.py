"""The operator as a pod, its API server away for longer than a liveness probe is patient: nothing restarts or ends.

`tests/integration/test_outage.py` asks more of the operator; here a kubelet judges its container, the node is cut off
too, and real ranks train on meanwhile.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.cluster.cluster import ExternalCluster
from tests.cluster.minio import MinioServer
from tests.cluster.node import RealCluster
from tests.cluster.outage import api_server_away
from tests.cluster.product import (
    OPERATOR_NAMESPACE,
    condition,
    fill_buckets,
    install_operator,
    job_status,
    make_storage_profile,
    remove_storage_profile,
    wait_ended,
)
from tests.cluster.run import run, wait_until
from tests.cluster.tools import binary
from tests.e2e.fire import document, process_of

pytestmark = pytest.mark.e2e

SHORT_SECONDS = 75
"""Three probes that fail, 20 s apart, and the 5 s that each may take, are 65."""
LONG_SECONDS = 300
BEGUN_SECONDS = 30
WITHOUT_END = 100_000


@pytest.fixture(scope="module")
def installed(
    real_cluster: RealCluster | ExternalCluster, cluster_minio: MinioServer, operator_image: str, trainer_image: str
) -> Iterator[RealCluster]:
    """With the operator in it, by Helm."""
    if not isinstance(real_cluster, RealCluster):
        pytest.skip("only the API server of a cluster that the tests start is stopped; unset NEXA_TEST_KUBECONFIG")
    fill_buckets(cluster_minio)
    make_storage_profile(real_cluster, cluster_minio, namespace="default")
    install_operator(real_cluster, operator_image=operator_image, trainer_image=trainer_image)
    yield real_cluster
    real_cluster.kubectl("delete", "ntj", "--all", "--wait=true", "--timeout=150s", check=False)
    helm = [binary("helm"), f"--kubeconfig={real_cluster.kubeconfig}", f"--namespace={OPERATOR_NAMESPACE}"]
    run([*helm, "uninstall", "nexa", "--wait"], check=False)
    remove_storage_profile(real_cluster, namespace="default")


def found(cluster: RealCluster, *what: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads(cluster.kubectl("get", *what, "--output=json").stdout)["items"]
    return items


def operator_pod(cluster: RealCluster) -> dict[str, Any]:
    (pod,) = found(
        cluster, "pods", f"--namespace={OPERATOR_NAMESPACE}", "--selector=app.kubernetes.io/component=operator"
    )
    return pod


def num_restarts(pod: dict[str, Any]) -> int:
    return sum(status["restartCount"] for status in pod["status"]["containerStatuses"])


def patience_seconds(pod: dict[str, Any]) -> int:
    """After so long at the latest a kubelet restarts a container that does not answer."""
    (container,) = pod["spec"]["containers"]
    probe: dict[str, int] = container["livenessProbe"]
    return probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]


def health_of(pod: dict[str, Any]) -> str:
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    return f"http://{pod['status']['podIP']}:{port['containerPort']}/healthz"


def the_process(pod: dict[str, Any], module: str) -> psutil.Process:
    """Equal to another only if it is the same one."""
    process = process_of(pod, module)
    assert process is not None, f"{module} does not run in {pod['metadata']['name']}"
    return process


def of_job(cluster: RealCluster, name: str) -> dict[str, str]:
    """UID -> name of all that belongs to a job, but for what is being deleted."""
    everything = found(cluster, "jobs,services,pods", f"--selector=train.nexa.dev/job-name={name}")
    return {
        each["metadata"]["uid"]: f"{each['kind']}/{each['metadata']['name']}"
        for each in everything
        if "deletionTimestamp" not in each["metadata"]
    }


def pods_of(cluster: RealCluster, name: str) -> list[dict[str, Any]]:
    return found(cluster, "pods", f"--selector=train.nexa.dev/job-name={name}")


def gangs_of(cluster: RealCluster, name: str) -> list[dict[str, Any]]:
    return found(cluster, "jobs", f"--selector=train.nexa.dev/job-name={name}")


def apply(cluster: RealCluster, name: str, *, steps: int, nodes: int) -> None:
    made = document(name, steps=steps)
    made["spec"]["cluster"]["numNodes"] = nodes
    made["spec"]["training"]["saveEverySteps"] = 1000
    cluster.kubectl("apply", "--filename=-", input=json.dumps(made))


def trained(cluster: RealCluster, name: str, *, beyond: int) -> dict[str, Any]:
    """The job's status once it tells of more steps than that."""

    def told() -> dict[str, Any] | None:
        status = job_status(cluster, name)
        return status if status.get("step", 0) > beyond else None

    return wait_until(
        told,
        timeout_seconds=180,
        what=f"{name} tells of more than {beyond} steps",
        detail=lambda: json.dumps(job_status(cluster, name), indent=1),
    )


def check_outage(cluster: RealCluster, name: str, seconds: float) -> None:
    apply(cluster, name, steps=WITHOUT_END, nodes=2)
    before = trained(cluster, name, beyond=0)
    kept, ranks = of_job(cluster, name), pods_of(cluster, name)
    operator = operator_pod(cluster)
    assert seconds > patience_seconds(operator), "in a shorter time no kubelet would have restarted anything"
    processes = [the_process(operator, "nexa_operator.main"), *(the_process(pod, "nexa_train.rank") for pod in ranks)]
    restarts = num_restarts(operator)

    with api_server_away(cluster):
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            assert httpx.get(health_of(operator), timeout=5, trust_env=False).status_code == 200
            assert all(process.is_running() for process in processes), processes
            time.sleep(1)

    began = time.monotonic()
    after = f"{name}-after"
    # Ready, and not yet all of it: for a moment it may not know the kind.
    wait_until(lambda: apply(cluster, after, steps=2, nodes=1) or True, timeout_seconds=BEGUN_SECONDS, what="submitted")
    # By the operator: others take their own time to find the server again, controllers and the kubelet.
    wait_until(lambda: gangs_of(cluster, after), timeout_seconds=BEGUN_SECONDS, what=f"{after} is begun")
    begun = time.monotonic() - began
    print(f"begun {begun:.1f} s after an outage of {seconds:g} s")
    assert begun <= BEGUN_SECONDS

    # What a node controller would do to pods of a node that it takes for lost, it has done by the end of this.
    ended = wait_ended(cluster, after)
    assert condition(ended, "Succeeded")["status"] == "True", ended
    status = trained(cluster, name, beyond=before["step"])
    assert (status["attempt"], status["restarts"], status["phase"]) == (0, 0, "Running"), status
    assert kept.items() <= of_job(cluster, name).items(), "something was deleted"
    assert all(process.is_running() for process in processes), processes
    now = operator_pod(cluster)
    assert now["metadata"]["uid"] == operator["metadata"]["uid"]
    assert num_restarts(now) == restarts == 0
    assert [num_restarts(pod) for pod in pods_of(cluster, name)] == [0, 0]
    cluster.kubectl("delete", f"ntj/{name}", f"ntj/{after}")


@pytest.mark.soak  # six minutes, most of them until controllers and kubelet have found the server again
def test_an_operator_s_pod_outlives_an_api_server_that_is_away_and_ends_nothing(installed: RealCluster) -> None:
    check_outage(installed, "outlives", SHORT_SECONDS)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_an_operator_s_pod_outlives_five_minutes_without_an_api_server(installed: RealCluster) -> None:
    check_outage(installed, "outlives-long", LONG_SECONDS)

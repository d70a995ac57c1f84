"""What follows a loss, on a real control plane: waiting, other nodes, fewer pods; and how jobs end."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nexa_train.config.protocol import ENV_JOB, ENV_NUM_NODES, CheckpointRef
from tests.cluster.run import wait_until
from tests.integration.harness import Namespace, Operator, words
from tests.integration.test_operator import ns, operator

__all__ = ["ns", "operator"]

pytestmark = pytest.mark.integration

XID = "NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."


def lose(ns: Namespace, gang: str, **said: Any) -> None:
    """The first pod of a gang of two fails."""
    pod = ns.wait_pods(gang, 2)[0]
    ns.play_kubelet(pod, "Failed", words=words(**{"exit_code": 1, "cause": "Boom", **said}))


def environment(job: dict[str, Any]) -> dict[str, str]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return {item["name"]: item.get("value", "") for item in container["env"]}


def moment(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text)


def test_the_second_loss_without_progress_is_waited_after_and_a_killed_operator_waits_as_long(
    ns: Namespace, operator: Operator
) -> None:
    ns.submit("patient", recovery={"backoffSeconds": 6})
    lose(ns, "patient-a0")
    ns.wait(lambda: ns.get("job/patient-a1"), "the second attempt, at once")
    lose(ns, "patient-a1")
    until = ns.wait(lambda: ns.status("patient").get("nextAttemptTime"), "when the third may begin", "patient")
    assert ns.condition("patient", "Queued")["reason"] in ("Restarting", "BackingOff")
    operator.kill()
    operator.start()
    third = ns.wait(lambda: ns.get("job/patient-a2"), "the third attempt", "patient")
    assert moment(third["metadata"]["creationTimestamp"]) >= moment(until)
    status = ns.status("patient")
    assert (status["restarts"], status["lossesWithoutCheckpoint"]) == (2, 2)
    assert ns.get("job/patient-a1") is None


def test_progress_ends_the_waiting(ns: Namespace) -> None:
    ns.submit("quick", recovery={"backoffSeconds": 3600})
    lose(ns, "quick-a0")
    step = CheckpointRef(step=5, uri="s3://models/checkpoints/r/step-00000005/manifest.json", digest="d" * 64)
    ns.wait(lambda: ns.get("job/quick-a1"), "the second attempt")
    lose(ns, "quick-a1", checkpoint=step)
    ns.wait(lambda: ns.get("job/quick-a2"), "the third attempt, at once", "quick")
    assert ns.status("quick")["lossesWithoutCheckpoint"] == 1


def test_a_node_with_broken_hardware_is_kept_off(ns: Namespace, nodes: Nodes) -> None:
    first, second = nodes(2)
    ns.submit("hardware", nodes=1, cluster=on(nodes))
    (pod,) = ns.wait_pods("hardware-a0", 1)
    broken = ns.wait(lambda: ns.get(f"pod/{pod['metadata']['name']}")["spec"].get("nodeName"), "a node")
    ns.play_kubelet(pod, "Failed", words=words(exit_code=1, cause="RuntimeError", log=XID))
    where = lambda: [node for pod in ns.pods("hardware-a1") if (node := pod["spec"].get("nodeName"))]  # noqa: E731
    assert ns.wait(where, "another pod, on a node") == [second if broken == first else first]
    assert ns.status("hardware")["excludedNodes"] == [broken]


def test_a_node_that_says_that_it_is_broken_is_kept_off(ns: Namespace, nodes: Nodes) -> None:
    first, second = nodes(2)
    ns.submit("deadlock", nodes=1, cluster=on(nodes))
    (pod,) = ns.wait_pods("deadlock-a0", 1)
    broken = ns.wait(lambda: ns.get(f"pod/{pod['metadata']['name']}")["spec"].get("nodeName"), "a node")
    nodes.say(broken, KernelDeadlock="True")
    ns.play_kubelet(pod, "Failed", words=words(exit_code=1, cause="RuntimeError"))
    where = lambda: [node for pod in ns.pods("deadlock-a1") if (node := pod["spec"].get("nodeName"))]  # noqa: E731
    assert ns.wait(where, "another pod, on a node") == [second if broken == first else first]
    status = ns.status("deadlock")
    assert status["excludedNodes"] == [broken]
    assert f"node {broken}: KernelDeadlock" in status["lastFailure"]["message"]


def test_a_gang_without_room_goes_on_with_fewer_pods_and_grows_when_there_is_room_again(
    ns: Namespace, nodes: Nodes
) -> None:
    _, second = nodes(2)
    ns.submit("elastic", cluster={**on(nodes), "minNodes": 1, "shrinkAfterSeconds": 2, "resources": {"cpu": "2"}})
    for pod in ns.wait_pods("elastic-a0", 2):
        ns.wait(lambda name=pod["metadata"]["name"]: ns.get(f"pod/{name}")["spec"].get("nodeName"), "a node")
        ns.play_kubelet(pod, "Running")
    ns.wait_true("elastic", "Running")
    ns.cluster.kubectl("cordon", second)
    lost = next(pod for pod in ns.pods("elastic-a0") if pod["spec"]["nodeName"] == second)
    ns.kubectl("delete", f"pod/{lost['metadata']['name']}", "--force", "--grace-period=0")
    ns.wait(lambda: ns.get("job/elastic-a1"), "an attempt of the same size", "elastic")
    remove(ns, "elastic-a0")
    smaller = ns.wait(lambda: ns.get("job/elastic-a2"), "a smaller attempt", "elastic")
    assert (smaller["spec"]["completions"], environment(smaller)[ENV_NUM_NODES]) == (1, "1")
    assert json.loads(environment(smaller)[ENV_JOB])["spec"]["cluster"].get("numNodes", 1) == 1
    remove(ns, "elastic-a1")
    (pod,) = ns.wait_pods("elastic-a2", 1)
    ns.play_kubelet(pod, "Running")
    assert ns.wait_true("elastic", "Running")["message"] == "1 of 1 pods of attempt 2"
    asking = ns.wait(lambda: ns.get("job/elastic-a2-room"), "pods that ask for room", "elastic")
    assert asking["spec"]["parallelism"] == 1
    status = ns.status("elastic")
    assert (status["numNodes"], status["restarts"], status["chargedRestarts"]) == (1, 1, 0)

    ns.cluster.kubectl("uncordon", second)
    ns.wait(lambda: ns.get("job/elastic-a2")["spec"].get("suspend"), "the smaller gang stops", "elastic")
    assert ns.condition("elastic", "Suspended")["status"] == "False", "nobody suspended the job"
    remove(ns, "elastic-a2")
    full = ns.wait(lambda: ns.get("job/elastic-a3"), "an attempt with all pods", "elastic")
    assert full["spec"]["completions"] == 2
    ns.wait(lambda: ns.get("job/elastic-a2-room") is None, "nobody asks for room any more", "elastic")
    ns.wait(
        lambda: len([pod for pod in ns.pods("elastic-a3") if pod["spec"].get("nodeName")]) == 2, "both pods have a node"
    )


def test_a_gang_for_which_a_quota_has_no_place_goes_on_with_fewer_pods_and_grows_when_it_has(
    ns: Namespace, nodes: Nodes
) -> None:
    nodes(1)
    quota = lambda pods: json.dumps({"spec": {"hard": {"pods": str(pods)}}})  # noqa: E731
    ns.kubectl("create", "quota", "few", "--hard=pods=1")
    try:
        ns.submit("frugal", cluster={**on(nodes), "minNodes": 1, "shrinkAfterSeconds": 11})
        said = lambda: ns.condition("frugal", "Queued").get("message", "")  # noqa: E731
        ns.wait(lambda: "exceeded quota: few" in said(), "what the quota says", "frugal")
        ns.wait(lambda: ns.get("job/frugal-a1"), "a smaller attempt", "frugal")
        ns.wait(lambda: remove(ns, "frugal-a0") or not ns.pods("frugal-a0"), "the first attempt's pod is gone")
        (pod,) = ns.wait_pods("frugal-a1", 1)
        ns.play_kubelet(pod, "Running")
        assert ns.wait_true("frugal", "Running")["message"] == "1 of 1 pods of attempt 1"
        ns.wait(lambda: ns.get("job/frugal-a1-room"), "a pod that asks for room", "frugal")
        ns.kubectl("patch", "quota/few", "--type=merge", f"--patch={quota(2)}")
        ns.wait(lambda: ns.get("job/frugal-a1")["spec"].get("suspend"), "the smaller gang stops", "frugal")
        full = ns.wait(lambda: remove(ns, "frugal-a1") or ns.get("job/frugal-a2"), "an attempt with all pods", "frugal")
        assert full["spec"]["completions"] == 2
        both = "both pods, once the room is given up and the Job's controller tries again"
        wait_until(lambda: len(ns.pods("frugal-a2")) == 2, timeout_seconds=60, what=both)
        assert ns.status("frugal")["restarts"] == 0
    finally:
        ns.kubectl("delete", "quota/few")


def active_seconds(status: dict[str, Any]) -> float:
    """All that its account counts but what it waited for others."""
    spent = {key: seconds for key, seconds in status["goodput"].items() if key.endswith("Seconds")}
    return sum(seconds for key, seconds in spent.items() if key not in ("queueSeconds", "suspendedSeconds"))


def test_the_time_limit_is_for_all_attempts_together(ns: Namespace) -> None:
    limit = 20
    ns.submit("late", schedule={"activeDeadlineSeconds": limit})
    for pod in ns.wait_pods("late-a0", 2):
        ns.play_kubelet(pod, "Running")
    ns.wait_true("late", "Running")
    began = time.monotonic()
    wait_until(lambda: time.monotonic() > began + limit / 3, timeout_seconds=60, what="a third of its time is over")
    lose(ns, "late-a0")
    ns.wait(lambda: ns.status("late").get("restarts") == 1, "its first attempt is lost", "late")
    first = ns.status("late")["goodput"]["startupSeconds"]  # all of it: it took no step
    for pod in ns.wait_pods("late-a1", 2):
        ns.play_kubelet(pod, "Running")
    assert ns.wait_true("late", "Failed")["reason"] == "DeadlineExceeded"
    # Had the second attempt the limit for itself, the sum would be at least both.
    assert limit - 1 < active_seconds(ns.status("late")) < first + limit - 1
    ns.wait(lambda: not ns.pods("late-a1"), "nothing of it is left to run")


def test_artifacts_go_with_a_job_that_says_so_after_its_ranks(ns: Namespace) -> None:
    ns.submit("tidy", schedule={"deletionPolicy": "Delete"})
    ns.wait_pods("tidy-a0", 2)
    assert ns.job("tidy")["metadata"]["finalizers"] == ["train.nexa.dev/artifacts"]
    ns.kubectl("delete", "ntj/tidy", "--wait=false")
    removal = ns.wait(lambda: ns.get("job/tidy-removal"), "the removal")
    assert ns.get("job/tidy-a0") is None
    assert ns.get("ntj/tidy") is not None
    (container,) = removal["spec"]["template"]["spec"]["containers"]
    assert container["command"][-1] == "nexa_train.removal"
    (pod,) = ns.wait_pods("tidy-removal", 1)
    ns.play_kubelet(pod, "Succeeded")
    ns.wait(lambda: ns.get("ntj/tidy") is None, "the job is gone")
    reasons = [event["reason"] for event in ns.list("events") if event["involvedObject"]["name"] == "tidy"]
    assert "ArtifactsRemoved" in reasons


def test_a_namespace_that_goes_takes_such_jobs_with_it(ns: Namespace) -> None:
    ns.submit("leaving", schedule={"deletionPolicy": "Delete"})
    ns.wait_pods("leaving-a0", 2)
    ns.cluster.kubectl("delete", "namespace", ns.namespace, "--wait=false")
    ns.wait(lambda: not exists(ns), "the namespace is gone")


def exists(ns: Namespace) -> bool:
    return bool(ns.cluster.kubectl("get", "namespace", ns.namespace, "--ignore-not-found", "--output=name").stdout)


def test_a_namespace_goes_with_all_gangs_in_it_though_no_operator_is_there(ns: Namespace, operator: Operator) -> None:
    """By garbage collection alone: without deletionPolicy Delete nothing of a job waits for the operator."""
    names = ("runs", "runs-too", "waits", "held", "done")
    for name in names:
        ns.submit(name, schedule={"suspend": name == "held"})
    for name in ("runs", "runs-too", "done"):
        for pod in ns.wait_pods(f"{name}-a0", 2):
            ns.play_kubelet(pod, "Running")
        ns.wait_true(name, "Running")
    for pod in ns.pods("done-a0"):
        ns.play_kubelet(pod, "Succeeded", words=words(step=10, total_steps=10))
    ns.wait_true("done", "Succeeded")
    ns.wait_pods("waits-a0", 2)
    ns.wait_true("held", "Suspended")
    assert operator.stop() == 0
    try:
        ns.cluster.kubectl("delete", "namespace", ns.namespace, "--wait=false")
        wait_until(lambda: not exists(ns), timeout_seconds=60, what="the namespace is gone")
        assert operator.process.poll() is not None
    finally:
        operator.start()


def test_where_the_time_went_is_in_status(ns: Namespace) -> None:
    ns.submit("account")
    lose(ns, "account-a0")
    for pod in ns.wait_pods("account-a1", 2):
        ns.play_kubelet(pod, "Running")
    ns.wait_true("account", "Running")
    for pod in ns.pods("account-a1"):
        ns.play_kubelet(pod, "Succeeded", words=words(step=10, total_steps=10, trained_seconds=0.5))
    ns.wait_true("account", "Succeeded")
    spent = ns.status("account")["goodput"]
    assert 0.5 <= spent["productiveSeconds"] < 10  # half a second before the first pod ended, and until the second did
    assert spent["restartSeconds"] > 0
    assert 0 < spent["ratio"] < 1
    assert "state" not in spent


def remove(ns: Namespace, gang: str) -> None:
    """What a kubelet does with pods that shall go; there is none here."""
    for pod in ns.pods(gang):
        if "deletionTimestamp" in pod["metadata"]:
            ns.kubectl("delete", f"pod/{pod['metadata']['name']}", "--force", "--grace-period=0", "--ignore-not-found")


class Nodes:
    """Nodes of a test's own that no kubelet and no kwok looks after: pods are placed there and stay as they are."""

    def __init__(self, ns: Namespace) -> None:
        self.ns, self.names = ns, list[str]()

    def __call__(self, count: int) -> list[str]:
        self.names = [f"{self.ns.namespace}-{index}" for index in range(count)]
        for name in self.names:
            self._make(name)
        return self.names

    def _make(self, name: str) -> None:
        amounts = {"cpu": "2", "memory": "8Gi", "pods": "10"}
        metadata = {"name": name, "labels": {"only": self.ns.namespace}}
        taint = {"key": "only", "value": self.ns.namespace, "effect": "NoSchedule"}
        document = {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"taints": [taint]}}
        self.ns.cluster.kubectl("create", "--filename=-", input=json.dumps(document))
        self._patch(name, {"capacity": amounts, "allocatable": amounts})
        self.say(name)

    def say(self, name: str, **conditions: str) -> None:
        """As its kubelet and node-problem-detector report."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        more = {"reason": "Played", "message": "", "lastHeartbeatTime": now, "lastTransitionTime": now}
        told = {"Ready": "True", **conditions}
        self._patch(name, {"conditions": [{"type": kind, "status": said, **more} for kind, said in told.items()]})

    def _patch(self, name: str, status: dict[str, Any]) -> None:
        patch = json.dumps({"status": status})
        self.ns.cluster.kubectl("patch", f"node/{name}", "--subresource=status", "--type=merge", f"--patch={patch}")


def on(nodes: Nodes) -> dict[str, Any]:
    only = {"key": "only", "operator": "Equal", "value": nodes.ns.namespace, "effect": "NoSchedule"}
    return {"nodeSelector": {"only": nodes.ns.namespace}, "tolerations": [only]}


@pytest.fixture
def nodes(ns: Namespace) -> Iterator[Callable[[int], list[str]]]:
    made = Nodes(ns)
    yield made
    for name in made.names:
        ns.cluster.kubectl("delete", f"node/{name}", "--wait=false", check=False)

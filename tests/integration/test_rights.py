"""Rights granted = rights used: an operator goes through all that it does, and the API server's audit log is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster.cluster import Cluster
from tests.cluster.run import wait_until
from tests.integration.audit import Log, granted
from tests.integration.harness import (
    CHECKPOINT,
    NAMED,
    OPERATOR_USER,
    RELEASE_NAMESPACE,
    Namespace,
    Operator,
    install_chart,
    new_namespace,
    prepare_operator,
    words,
)

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Stage:
    ns: Namespace
    operator: Operator
    log: Log
    alone: bool

    @property
    def served(self) -> set[str]:
        """API groups that this cluster has."""
        versions = self.ns.kubectl("api-versions").split()
        return {version.rpartition("/")[0] for version in versions}


@pytest.fixture(scope="module", params=["every namespace", "one namespace"])
def stage(request, control_plane: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """An operator in its first minute, and a namespace that takes restricted pods alone."""
    if control_plane.audit_log is None:
        pytest.skip("this is a cluster of the developer's, whose audit log is not ours")
    folder = tmp_path_factory.mktemp("rights")
    kubeconfig = prepare_operator(control_plane, folder)
    with new_namespace(control_plane) as ns:
        control_plane.kubectl("label", f"namespace/{ns.namespace}", "pod-security.kubernetes.io/enforce=restricted")
        alone = request.param == "one namespace"
        if alone:
            control_plane.kubectl("delete", "clusterrolebinding/nexa")
            install_chart(control_plane, f"watchNamespace={ns.namespace}")
        control_plane.kubectl("-n", RELEASE_NAMESPACE, "delete", "lease/nexa", "--ignore-not-found")
        start = control_plane.audit_log.stat().st_size
        operator = Operator(
            kubeconfig,
            folder / "log.jsonl",
            NEXA_LEASE_NAMESPACE=RELEASE_NAMESPACE,
            NEXA_WATCH_NAMESPACE=ns.namespace if alone else "",
        )
        yield Stage(ns, operator, Log(control_plane.audit_log, start, OPERATOR_USER), alone)
        operator.kill()
        ns.kubectl("patch", "ntj/held", "--type=merge", '--patch={"metadata":{"finalizers":null}}', check=False)
    install_chart(control_plane)


@pytest.fixture(scope="module")
def played(stage: Stage) -> Stage:
    """All an operator does: start, suspend, resume, restart, succeed, expire, hold, find a name taken, explain."""
    ns = stage.ns
    ns.submit("whole", **NAMED, schedule={"ttlSecondsAfterFinished": 1}, recovery={"maxRestarts": 3})
    for pod in ns.wait_pods("whole-a0", 2):
        ns.play_kubelet(pod, "Running")
    ns.wait_true("whole", "Running")
    for suspend in ("true", "false"):
        ns.kubectl("patch", "ntj/whole", "--type=merge", f'--patch={{"spec":{{"schedule":{{"suspend":{suspend}}}}}}}')
        if suspend == "true":
            ns.wait_true("whole", "Suspended")
    first, _ = ns.wait_pods("whole-a1", 2)
    _place(ns, first["metadata"]["name"])
    ns.play_kubelet(first, "Failed", words=words(exit_code=1, cause="Gremlins", checkpoint=CHECKPOINT))
    for pod in ns.wait_pods("whole-a2", 2):
        ns.play_kubelet(pod, "Succeeded", words=words(step=10, total_steps=10, checkpoint=CHECKPOINT))
    ns.wait(lambda: ns.get("ntj/whole") is None, "the job has expired")
    ns.submit("held", schedule={"suspend": True, "deletionPolicy": "Delete"})
    ns.wait(lambda: ns.job("held")["metadata"].get("finalizers"), "a finalizer where one was asked for", "held")
    ns.kubectl("create", "--filename=-", input=json.dumps(_another_s_job("taken-a0")))
    ns.submit("taken")
    ns.wait(lambda: ns.condition("taken", "Queued").get("reason") == "Refused", "the name is taken", "taken")
    ns.kubectl("create", "quota", "none", "--hard=pods=0")
    ns.submit("crowded")
    ns.wait(lambda: ns.condition("crowded", "Queued").get("reason") == "PodsRefused", "no pod is allowed", "crowded")
    return stage


def _place(ns: Namespace, pod: str) -> None:
    """On a node, of which the operator then asks; that there is none of that name is an answer too."""
    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod}}
    binding |= {"target": {"apiVersion": "v1", "kind": "Node", "name": "nowhere"}}
    where = f"/api/v1/namespaces/{ns.namespace}/pods/{pod}/binding"
    ns.kubectl("create", f"--raw={where}", "--filename=-", input=json.dumps(binding))


def _another_s_job(name: str) -> dict[str, Any]:
    pod = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "example.invalid/none"}]}
    spec = {"suspend": True, "template": {"spec": pod}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def test_what_is_used_is_what_is_granted_and_the_other_way_round(played: Stage):
    given = granted(f"watchNamespace={played.ns.namespace}" if played.alone else "watchNamespace=")
    rights = {right for right in given if right[0] in played.served}
    unused = lambda: sorted(rights - played.log.used())  # noqa: E731
    wait_until(lambda: not unused(), timeout_seconds=10, what="all rights are used", detail=lambda: str(unused()))
    assert played.log.used() == rights


def test_nothing_was_forbidden(played: Stage):
    # By the lack of a right: a namespace that is being deleted says 403 too.
    decided = [event.get("annotations", {}) for event in played.log.requests()]
    refused = [said for said in decided if said.get("authorization.k8s.io/decision") == "forbid"]
    assert not refused


def test_the_metrics_tell_of_it(played: Stage):
    families = list(text_string_to_metric_families(played.operator.metrics()))
    seen = {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}
    assert seen["nexa_restarts_total", "other"] == 1, "no trainer names a series"
    assert seen["nexa_time_to_first_step_seconds_count",] == 1
    assert seen["nexa_api_calls_total", "2xx", "create"] > 0
    assert seen["nexa_api_calls_total", "4xx", "create"] > 0, "the name that was taken"
    assert {key[-1] for key in seen if key[0] == "nexa_api_calls_total"} >= {"get", "list", "patch", "delete"}
    assert seen["nexa_reconcile_seconds_count",] > 0
    for kind in ("nexatrainingjobs", "jobs", "pods"):
        assert 0 <= seen["nexa_watch_age_seconds", kind] < 60

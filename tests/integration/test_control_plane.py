"""The control plane that the other integration tests stand on: it answers, it runs Jobs on fake nodes, it goes away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import host
from tests.cluster.cluster import Cluster
from tests.cluster.control_plane import start_control_plane
from tests.cluster.errors import CommandFailed
from tests.cluster.footprint import footprint
from tests.cluster.outage import api_server_away
from tests.cluster.paths import REPOSITORY
from tests.cluster.run import wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def _own_cluster_possible() -> None:
    """Some tests here start and stop clusters of their own."""
    host.require_control_plane()


def a_job(name: str, *, num_pods: int) -> dict[str, object]:
    pod = {
        "restartPolicy": "Never",
        "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Equal", "value": "fake"}],
        "containers": [{"name": "main", "image": "example.invalid/none"}],
    }
    spec = {"completionMode": "Indexed", "completions": num_pods, "parallelism": num_pods, "template": {"spec": pod}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def test_the_api_server_answers_its_administrator(control_plane: Cluster) -> None:
    assert control_plane.kubectl("get", "--raw=/readyz").stdout == "ok"
    assert control_plane.kubectl("auth", "can-i", "*", "*").stdout.strip() == "yes"


def test_an_indexed_job_of_two_pods_completes_on_fake_nodes(control_plane: Cluster) -> None:
    control_plane.fake_nodes(2)
    control_plane.kubectl("apply", "--filename=-", input=json.dumps(a_job("pair", num_pods=2)))
    control_plane.kubectl("wait", "--for=condition=Complete", "--timeout=60s", "job/pair")
    pods = json.loads(control_plane.kubectl("get", "pods", "-l", "job-name=pair", "-o", "json").stdout)["items"]
    assert sorted(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"] for pod in pods) == ["0", "1"]
    control_plane.kubectl("delete", "job/pair")


def test_what_was_asked_of_the_api_server_is_in_the_audit_log(control_plane: Cluster) -> None:
    if control_plane.audit_log is None:
        pytest.skip("this is a cluster of the developer's, whose audit log is not ours")
    control_plane.kubectl("get", "configmaps", "--namespace=kube-system")
    log = control_plane.audit_log
    wait_until(
        lambda: '"resource":"configmaps","namespace":"kube-system"' in log.read_text(),
        timeout_seconds=10,
        what="the request is in the audit log",
    )


@pytest.mark.usefixtures("_own_cluster_possible")
def test_two_control_planes_run_side_by_side_and_stop_leaves_nothing(control_plane: Cluster) -> None:
    other = start_control_plane()
    assert footprint(other)
    other.fake_nodes(1)
    other.stop()
    assert not footprint(other), footprint(other)
    assert control_plane.kubectl("get", "--raw=/readyz").stdout == "ok"


@pytest.mark.usefixtures("_own_cluster_possible")
def test_an_api_server_that_was_away_is_back_where_it_was_and_its_controllers_go_on() -> None:
    plane = start_control_plane()
    try:
        plane.fake_nodes(1)
        plane.kubectl("create", "configmap", "kept")
        with api_server_away(plane):
            assert plane.kubectl("get", "--raw=/readyz", check=False).returncode != 0
        assert plane.kubectl("get", "configmap/kept", "--output=name").stdout.strip() == "configmap/kept"
        plane.kubectl("apply", "--filename=-", input=json.dumps(a_job("later", num_pods=2)))
        plane.kubectl("wait", "--for=condition=Complete", "--timeout=60s", "job/later")
    finally:
        plane.stop()


@pytest.mark.usefixtures("_own_cluster_possible")
def test_a_start_that_fails_half_way_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "kube-apiserver"
    broken.write_text("#!/bin/sh\necho no such flag; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(CommandFailed, match=r"kube-apiserver ended before it was ready(.|\n)*no such flag"):
        start_control_plane()
    assert list(tmp_path.glob("nexa-cluster-*")) == []


@pytest.mark.usefixtures("_own_cluster_possible")
def test_when_the_process_that_started_it_is_killed_everything_goes_with_it(tmp_path: Path) -> None:
    program = "from tests.cluster.control_plane import *; print(start_control_plane().server, flush=True); input()"
    owner = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        assert owner.stdout
        assert owner.stdout.readline().startswith("https://")
        assert list(tmp_path.glob("nexa-cluster-*/ledger.jsonl"))
        owner.send_signal(signal.SIGKILL)
    wait_until(lambda: not list(tmp_path.iterdir()), timeout_seconds=30, what="its folder is gone")
    assert str(tmp_path) not in _all_command_lines()


def _all_command_lines() -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout

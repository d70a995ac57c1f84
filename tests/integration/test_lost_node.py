"""A node falls silent with a rank on it: its gang moves on, though the pod there never ends."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.control_plane import NODE_GRACE_SECONDS, ControlPlane
from tests.integration.harness import prepare_operator
from tests.integration.lane import Lane, new_lane

pytestmark = pytest.mark.integration

MOVED_SECONDS = 20
GONE_SECONDS = 120
CLUSTER = {
    "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}],
    # More than half a node: no two of them fit on one.
    "resources": {"cpu": "40"},
}


def pods_by_node(lane: Lane, gang: str) -> dict[str, dict[str, Any]]:
    return {pod["spec"].get("nodeName", ""): pod for pod in lane.pods(gang) if pod["status"]["phase"] == "Running"}


def check(plane: ControlPlane, folder: Path, keeper: str, end_silence: Callable[[str], None]) -> None:
    """The node of `keeper` falls silent; `end_silence` then brings it back or takes it away for good."""

    def room(num_sound: int) -> None:
        nodes = plane.fake_nodes(1, keeper=keeper, pods="run")
        nodes += plane.fake_nodes(num_sound, keeper=f"{keeper}-sound", pods="run")
        plane.kubectl("label", "--overwrite", "nodes", *nodes, f"team={keeper}")

    room(1)
    with new_lane(plane, prepare_operator(plane, folder), folder / "lane") as lane:
        lane.submit("moves", cluster={**CLUSTER, "nodeSelector": {"team": keeper}}, recovery={"maxRestarts": 0})
        lane.wait(lambda: len(pods_by_node(lane, "moves-a0")) == 2, "a pod on each node")
        lane.wait_true("moves", "Running")
        room(2)

        plane.signal_keeper(keeper, signal.SIGSTOP)
        began = time.monotonic()
        lane.wait(lambda: is_unknown(lane, f"{keeper}-0"), "the node controller noticed")
        noticed = time.monotonic()
        lane.wait(lambda: len(pods_by_node(lane, "moves-a1")) == 2, "the next gang runs")
        moved = time.monotonic()
        lane.wait_true("moves", "Running", attempt=1)
        print(f"noticed {noticed - began:.1f} s after the node fell silent, moved {moved - noticed:.1f} s later")
        assert moved - noticed <= MOVED_SECONDS
        assert moved - began <= NODE_GRACE_SECONDS + MOVED_SECONDS
        assert f"{keeper}-0" not in pods_by_node(lane, "moves-a1")
        stuck = pods_by_node(lane, "moves-a0").get(f"{keeper}-0")
        assert stuck is not None
        assert "deletionTimestamp" in stuck["metadata"]
        assert lane.status("moves")["chargedRestarts"] == 0

        end_silence(f"{keeper}-0")
        lane.wait(lambda: not lane.pods("moves-a0"), "what was stuck is gone", timeout_seconds=GONE_SECONDS)
        assert len(pods_by_node(lane, "moves-a1")) == 2
    # Pods of other tests would find room there, and nobody who ends them.
    plane.kubectl("delete", "nodes", f"--selector=team={keeper}", "--wait=false")


def is_unknown(lane: Lane, node: str) -> bool:
    seen = (lane.api.get(f"/api/v1/nodes/{node}") or {}).get("status", {}).get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "Unknown" for condition in seen)


def started_here(cluster: Cluster) -> ControlPlane:
    if not isinstance(cluster, ControlPlane):
        cluster.fake_nodes(1)  # says why not
    assert isinstance(cluster, ControlPlane)
    return cluster


def test_a_gang_leaves_a_node_that_fell_silent(control_plane: Cluster, tmp_path: Path) -> None:
    plane = started_here(control_plane)
    check(plane, tmp_path, "silent", lambda node: plane.signal_keeper("silent", signal.SIGCONT))


@pytest.mark.soak
def test_what_is_stuck_goes_with_a_node_that_never_returns(control_plane: Cluster, tmp_path: Path) -> None:
    plane = started_here(control_plane)
    check(plane, tmp_path, "dead", lambda node: plane.kubectl("delete", f"node/{node}") and None)

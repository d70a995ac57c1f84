"""Jobs to which nothing happens cost the API server no write, however many there are. The audit log says so."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.run import wait_until
from tests.integration.harness import OPERATOR_USER, RELEASE_NAMESPACE, prepare_operator
from tests.integration.lane import Lane, conditions, new_lane

pytestmark = pytest.mark.integration

WRITES = ("create", "update", "patch", "delete", "deletecollection")
SORTS = {
    "held": ({"schedule": {"suspend": True}}, "Suspended"),
    "pending": ({}, "Queued"),
    "running": ({"cluster": {"tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}],
                             "nodeSelector": {"team": "settled"}}}, "ProgressUnknown"),
}  # fmt: skip
"""What is asked for, and the last condition to become true: nobody answers at the addresses of fake pods."""


def writes_since(log: Path, offset: int) -> Iterator[str]:
    """What the operator wrote, but for its Lease."""
    with log.open("rb") as lines:
        lines.seek(offset)
        for line in lines:
            if not line.endswith(b"\n"):
                return  # half written
            event = json.loads(line)
            if event["user"]["username"] == OPERATOR_USER and event["verb"] in WRITES:
                what = event["objectRef"]["resource"]
                if what != "leases":
                    yield f"{event['verb']} {what}"


def check(cluster: Cluster, folder: Path, *, num_jobs: int, seconds: float, **environment: str) -> None:
    if cluster.audit_log is None:
        pytest.skip("the cluster shows no audit log")
    nodes = cluster.fake_nodes(1 + num_jobs // 1000, keeper="settled", pods="run")
    cluster.kubectl("label", "--overwrite", "nodes", *nodes, "team=settled")
    kubeconfig = prepare_operator(cluster, folder)
    with new_lane(cluster, kubeconfig, folder / "lane", NEXA_LEASE_NAMESPACE=RELEASE_NAMESPACE, **environment) as lane:
        submit(lane, num_jobs)
        wait_until(lambda: unsettled(lane) == 0, timeout_seconds=60 + num_jobs, what="every job is where it stays",
                   interval_seconds=2, detail=lambda: str(unsettled(lane)))  # fmt: skip
        wait_until(lambda: quiet_for(cluster.audit_log, 5), timeout_seconds=120, what="no write for five seconds")
        offset = cluster.audit_log.stat().st_size
        time.sleep(seconds)
        written = Counter(writes_since(cluster.audit_log, offset))
        print(f"{num_jobs} idle jobs for {seconds:g} s: {dict(written)} written")
        assert not written
        assert "leases" in cluster.audit_log.read_bytes()[offset:].decode(), "the operator was there"


def submit(lane: Lane, num_jobs: int) -> None:
    """Of ten jobs one runs."""
    sorts = ["running" if number % 10 == 0 else ("held", "pending")[number % 2] for number in range(num_jobs)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda each: lane.submit(f"{each[1]}-{each[0]}", nodes=1, **SORTS[each[1]][0]), enumerate(sorts)))


def unsettled(lane: Lane) -> int:
    jobs = lane.api.list(lane.path("nexatrainingjobs"))
    wanted = ((job, SORTS[job["metadata"]["name"].partition("-")[0]][1]) for job in jobs)
    return sum(conditions(job.get("status", {})).get(kind) != "True" for job, kind in wanted)


def quiet_for(log: Path, seconds: float) -> bool:
    offset = log.stat().st_size
    time.sleep(seconds)
    return not list(writes_since(log, offset))


def test_idle_jobs_cost_no_write(control_plane: Cluster, tmp_path: Path) -> None:
    often = {"NEXA_RESYNC_INTERVAL_SECONDS": "4"}
    check(control_plane, tmp_path, num_jobs=100, seconds=20, **often)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_a_thousand_idle_jobs_cost_no_write(control_plane: Cluster, tmp_path: Path) -> None:
    check(control_plane, tmp_path, num_jobs=1000, seconds=300)

"""Real training under fire: whatever is killed, every run ends, with the bits of the run that nothing disturbed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.api import Api
from tests.cluster.cluster import ExternalCluster
from tests.cluster.minio import MinioServer
from tests.cluster.node import RealCluster
from tests.cluster.paths import REPOSITORY
from tests.cluster.product import (
    EXAMPLE,
    MODEL_BUCKET,
    OPERATOR_NAMESPACE,
    fill_buckets,
    make_storage_profile,
    remove_storage_profile,
)
from tests.cluster.run import run
from tests.cluster.tools import binary
from tests.e2e.fire import (
    ENDS_ATTEMPT,
    Field,
    Strike,
    commit_lag_steps,
    deck,
    percentile,
    under_fire,
    wait_for_process,
)
from tests.integration.harness import Operator, kubeconfig_of_operator

pytestmark = pytest.mark.e2e

SAVE_EVERY = 10
NEXT_STEP_SECONDS = 30
ON_A_BUSY_MACHINE_SECONDS = 60


def document(name: str, *, steps: int, **recovery: Any) -> dict[str, Any]:
    """examples/job.yaml with more steps of less work, and room on the node for a gang that ends while one starts."""
    made: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    made["metadata"]["name"], spec = name, made["spec"]
    spec["model"] |= {"dModel": 64, "nLayers": 2, "nHeads": 2}
    spec["data"]["validation"] = {"rows": 8}
    spec["training"] |= {"globalBatchSize": 8, "maxSteps": steps, "saveEverySteps": SAVE_EVERY}
    spec["cluster"]["resources"] = {"memory": "3Gi"}
    spec["recovery"] = {"maxRestarts": 100, "backoffSeconds": 0, "progressDeadlineSeconds": 120, **recovery}
    return made


@pytest.fixture(scope="module")
def ground(
    real_cluster: RealCluster | ExternalCluster,
    cluster_minio: MinioServer,
    trainer_image: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Field]:
    """The chart but for its operator, which is a process of these tests: they kill it and start it again."""
    if not isinstance(real_cluster, RealCluster):
        pytest.skip("processes of pods are killed only on a node that the tests start; unset NEXA_TEST_KUBECONFIG")
    fill_buckets(cluster_minio)
    make_storage_profile(real_cluster, cluster_minio, namespace="default")
    helm = [binary("helm"), f"--kubeconfig={real_cluster.kubeconfig}", f"--namespace={OPERATOR_NAMESPACE}"]
    run([*helm, "upgrade", "--install", "nexa", REPOSITORY / "helm" / "nexa", "--create-namespace"])
    real_cluster.kubectl("scale", "deployment/nexa", f"--namespace={OPERATOR_NAMESPACE}", "--replicas=0")
    folder = tmp_path_factory.mktemp("operator")
    operator = Operator(
        kubeconfig_of_operator(real_cluster, folder),
        folder / "log.jsonl",
        NEXA_TRAINER_IMAGE=trainer_image,
        NEXA_LEASE_NAMESPACE=OPERATOR_NAMESPACE,
        NEXA_PROGRESS_INTERVAL_SECONDS="10",
    )
    yield Field(real_cluster, cluster_minio, operator, Api(real_cluster))
    real_cluster.kubectl("delete", "ntj", "--all", "--wait=true", "--timeout=60s", check=False)
    operator.kill()
    run([*helm, "uninstall", "nexa", "--wait"], check=False)
    remove_storage_profile(real_cluster, namespace="default")


def undisturbed(ground: Field, steps: int, folder: Path) -> str:
    """The weights digest of the same file run on this machine, with nothing in its way."""
    job = folder / "job.json"
    job.write_text(json.dumps(document("undisturbed", steps=steps)))
    command = [sys.executable, "-m", "nexa_train", "run", str(job), "--set", f"artifacts.uri={folder}", "-o", "json"]
    done = subprocess.run(
        command, env={**os.environ, **ground.minio.env()}, capture_output=True, text=True, check=False, timeout=800
    )
    assert done.returncode == 0, done.stderr
    digest: str = json.loads(done.stdout)["checkpoint"]["weights_digest"]
    return digest


def fought(
    ground: Field, name: str, *, steps: int, kinds: list[str], chance: random.Random, digest: str
) -> list[Strike]:
    """One job taken to its end under fire, and what is promised of each."""
    job = ground.job(document(name, steps=steps))
    struck = under_fire(job, kinds, chance)
    status = job.wait_succeeded()
    assert status["checkpoint"]["weightsDigest"] == digest
    assert (status["step"], status["checkpoint"]["step"]) == (steps, steps)
    assert status["restarts"] == sum(each.ended_attempt for each in struck)
    lag = commit_lag_steps(job.manifests())
    print(f"{name}: a checkpoint was committed at most {lag} steps after its own", flush=True)
    # A save begins when the one before it is committed, so a lag longer than the interval holds training up.
    assert lag <= SAVE_EVERY
    assert max(each.lost_steps for each in struck) <= SAVE_EVERY + lag
    return struck


def own_seconds(struck: Strike) -> float:
    """What it took on a machine with room."""
    return struck.seconds - struck.waited_seconds


def told(struck: list[Strike]) -> str:
    """One line for each kind."""
    lines = [
        f"{len(struck)} kills, p95 {percentile([each.seconds for each in struck], 0.95):.1f} s, "
        f"{percentile([own_seconds(each) for each in struck], 0.95):.1f} s without waiting for a processor"
    ]
    for kind in sorted({each.kind for each in struck}):
        seconds = sorted(each.seconds for each in struck if each.kind == kind)
        lost = max(each.lost_steps for each in struck if each.kind == kind)
        lines.append(f"{kind}: {len(seconds)}, median {seconds[len(seconds) // 2]:.1f} s, most {seconds[-1]:.1f} s, "
                     f"at most {lost} steps again")  # fmt: skip
    return "\n".join(lines)


def test_some_kills_cost_no_bit(ground: Field, tmp_path: Path) -> None:
    chance = random.Random(20)
    kinds = deck(1, chance)
    digest = undisturbed(ground, 300, tmp_path)
    struck = fought(ground, "under-fire", steps=300, kinds=kinds, chance=chance, digest=digest)
    print(told(struck))
    assert {each.kind for each in struck if each.ended_attempt} <= set(ENDS_ATTEMPT)
    # Other tests may run beside this one: by the clock, half a minute is what the soak asks for.
    assert max(own_seconds(each) for each in struck) <= NEXT_STEP_SECONDS
    assert max(each.seconds for each in struck) <= ON_A_BUSY_MACHINE_SECONDS


def test_a_rank_that_hangs_costs_one_restart_and_leaves_its_stacks(ground: Field) -> None:
    job = ground.job(document("hanging", steps=200, progressDeadlineSeconds=10))
    job.wait_step(beyond=None, attempt=0)
    wait_for_process(job, random.Random(0), "nexa_train.rank").suspend()
    after = job.wait_step(beyond=None, attempt=1)
    failure = job.status["lastFailure"]
    assert (failure["cause"], failure["exitCode"], failure["attempt"]) == ("Stalled", 70, 0)
    run_id = job.status["runId"]
    events = json.loads(ground.cluster.kubectl("get", "events", "--output=json").stdout)["items"]
    (said,) = [event["message"] for event in events if event["reason"] == "Restarted" and run_id in event["message"]]
    assert f"s3://{MODEL_BUCKET}/checkpoints/{run_id}/stacks/attempt-0-node-" in said
    assert said.endswith(".txt")
    texts = [ground.read(f"checkpoints/{run_id}/stacks/attempt-0-node-{node}.txt").decode() for node in (0, 1)]
    assert all("most recent call first" in text for text in texts)
    assert sum(", T (stopped)" in text for text in texts) == 1
    assert after.attempt == 1
    assert job.wait_succeeded()["restarts"] == 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_dozens_of_kills_cost_no_bit_and_half_a_minute_each(ground: Field, tmp_path: Path) -> None:
    steps, struck = 600, []
    digest = undisturbed(ground, steps, tmp_path)
    for seed in range(3):
        chance = random.Random(seed)
        kinds = deck(2, chance)
        struck += fought(ground, f"under-fire-{seed}", steps=steps, kinds=kinds, chance=chance, digest=digest)
    print(told(struck))
    assert len(struck) >= 30
    assert percentile([each.seconds for each in struck], 0.95) <= NEXT_STEP_SECONDS

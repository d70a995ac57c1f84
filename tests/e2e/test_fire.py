"""Real training under fire: whatever is killed, every run ends, with the bits of the run that nothing disturbed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.product import MODEL_BUCKET, read_model
from tests.e2e.fire import (
    ENDS_ATTEMPT,
    SAVE_EVERY,
    Field,
    Strike,
    commit_lag_steps,
    deck,
    document,
    percentile,
    under_fire,
    undisturbed,
    wait_for_process,
)

pytestmark = pytest.mark.e2e

NEXT_STEP_SECONDS = 30


def with_room_for_one(ground: Field, job: dict[str, Any]) -> dict[str, Any]:
    """Of its gangs: all ranks of the next find a node once none of the last is there any more."""
    (node,) = ground.api.list("/api/v1/nodes")
    kibibytes = int(node["status"]["allocatable"]["memory"].removesuffix("Ki"))
    job["spec"]["cluster"]["resources"] = {"memory": f"{kibibytes * 2 // 5}Ki"}
    return job


def fought(
    ground: Field, name: str, *, steps: int, kinds: list[str], chance: random.Random, digest: str
) -> list[Strike]:
    """One job taken to its end under fire, and what is promised of each."""
    job = ground.job(with_room_for_one(ground, document(name, steps=steps)))
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
    # Other tests may run beside this one: what waited for a processor does not count. In the soak it does.
    assert max(own_seconds(each) for each in struck) <= NEXT_STEP_SECONDS


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
    kept = [f"checkpoints/{run_id}/stacks/attempt-0-node-{node}.txt" for node in (0, 1)]
    texts = [read_model(ground.minio, key).decode() for key in kept]
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

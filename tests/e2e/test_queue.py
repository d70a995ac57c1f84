"""Real training by leave of the real Kueue: whoever has to give way goes on from the step that he had reached."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nexa_operator.kinds import JOBS as GANGS
from nexa_operator.kinds import WORKLOADS
from nexa_operator.queueing import LABEL_GANG_UID, LABEL_PRIORITY, LABEL_QUEUE, waits_for
from nexa_operator.reading import as_time
from tests.cluster.controllers import start_kueue
from tests.cluster.product import condition
from tests.cluster.run import wait_until
from tests.e2e.fire import (
    JOBS,
    PODS,
    SAVE_EVERY,
    Field,
    Run,
    commit_lag_steps,
    document,
    strike,
    undisturbed,
)
from tests.integration.harness import QUEUE, apply_all, open_queue

pytestmark = pytest.mark.e2e

STEPS = 200
SHORT_STEPS = 10
NEVER = 1000
"""Saves nothing but at the end, and where a run is stopped."""
URGENT = "urgent"
REACTED_SECONDS = 120


@pytest.fixture(scope="module")
def queue(ground: Field) -> Field:
    """With a queue that has room for one gang of two pods."""
    start_kueue(ground.cluster)
    open_queue(ground.cluster, "default", memory="6Gi")
    urgent = {"kind": "WorkloadPriorityClass", "metadata": {"name": URGENT}, "value": 1000, "description": "first"}
    apply_all(ground.cluster, [{"apiVersion": "kueue.x-k8s.io/v1beta1", **urgent}])
    return ground


@pytest.fixture(scope="module")
def digest(ground: Field, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the weights of a run of all steps that nothing disturbs."""
    return undisturbed(ground, STEPS, tmp_path_factory.mktemp("undisturbed"))


def queued(name: str, *, steps: int = STEPS, save_every: int = NEVER, urgent: bool = False) -> dict[str, Any]:
    made = document(name, steps=steps)
    made["spec"]["training"]["saveEverySteps"] = save_every
    made["spec"]["schedule"] = {"queueName": QUEUE}
    if urgent:
        made["spec"]["cluster"]["labels"] = {LABEL_PRIORITY: URGENT}
    return made


def gang_of(run: Run, *, attempt: int = 0) -> dict[str, Any]:
    """Once it is there."""
    path = GANGS.path("default", f"{run.name}-a{attempt}")
    return wait_until(lambda: run.field.api.get(path), timeout_seconds=REACTED_SECONDS, what=path)


def wait_preempted(run: Run) -> None:
    """Looked at all the time, for what it still trains meanwhile."""

    def waits() -> bool:
        run.look()
        return condition(run.status, "Queued").get("reason") == "WaitingForAdmission"

    wait_until(
        waits, timeout_seconds=REACTED_SECONDS, what=f"{run.name} waits", interval_seconds=0.05, detail=run.describe
    )


def wait_refused(run: Run) -> None:
    """Until Kueue has found no quota for it, which any job may wait for while Kueue has not looked at it."""

    labels = f"{LABEL_GANG_UID}={gang_of(run)['metadata']['uid']}"

    def said() -> str:
        return waits_for(QUEUE, run.field.api.list(WORKLOADS.path("default"), labels=labels))

    wait_until(
        lambda: "insufficient" in said(), timeout_seconds=REACTED_SECONDS, what=f"{run.name} is refused", detail=said
    )


def ran_seconds(run: Run) -> float:
    """From when Kueue let it go to its end, in whole seconds."""
    status = gang_of(run)["status"]
    began, ended = (as_time(status[key]) for key in ("startTime", "completionTime"))
    assert began is not None
    assert ended is not None
    return (ended - began).total_seconds()


def wait_no_pods(run: Run) -> None:
    """Looked at all the time: they may train on until they are gone."""
    wait_until(
        lambda: run.look() is None and not run.field.api.list(PODS, labels=f"train.nexa.dev/job-name={run.name}"),
        timeout_seconds=REACTED_SECONDS,
        what=f"{run.name} has no pods",
        interval_seconds=0.05,
        detail=run.describe,
    )


def goes_on(run: Run) -> Run:
    """The same job, of which nothing was seen yet, once it has trained a step."""
    again = Run(run.field, run.name)
    again.wait_step(beyond=None, attempt=0)
    return again


def suspend(run: Run, value: bool) -> None:
    run.field.api.merge(f"{JOBS}/{run.name}", {"spec": {"schedule": {"suspend": value}}})


def used(queue: Field) -> str:
    """How much of its quota is taken."""
    found = queue.api.get("/apis/kueue.x-k8s.io/v1beta1/clusterqueues/default") or {}
    ((resource,),) = (flavor["resources"] for flavor in found["status"]["flavorsReservation"])
    return str(resource["total"])


def wait_quota_free(queue: Field) -> None:
    wait_until(lambda: used(queue) == "0", timeout_seconds=REACTED_SECONDS, what="nothing of the quota is taken")


def test_a_preempted_job_goes_on_from_the_step_that_it_had_reached(queue: Field, digest: str) -> None:
    low = queue.job(queued("low"))
    low.wait_beyond(20)
    before, gang = low.status, gang_of(low)["metadata"]["uid"]
    high = queue.job(queued("high", steps=SHORT_STEPS, urgent=True))
    wait_preempted(low)
    wait_no_pods(low)
    (stopped,) = low.manifests()
    assert low.reached[0] <= stopped["step"] < STEPS, "a checkpoint of the very step"
    told = low.status
    assert (told["phase"], told["goodput"]["state"]) == ("Queued", "queue")
    assert high.wait_succeeded()["step"] == SHORT_STEPS

    again = goes_on(low)
    assert again.restored[0] == stopped["step"]
    status = low.wait_succeeded()
    assert [each["step"] for each in low.manifests()] == [stopped["step"], STEPS]
    assert status["checkpoint"]["weightsDigest"] == digest
    assert (status["attempt"], status["restarts"], status["chargedRestarts"]) == (0, 0, 0)
    assert gang_of(low)["metadata"]["uid"] == gang
    spent = status["goodput"]
    assert spent["queueSeconds"] - before["goodput"]["queueSeconds"] >= ran_seconds(high) - 1
    assert not {"lostSeconds", "restartSeconds", "suspendedSeconds"} & spent.keys()
    wait_quota_free(queue)


def test_a_rank_killed_under_a_queue_costs_one_attempt_which_is_queued_anew(queue: Field, digest: str) -> None:
    job = queue.job(queued("killed", save_every=SAVE_EVERY))
    job.wait_beyond(20)
    struck = strike(job, "rank", random.Random(0))
    assert struck.ended_attempt
    assert gang_of(job, attempt=1)["metadata"]["labels"][LABEL_QUEUE] == QUEUE
    wait_until(lambda: used(queue) == "6Gi", timeout_seconds=REACTED_SECONDS, what="the quota is taken once")
    status = job.wait_succeeded()
    assert status["checkpoint"]["weightsDigest"] == digest
    assert (status["attempt"], status["restarts"]) == (1, 1)
    assert struck.lost_steps <= SAVE_EVERY + commit_lag_steps(job.manifests())
    wait_quota_free(queue)


def test_a_suspended_job_leaves_its_quota_to_who_waits_for_it(queue: Field, digest: str) -> None:
    first = queue.job(queued("first"))
    wait_until(lambda: len(first.pods()) == 2, timeout_seconds=REACTED_SECONDS, what="first is let go")
    second = queue.job(queued("second", steps=SHORT_STEPS))
    wait_refused(second)
    first.wait_beyond(20)
    suspend(first, True)
    wait_no_pods(first)
    (stopped,) = first.manifests()
    assert first.reached[0] <= stopped["step"] < STEPS
    assert second.wait_succeeded()["step"] == SHORT_STEPS
    assert first.status["phase"] == "Suspended"
    suspend(first, False)
    again = goes_on(first)
    assert again.restored[0] == stopped["step"]
    status = first.wait_succeeded()
    assert [each["step"] for each in first.manifests()] == [stopped["step"], STEPS]
    assert status["checkpoint"]["weightsDigest"] == digest
    assert (status["attempt"], status["restarts"]) == (0, 0)
    wait_quota_free(queue)

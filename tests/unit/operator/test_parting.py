"""A job that takes its artifacts with it: its ranks end first, and it is never held for ever."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from nexa_operator import naming, parting
from nexa_operator.parting import Await, Clear, LetGo, Remove, holds, next_step, wants_hold
from nexa_operator.plan import Defaults, make_plan
from nexa_operator.runtimes import beside
from tests.unit.operator.builders import LATER, NOW, UID, body, condition, gang_job, job, pod

LONG_AGO = NOW - datetime.timedelta(days=1)
DELETED = "2026-11-23T12:00:00Z"


def deleted(**metadata: Any) -> dict[str, Any]:
    document = body(schedule={"deletionPolicy": "Delete"})
    document["metadata"] |= {"finalizers": [naming.FINALIZER], "deletionTimestamp": DELETED, **metadata}
    return document


def step(**given: Any) -> parting.Step:
    return next_step(deleted(), **{"gangs": [], "jobs": [], "pods": [], "began": LONG_AGO, "now": NOW, **given})


def removal(*conditions: dict[str, str]) -> dict[str, Any]:
    document = gang_job(conditions=list(conditions))
    document["metadata"] |= {"name": "demo-removal", "labels": {naming.LABEL_ROLE: naming.ROLE_REMOVAL}}
    return document


def test_only_jobs_that_say_so_are_held() -> None:
    assert not wants_hold(body())
    assert wants_hold(body(schedule={"deletionPolicy": "Delete"}))
    assert not wants_hold(deleted())
    assert holds(deleted())
    assert not wants_hold(deleted(finalizers=[])), "too late to hold it"


def test_gangs_end_before_anything_is_removed() -> None:
    assert step(gangs=[gang_job()]) == Clear(gangs=("demo-a0",))
    going = gang_job()
    going["metadata"]["deletionTimestamp"] = DELETED
    assert step(gangs=[going]) == Remove()


def test_ranks_that_may_still_commit_are_waited_for_but_not_those_of_a_dead_node() -> None:
    assert step(pods=[pod()]) == Await()
    committing = pod(deleting=True)
    committing["metadata"]["deletionTimestamp"] = "2026-11-23T12:00:30Z"
    assert step(pods=[committing]) == Await()
    assert step(pods=[committing], now=LATER) == Remove()
    assert step(pods=[pod(phase="Failed")]) == Remove()


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        ((), Await()),
        ((condition("Complete"),), LetGo()),
        ((condition("Failed", message="deadline"),), LetGo(problem="demo-removal failed: deadline")),
    ],
)
def test_the_job_goes_when_the_removal_has_ended_however_that_was(ended: Any, expected: parting.Step) -> None:
    assert step(jobs=[removal(*ended)]) == expected


def test_a_job_is_held_for_a_bounded_time_whatever_happens() -> None:
    late = NOW + datetime.timedelta(seconds=parting.PATIENCE_SECONDS + 1)
    for world in ({"gangs": [gang_job()]}, {"pods": [pod()]}, {"jobs": [removal()]}):
        got = step(**world, now=late)
        assert isinstance(got, LetGo)
        assert got.problem
    assert step(jobs=[removal(condition("Complete"))], now=late) == LetGo(), "it was done while nobody looked"


def test_the_pod_that_removes_has_the_store_and_no_gpu() -> None:
    described = job(cluster={"numNodes": 2, "gpusPerNode": 8}, training={"globalBatchSize": 16})
    plan = make_plan(described, owner_uid=UID, attempt=3, defaults=Defaults(image="trainer:1", storage="default"))
    document = beside.removal(plan)
    (container,) = document["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "nexa_train.removal"]
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert container["envFrom"][1] == {"secretRef": {"name": "nexa-storage-default"}}
    assert document["spec"]["completions"] == 1
    assert document["metadata"]["ownerReferences"][0]["uid"] == UID


def test_pods_that_ask_for_room_are_placed_like_those_of_the_gang_and_know_no_secret() -> None:
    described = job(cluster={"numNodes": 4, "minNodes": 1, "nodeSelector": {"pool": "a"}, "gpusPerNode": 2})
    plan = make_plan(
        described, owner_uid=UID, attempt=3, defaults=Defaults(image="trainer:1", storage="default"), num_nodes=2,
        excluded_nodes=("n7", "n8"),
    )  # fmt: skip
    document = beside.room(plan, num_pods=2)
    spec = document["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert (document["metadata"]["name"], document["spec"]["parallelism"]) == ("demo-a3-room", 2)
    assert (spec["nodeSelector"], container["resources"]["limits"]) == ({"pool": "a"}, {"nvidia.com/gpu": "2"})
    terms = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [field["values"] for field in terms[0]["matchFields"]] == [["n7"], ["n8"]]
    assert "envFrom" not in container
    assert container["env"] == []
    assert spec["terminationGracePeriodSeconds"] == 0


def test_time_without_an_operator_is_not_what_ends_its_patience() -> None:
    late = NOW + datetime.timedelta(seconds=parting.PATIENCE_SECONDS + 1)
    assert step(gangs=[gang_job()], began=late, now=late) == Clear(gangs=("demo-a0",))
    assert step(began=late, now=late) == Remove()

"""An event counts as new exactly when a look would see a difference."""

from __future__ import annotations

from typing import Any

import pytest

from nexa_operator.naming import FINALIZER
from nexa_operator.news import (
    NEWBORN_GANG,
    NEWBORN_POD,
    News,
    has_failed,
    sign_of_gang,
    sign_of_pod,
    sign_of_training_job,
)
from tests.unit.operator.builders import body, condition, ended, gang_job, pod


def test_the_operator_s_own_status_is_no_news_but_a_change_of_the_spec_or_a_deletion_is() -> None:
    news = News(sign_of_training_job)
    job = body()
    assert news.is_new("ADDED", job)
    assert not news.is_new("MODIFIED", job | {"status": {"phase": "Running"}})
    job["metadata"]["generation"] = 2
    assert news.is_new("MODIFIED", job)
    job["metadata"]["deletionTimestamp"] = "2026-11-23T12:00:00Z"
    assert news.is_new("MODIFIED", job)


def test_a_finalizer_of_ours_that_somebody_took_off_is_news() -> None:
    news, job = News(sign_of_training_job), body()
    job["metadata"]["finalizers"] = [FINALIZER, "example.com/theirs"]
    assert news.is_new("ADDED", job)
    job["metadata"]["finalizers"] = [FINALIZER]
    assert not news.is_new("MODIFIED", job)
    job["metadata"]["finalizers"] = []
    assert news.is_new("MODIFIED", job)


def test_a_gang_s_counters_are_no_news_but_its_conditions_are() -> None:
    news = News(sign_of_gang, NEWBORN_GANG)

    def seen(**status: Any) -> bool:
        job = gang_job(**status)
        job["metadata"]["generation"] = 1
        return news.is_new("MODIFIED", job)

    assert not seen(), "it was made as it was asked for"
    assert not seen(active=2, ready=1)
    assert seen(conditions=[condition("FailureTarget", reason="BackoffLimitExceeded")])
    assert not seen(failed=1, conditions=[condition("FailureTarget", reason="BackoffLimitExceeded")])
    assert seen(conditions=[condition("FailureTarget", reason="DeadlineExceeded")])


def test_each_object_has_its_own_news_and_a_deleted_one_is_forgotten() -> None:
    news = News(sign_of_training_job)
    other = body()
    other["metadata"]["uid"] = "another"
    assert news.is_new(None, body())
    assert news.is_new(None, other)
    assert news.is_new("DELETED", body())
    assert news.is_new("ADDED", body())
    assert not news.is_new("MODIFIED", other)


def test_a_pod_on_its_way_is_no_news_but_what_holds_it_up_and_what_becomes_of_it_is() -> None:
    news = News(sign_of_pod, NEWBORN_POD)

    def seen(phase: str = "Pending", **status: Any) -> bool:
        body = pod(0, phase=phase, **status)
        body["metadata"]["uid"] = "a-pod"
        return news.is_new("MODIFIED", body)

    def waits(reason: str) -> list[dict[str, Any]]:
        return [{"name": "trainer", "state": {"waiting": {"reason": reason}}}]

    assert not seen()
    assert not seen(conditions=[condition("PodScheduled")])
    assert not seen(containerStatuses=waits("ContainerCreating"))
    assert seen(containerStatuses=waits("ImagePullBackOff"))
    assert seen(conditions=[condition("PodScheduled", status="False", message="0/3 nodes")])
    assert seen("Running", conditions=[condition("PodScheduled")])
    assert not seen("Running", conditions=[condition("Ready")])
    assert seen("Running", conditions=[condition("DisruptionTarget")])
    assert seen("Failed", containerStatuses=ended(1))
    assert seen("Failed", containerStatuses=ended(2))


@pytest.mark.parametrize(("child", "expected"), [
    (pod(phase="Failed", containerStatuses=ended(70)), True),
    (pod(phase="Succeeded", containerStatuses=ended(0)), False),
    (pod(phase="Running"), False),
    (gang_job(), False),
])  # fmt: skip
def test_a_failed_pod_is_told_from_others(child: dict[str, Any], expected: bool) -> None:
    assert has_failed(child) is expected


def test_a_pod_that_did_its_part_is_no_news_where_a_job_tells_when_all_have() -> None:
    def is_told(owner: str) -> list[bool]:
        news = News(sign_of_pod, NEWBORN_POD)
        bodies = [pod(0, phase="Running"), *(pod(0, phase=phase, containerStatuses=ended(0)) for phase in PHASES)]
        for each in bodies:
            each["metadata"]["uid"] = "a-pod"
            each["metadata"]["ownerReferences"][0]["kind"] = owner
        return [news.is_new("MODIFIED", each) for each in bodies]

    assert is_told("Job") == [True, False, False, True]
    assert is_told("PyTorchJob") == [True, True, True, True]


PHASES = ("Running", "Succeeded", "Failed")


def test_a_pod_that_looks_for_room_is_news_once_it_has_found_a_node() -> None:
    news, asking = News(sign_of_pod, NEWBORN_POD), pod(0, phase="Pending")
    asking["metadata"]["uid"] = "a-pod"
    asking["metadata"]["labels"]["train.nexa.dev/role"] = "room"
    assert not news.is_new("ADDED", asking)
    asking["status"]["conditions"] = [condition("PodScheduled")]
    assert news.is_new("MODIFIED", asking)

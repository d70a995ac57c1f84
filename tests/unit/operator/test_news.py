"""An event counts as new exactly when a look would see a difference."""

from __future__ import annotations

from typing import Any

from nexa_operator.news import News, sign_of_gang, sign_of_training_job
from tests.unit.operator.builders import body, condition, gang_job


def test_the_operator_s_own_status_is_no_news_but_a_change_of_the_spec_or_a_deletion_is() -> None:
    news = News(sign_of_training_job)
    job = body()
    assert news.is_new("ADDED", job)
    assert not news.is_new("MODIFIED", job | {"status": {"phase": "Running"}})
    job["metadata"]["generation"] = 2
    assert news.is_new("MODIFIED", job)
    job["metadata"]["deletionTimestamp"] = "2026-11-23T12:00:00Z"
    assert news.is_new("MODIFIED", job)


def test_a_gang_s_counters_are_no_news_but_its_conditions_are() -> None:
    news = News(sign_of_gang)

    def seen(**status: Any) -> bool:
        return news.is_new("MODIFIED", gang_job(**status))

    assert seen()
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

"""A job that no operator can carry out is failed by name, but not while its pods do."""

from __future__ import annotations

from datetime import timedelta

import pytest

from nexa_operator.decide import Create, Decision, Expire, Fail, Rest, Succeed, Wait, Watch
from nexa_operator.observe import Gang, Observed, Record
from nexa_operator.plan import Defaults
from nexa_operator.reconcile import judge
from tests.unit.operator.builders import NOW, body, failed, gang, rank, seen

HEAVY = Defaults(image="trainer:1", heavy_image="heavy:1")
NO_HEAVY = Defaults(image="trainer:1")


def judged(observed: Observed, defaults: Defaults) -> Decision:
    return judge(body(backend="axolotl"), observed, defaults=defaults, now=NOW)[1]


def test_a_job_whose_image_nobody_named_waits_for_it() -> None:
    decision = judged(seen(), NO_HEAVY)
    assert isinstance(decision, Wait)
    assert (decision.reason, decision.seconds) == ("RuntimeUnavailable", None)
    assert "spec.image" in decision.message
    assert judged(seen(), HEAVY) == Create(attempt=0, num_nodes=2)


@pytest.mark.parametrize(
    ("observed", "expected"), [(seen(gang(rank(0), rank(1))), Watch()), (seen(gang(complete=True)), Succeed())]
)
def test_pods_that_run_go_on_when_the_image_of_their_backend_is_no_longer_named(
    observed: Observed, expected: Decision
) -> None:
    assert judged(observed, NO_HEAVY) == expected


def test_a_lost_attempt_is_not_followed_by_one_without_an_image() -> None:
    assert isinstance(judged(seen(gang(failed())), NO_HEAVY), Wait)


def test_a_job_that_cannot_be_understood_is_deleted_when_its_time_to_live_is_over() -> None:
    broken = body(schedule={"ttlSecondsAfterFinished": 60}, artifacts={"uri": "pod-local/folder"})
    for seconds, expected in ((30, Rest(remaining_seconds=30)), (60, Expire())):
        ended = Record(finished="Failed", completed_at=NOW - timedelta(seconds=seconds))
        assert judge(broken, seen(record=ended), defaults=HEAVY, now=NOW) == (None, expected)


def test_a_gang_that_another_version_began_goes_on_though_this_one_does_not_understand_the_job() -> None:
    strange = body(schedule={"aKeyOfTomorrow": 1})

    def decided(observed: Observed) -> Decision:
        return judge(strange, observed, defaults=HEAVY, now=NOW)[1]

    runs = decided(seen(gang(rank(0), rank(1))))
    assert isinstance(runs, Watch)
    assert "aKeyOfTomorrow" in runs.problem
    assert decided(seen(gang(complete=True))) == Succeed()
    assert isinstance(decided(seen(gang())), Watch), "its pods are not made yet"
    assert isinstance(decided(seen(gang(rank(0), rank(1, phase="Pending")))), Watch)


@pytest.mark.parametrize(
    "observed",
    [
        seen(),
        seen(gang(failed())),
        seen(gang(failure="BackoffLimitExceeded")),
        seen(gang(rank(0), deleting=True)),
        seen(gang(rank(0), suspended=True)),
    ],
    ids=["new", "lost", "failed", "deleted", "suspended"],
)
def test_what_a_later_crd_lets_a_job_say_waits_for_an_operator_that_knows_it_and_what_is_wrong_fails(
    observed: Observed,
) -> None:
    decision = judge(body(schedule={"aKeyOfTomorrow": 1}), observed, defaults=HEAVY, now=NOW)[1]
    assert isinstance(decision, Wait)
    assert decision.reason == "RuntimeUnavailable"
    assert "of a later version than this operator" in decision.message
    for wrong in (body(training={"maxSteps": "x"}), body(training={"maxSteps": "x"}, schedule={"aKeyOfTomorrow": 1})):
        decision = judge(wrong, observed, defaults=HEAVY, now=NOW)[1]
        assert isinstance(decision, Fail)
        assert decision.reason == "ConfigRejected"


@pytest.mark.parametrize(
    "waits",
    [gang(suspended=True), gang(rank(0, deleting=True), failed(1), suspended=True)],
    ids=["for its turn", "again, for it was preempted"],
)
def test_a_gang_that_waits_in_its_queue_waits_on_though_this_version_does_not_understand_the_job(waits: Gang) -> None:
    strange = body(schedule={"queueName": "team", "aKeyOfTomorrow": 1})
    decision = judge(strange, seen(waits), defaults=HEAVY, now=NOW)[1]
    assert isinstance(decision, Watch)
    assert "aKeyOfTomorrow" in decision.problem
    broken = gang(suspended=True, failure="BackoffLimitExceeded")
    assert isinstance(judge(strange, seen(broken), defaults=HEAVY, now=NOW)[1], Wait)


def test_what_the_server_can_never_take_is_not_tried_again_but_what_runs_goes_on() -> None:
    def decided(observed: Observed) -> Decision:
        said = "create .../jobs: 422: spec.template.spec.nodeSelector: Invalid value"
        return judge(body(), observed, defaults=HEAVY, now=NOW, invalid=said)[1]

    decision = decided(seen())
    assert isinstance(decision, Fail)
    assert (decision.reason, "nodeSelector" in decision.message) == ("ConfigRejected", True)
    assert decided(seen(gang(rank(0), rank(1)))) == Watch()

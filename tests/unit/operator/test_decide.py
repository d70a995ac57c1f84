"""What to do about what was seen: a table of sentences."""

from __future__ import annotations

import datetime
from dataclasses import replace
from typing import Any

import pytest

from nexa_operator.classify import BROKEN_NODE_CONDITIONS, Loss, classify
from nexa_operator.decide import (
    Create,
    Expire,
    Fail,
    Hold,
    Linger,
    Probe,
    Rest,
    Restart,
    Resume,
    Shrink,
    Succeed,
    Suspend,
    Wait,
    Watch,
    decide,
    next_look_seconds,
)
from nexa_operator.goodput import Account
from nexa_operator.observe import Observed, Record
from nexa_train.config.spec import JobSpec, RecoveryRule
from tests.unit.operator.builders import NOW, checkpoint, failed, gang, job, rank, seen, words

SUSPENDED = {"suspend": True}


def spec_of(
    schedule: dict[str, Any] | None = None, cluster: dict[str, Any] | None = None, batch: int = 8, **recovery: Any
) -> JobSpec:
    groups = {"schedule": schedule or {}, "cluster": {"num_nodes": 2, **(cluster or {})}, "recovery": recovery}
    return job(**groups, training={"global_batch_size": batch}).spec


def decision(observed: Observed, **given: Any) -> Any:
    return decide(observed, spec=spec_of(**given), now=NOW)


def ago(seconds: float) -> datetime.datetime:
    return NOW - datetime.timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        pytest.param(seen(), Create(attempt=0, num_nodes=2), id="nothing there: the first attempt"),
        pytest.param(
            seen(record=Record(attempt=3)),
            Create(attempt=3, num_nodes=2),
            id="nothing there after a restart on record: that attempt",
        ),
        pytest.param(seen(gang()), Watch(), id="no pods yet: watch"),
        pytest.param(seen(gang(rank(0), rank(1))), Watch(), id="all pods run: watch"),
        pytest.param(seen(gang(complete=True)), Succeed(), id="the Job is complete, its pods gone: success"),
        pytest.param(
            seen(gang(suspended=True)), Resume(attempt=1, num_nodes=2), id="no longer suspended: another attempt"
        ),
        pytest.param(
            seen(gang(failed(), deleting=True)),
            Resume(attempt=1, num_nodes=2, why="in place of one that somebody deleted"),
            id="someone deletes the gang and its ranks have ended: another attempt",
        ),
    ],
)
def test_a_job_that_should_run(observed, expected):
    assert decision(observed) == expected


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        pytest.param(seen(), Hold(), id="nothing runs: nothing is made"),
        pytest.param(seen(gang(rank())), Suspend(gang="demo-a0"), id="the gang runs: stop it"),
        pytest.param(seen(gang(suspended=True)), Hold(), id="the gang is stopped: leave it"),
        pytest.param(
            seen(gang(failed(exit_code=75), suspended=True)), Hold(), id="ranks that stop as asked are not lost"
        ),
        pytest.param(seen(gang(complete=True)), Succeed(), id="it was done before it could stop: success counts"),
    ],
)
def test_a_job_that_is_suspended(observed, expected):
    assert decision(observed, schedule=SUSPENDED) == expected


def test_a_suspended_job_s_ranks_may_still_commit_and_are_looked_at_until_they_are_gone() -> None:
    saving = rank(0, deleting=True, gone_by=NOW + datetime.timedelta(seconds=90))
    for observed in (seen(gang(saving, suspended=True)), seen(gang(saving, deleting=True)), seen(strays=(saving,))):
        held = decision(observed, schedule=SUSPENDED)
        assert held == Hold(seconds=90.0)
        assert next_look_seconds(observed, held, spec=spec_of(SUSPENDED), now=NOW) == 90.0
    hangs = rank(0, deleting=True, gone_by=ago(1))
    assert decision(seen(gang(hangs, suspended=True)), schedule=SUSPENDED) == Hold()
    preempted = seen(gang(forerunners=(saving,), deleting=True))
    assert decision(preempted, schedule=SUSPENDED | {"queue_name": "q"}) == Hold(seconds=90.0)
    resumed = decision(preempted, schedule={"queue_name": "q"})
    assert (resumed.reason, resumed.seconds) == ("Stopping", 90.0)
    stops = decision(seen(gang(rank(0))), schedule=SUSPENDED)
    assert next_look_seconds(seen(gang(rank(0))), stops, spec=spec_of(SUSPENDED), now=NOW) == 2.0


def test_a_success_is_not_believed_while_a_rank_that_did_not_end_well_stands_against_it() -> None:
    done, deleted = [rank(index, phase="Succeeded") for index in (0, 1)], rank(1, deleting=True)
    assert decision(seen(gang(*done, complete=True))) == Succeed()
    assert decision(seen(gang(*done, deleted, complete=True))) == Succeed()
    assert decision(seen(gang(done[0], rank(-1, replaced=True), complete=True))) == Succeed(), "its pod was cleaned up"
    usurped = decision(seen(gang(done[0], deleted, complete=True)))
    assert isinstance(usurped, Restart)
    assert usurped.loss.cause == "PodDeleted"
    assert usurped.charged == 0


def test_a_gang_that_somebody_else_suspended_is_left_to_him() -> None:
    stopped = gang(rank(0, deleting=True), suspended=True)
    waits = decision(seen(stopped, record=Record(suspends=False)))
    assert isinstance(waits, Wait)
    assert (waits.reason, waits.seconds) == ("SuspendedByAnother", None)
    assert isinstance(decision(seen(gang(rank(0)), record=Record(suspends=False))), Watch)
    assert isinstance(decision(seen(stopped, record=Record(suspends=True))), Resume | Wait)
    assert isinstance(decision(seen(gang(deleting=True), record=Record(suspends=False))), Resume)


def test_a_rule_is_asked_also_where_no_pod_is_left() -> None:
    rules = (RecoveryRule(causes=["PodDeleted"], action="fail"),)
    assert classify(gang(), rules=rules).action == "fail"
    assert classify(gang()).action == "retry"


@pytest.mark.parametrize("finished", ["Succeeded", "Failed"])
def test_an_end_is_final_whatever_the_children_say_later(finished):
    for there in (None, gang(failed()), gang(complete=True), gang(rank())):
        assert decision(seen(there, record=Record(finished=finished))) == Rest()


def test_a_finished_job_is_deleted_when_its_time_to_live_is_over():
    schedule = {"ttl_seconds_after_finished": 100}
    for age, expected in ((40, Rest(remaining_seconds=60.0)), (100, Expire()), (500, Expire())):
        record = Record(finished="Failed", completed_at=NOW - datetime.timedelta(seconds=age))
        assert decision(seen(record=record), schedule=schedule) == expected


def test_one_failed_rank_of_many_ends_the_attempt():
    got = decision(seen(gang(rank(0), failed(1))))
    assert isinstance(got, Restart)
    assert (got.attempt, got.charged) == (1, 1)


def test_a_failure_target_without_any_pod_left_ends_the_attempt_without_a_charge():
    got = decision(seen(gang(failure="BackoffLimitExceeded")))
    lost = Loss(cause="PodDeleted", charged=False)
    assert got == Restart(attempt=1, num_nodes=2, loss=lost, charged=0, losses=1)


def test_a_pod_on_a_dead_node_that_never_ends_is_lost_all_the_same():
    dead = rank(1, deleting=True, disruption="DeletionByTaintManager")
    got = decision(seen(gang(rank(0), dead)))
    assert isinstance(got, Restart)
    assert got.loss == Loss(cause="Disrupted", charged=False)


EVICTED = {"deleting": True, "disruption": "EvictionByEvictionAPI", "gone_by": NOW + datetime.timedelta(seconds=117)}


def test_ranks_that_are_drained_are_waited_for_while_they_commit() -> None:
    got = decision(seen(gang(rank(0, **EVICTED), rank(1)), lost_seconds=5.0))
    assert got == Linger(seconds=117.0)
    ended = gang(failed(0, deleting=True, exit_code=75, termination=words(cause="Stopped")), failed(1, exit_code=75))
    assert isinstance(decision(seen(ended, lost_seconds=9.0)), Restart)


@pytest.mark.parametrize(
    "change",
    [
        {"disruption": "DeletionByTaintManager"},
        {"disruption": ""},
        {"node_conditions": frozenset({"NodeNotReady"})},
        {"gone_by": ago(1)},
        {"phase": "Failed", "exit_code": 75},
    ],
    ids=["its node is silent", "somebody deleted it", "its node is silent since", "its time is over", "it has ended"],
)
def test_nobody_waits_for_ranks_that_commit_nothing(change: dict[str, Any]) -> None:
    got = decision(seen(gang(rank(0, **{**EVICTED, **change}), rank(1)), lost_seconds=5.0))
    assert isinstance(got, Restart)
    assert not got.loss.charged


def test_a_failure_of_another_rank_s_own_does_not_wait_for_those_that_are_drained() -> None:
    broken = failed(1, exit_code=2, termination=words(cause="ConfigError", exit_code=2, retryable=False))
    assert isinstance(decision(seen(gang(rank(0, **EVICTED), broken), lost_seconds=5.0)), Fail)


def test_a_pod_that_its_kubelet_refused_is_not_the_job_s_fault() -> None:
    refused = failed(1, exit_code=None, began=False, reason="UnexpectedAdmissionError")
    got = decision(seen(gang(rank(0), refused)))
    assert got.loss == Loss(cause="UnexpectedAdmissionError", charged=False)
    assert (got.charged, got.losses) == (0, 1), "it waits ever longer all the same"


def test_of_two_that_failed_in_the_same_second_the_one_without_memory_tells_why() -> None:
    reset = failed(0, finished_at=SECOND, termination=words(cause="RuntimeError", message="Connection reset by peer"))
    killed = failed(1, finished_at=SECOND, exit_code=137, reason="OOMKilled")
    assert decision(seen(gang(reset, killed))).loss.cause == "OOMKilled"


def test_what_has_begun_and_cannot_be_seen_is_not_called_suspended() -> None:
    begun = seen(unavailable="install it", record=Record(num_nodes=2))
    assert decision(begun, schedule=SUSPENDED) == Wait(reason="RuntimeUnavailable", message="install it")
    assert decision(seen(unavailable="install it"), schedule=SUSPENDED) == Hold()


@pytest.mark.parametrize(("code", "cause"), [(2, "ConfigError"), (3, "NotFoundError"), (5, "DataError")])
def test_what_another_attempt_would_only_repeat_fails_for_good(code, cause):
    got = decision(seen(gang(failed(exit_code=code))))
    assert isinstance(got, Fail)
    assert got.reason == cause


def test_the_trainer_s_word_on_retrying_counts_more_than_its_exit_code():
    final = failed(exit_code=1, termination=words(cause="NonFiniteLossError", retryable=False, message="loss is nan"))
    got = decision(seen(gang(final)))
    assert (got.reason, got.message) == ("NonFiniteLossError", "loss is nan")


def test_an_attempt_that_another_writer_overtook_goes_on_from_what_that_one_committed():
    overtaken = failed(exit_code=4, termination=words(cause="SupersededError", exit_code=4, retryable=False))
    assert isinstance(decision(seen(gang(overtaken))), Restart)


@pytest.mark.parametrize(
    ("record", "newest", "outcome"),
    [
        (Record(charged=0), None, 1),
        (Record(charged=2), None, 3),
        (Record(charged=3), None, "RestartsExhausted"),
        (Record(charged=3, step_at_last_failure=50), checkpoint(50), "RestartsExhausted"),
        (Record(charged=3, step_at_last_failure=50), checkpoint(60), 1),
        (Record(charged=3, step_at_last_failure=-1), checkpoint(10), 1),
    ],
    ids=[
        "the first failure",
        "the last restart of three",
        "no restart left",
        "no restart left and no newer checkpoint",
        "a newer checkpoint refills the budget",
        "the first checkpoint refills it too",
    ],
)
def test_the_budget(record, newest, outcome):
    got = decision(seen(gang(failed(termination=words(checkpoint=newest))), record=record), max_restarts=3)
    assert (got.charged if isinstance(got, Restart) else got.reason) == outcome


def test_disruptions_never_exhaust_the_budget():
    lost = gang(failed(exit_code=137, disruption="TerminationByKubelet"))
    got = decision(seen(lost, record=Record(charged=0)), max_restarts=0)
    assert isinstance(got, Restart)
    assert got.charged == 0


RETRY_CONFIG = RecoveryRule(exit_codes=[2], action="retry")
FAIL_STALL = RecoveryRule(exit_codes=[70, 71], action="fail")


def test_a_rule_overrules_the_built_in_classification():
    assert isinstance(decision(seen(gang(failed(exit_code=2))), rules=[RETRY_CONFIG]), Restart)
    assert isinstance(decision(seen(gang(failed(exit_code=70))), rules=[FAIL_STALL]), Fail)
    assert isinstance(decision(seen(gang(failed(exit_code=72))), rules=[FAIL_STALL]), Restart)


def test_the_first_rule_that_fits_wins():
    rules = [RETRY_CONFIG, RecoveryRule(exit_codes=[2], action="fail")]
    assert isinstance(decision(seen(gang(failed(exit_code=2))), rules=rules), Restart)


FIRST, SECOND = "2026-11-23T12:00:00Z", "2026-11-23T12:00:05Z"


@pytest.mark.parametrize(
    ("ranks", "cause"),
    [
        pytest.param(
            [
                failed(0, finished_at=SECOND, termination=words(cause="ConnectionError")),
                failed(1, finished_at=FIRST, reason="OOMKilled", exit_code=137),
            ],
            "OOMKilled",
            id="the first to end explains those that lost its connection",
        ),
        pytest.param(
            [
                failed(0, finished_at=FIRST, termination=words(cause="ConnectionError")),
                failed(1, finished_at=SECOND, disruption="TerminationByKubelet", exit_code=137),
            ],
            "Disrupted",
            id="a disruption explains failures that were noticed before it",
        ),
        pytest.param(
            [
                failed(0, finished_at=FIRST, termination=words(cause="ConnectionError")),
                failed(1, finished_at=SECOND, exit_code=5),
            ],
            "DataError",
            id="what is final explains everything",
        ),
        pytest.param(
            [
                failed(0, finished_at=FIRST, exit_code=75, termination=words(cause="Stopped", exit_code=75)),
                failed(1, finished_at=SECOND, exit_code=1, reason="Error"),
            ],
            "Killed",
            id="a rank that stopped as asked explains nothing",
        ),
        pytest.param(
            [failed(0, finished_at=FIRST, termination=words(cause="Boom")), rank(1, deleting=True)],
            "Boom",
            id="the Job's controller removes the others: that is no disruption",
        ),
        pytest.param([rank(0, deleting=True)], "PodDeleted", id="deleted by hand"),
        pytest.param([failed(0, deleting=True, exit_code=137)], "PodDeleted", id="deleted by hand, and in a hurry"),
        pytest.param([failed(0, deleting=True, exit_code=143)], "PodDeleted", id="deleted before it heard of it"),
        pytest.param(
            [failed(0, deleting=True, exit_code=137, reason="OOMKilled")], "OOMKilled", id="killed as it was deleted"
        ),
        pytest.param(
            [failed(0, finished_at=SECOND), failed(1, finished_at=FIRST, deleting=True, exit_code=137)],
            "Killed",
            id="removed after another had failed, in which it did not stop in time",
        ),
        pytest.param([failed(0, exit_code=None, reason="Evicted")], "Evicted", id="evicted before it had started"),
    ],
)
def test_the_rank_that_tells_the_most_is_the_cause(ranks, cause):
    assert classify(gang(*ranks)).cause == cause


def test_ranks_that_stopped_as_asked_are_not_charged():
    words_75 = words(cause="Stopped", exit_code=75)
    stopped = [failed(n, finished_at=FIRST, exit_code=75, termination=words_75) for n in (0, 1)]
    assert classify(gang(*stopped)).charged is False


def test_a_crash_is_charged_even_when_the_survivors_are_already_being_removed():
    loss = classify(gang(failed(0), rank(1, deleting=True), rank(2, deleting=True)))
    assert (loss.cause, loss.charged) == ("Killed", True)


@pytest.mark.parametrize(("code", "charged"), [(137, False), (143, False), (1, True)])
def test_a_pod_that_was_deleted_and_killed_for_it_is_not_charged_and_one_that_failed_by_itself_is(
    code: int, charged: bool
) -> None:
    assert classify(gang(failed(exit_code=code, deleting=True, reason="Error"))).charged is charged
    assert classify(gang(failed(exit_code=code, reason="Error"))).charged
    spoke = failed(exit_code=code, deleting=True, termination=words(cause="RuntimeError"))
    assert classify(gang(spoke)).charged


@pytest.mark.parametrize("reason", ["ContainerCreating", "PodInitializing", "ImagePullBackOff"])
def test_what_a_pod_still_waited_for_when_it_was_removed_does_not_hide_why(reason: str) -> None:
    loss = classify(gang(failed(0), rank(1, deleting=True), rank(2, phase="Pending", deleting=True, reason=reason)))
    assert (loss.cause, loss.charged) == ("Killed", True)
    alone = classify(gang(rank(0, phase="Pending", deleting=True, reason=reason)))
    assert (alone.cause, alone.charged) == ("PodDeleted", False)


@pytest.mark.parametrize(("ran", "charged"), [(False, 0), (True, 1)], ids=["without room for all", "with room"])
def test_ranks_that_waited_for_pods_without_room_use_up_no_restart(ran: bool, charged: int) -> None:
    lost = gang(failed(0, termination=words(cause="RendezvousFailed")))
    got = decision(seen(lost, record=Record(ran=ran)))
    assert isinstance(got, Restart)
    assert (got.loss.cause, got.charged) == ("RendezvousFailed", charged)


def test_a_gang_that_somebody_suspended_and_let_go_cannot_meet_again_and_is_charged_nothing_for_it() -> None:
    lost = gang(failed(0, termination=words(cause="RendezvousFailed")), was_suspended=True)
    again, queued = (
        decision(seen(lost, record=Record(ran=True)), schedule=given) for given in ({}, {"queue_name": "q"})
    )
    assert again.charged == 0
    assert queued.charged == 1, "it meets by names, which stay"


def test_attempts_that_make_the_microbatch_smaller_use_up_no_restarts_and_explain_the_others() -> None:
    lost = [failed(0, termination=words(cause="RuntimeError", message="Connection closed by peer"))]
    lost.append(failed(1, termination=words(cause="OutOfMemory", retryable=True)))
    got = decision(seen(gang(*lost), record=Record(charged=3)))
    assert isinstance(got, Restart)
    assert (got.loss.cause, got.charged) == ("OutOfMemory", 3)


def test_a_rank_for_which_even_one_sequence_is_too_much_fails_the_job() -> None:
    rules = [RecoveryRule(exit_codes=[1], action="retry")]
    lost = gang(failed(termination=words(cause="OutOfMemory", retryable=False)))
    assert isinstance(decision(seen(lost)), Fail)
    assert classify(lost, rules=rules).charged


@pytest.mark.parametrize(
    ("losses", "waits"), [(0, 0), (1, 10), (2, 20), (3, 40), (6, 300), (5_000, 300)], ids=lambda value: str(value)
)
def test_each_restart_without_progress_waits_twice_as_long_up_to_a_limit(losses: int, waits: float) -> None:
    got = decision(seen(gang(failed()), record=Record(losses=losses)), max_restarts=10_000)
    assert (got.losses, got.wait_seconds) == (losses + 1, waits)
    assert next_look_seconds(seen(gang(failed())), got, spec=spec_of(), now=NOW) == (waits or None)


def test_after_progress_a_restart_waits_for_nothing() -> None:
    lost = gang(failed(termination=words(checkpoint=checkpoint(60))))
    got = decision(seen(lost, record=Record(losses=5, step_at_last_failure=50)))
    assert (got.losses, got.wait_seconds) == (1, 0.0)


def test_disruptions_in_a_row_wait_too() -> None:
    got = decision(seen(gang(failed(disruption="TerminationByKubelet")), record=Record(losses=2)))
    assert (got.charged, got.wait_seconds) == (0, 20.0)


def test_an_attempt_that_takes_a_smaller_microbatch_need_not_wait() -> None:
    lost = gang(failed(termination=words(cause="OutOfMemory", retryable=True)))
    got = decision(seen(lost, record=Record(losses=4)))
    assert (got.losses, got.adapted, got.charged, got.wait_seconds) == (4, 1, 0, 0.0)
    got = decision(seen(gang(failed()), record=Record(adapted=6)))
    assert (got.losses, got.adapted, got.wait_seconds) == (1, 6, 0.0), "nor need the first loss of another kind"


def test_a_container_that_says_so_more_often_than_a_microbatch_can_be_halved_is_not_believed() -> None:
    lost = gang(failed(termination=words(cause="OutOfMemory", retryable=True)))
    got = decision(seen(lost, record=Record(losses=40, adapted=16)))
    assert (got.charged, got.adapted, got.wait_seconds) == (0, 17, 0.0), "preemptions are none of those"
    got = decision(seen(lost, record=Record(losses=6, adapted=17)))
    assert (got.charged, got.losses, got.loss.charged, got.wait_seconds) == (1, 7, True, 300.0)
    assert decision(seen(lost, record=Record(adapted=17)), max_restarts=0).reason == "RestartsExhausted"
    after = decision(seen(lost, record=Record(adapted=17, checkpoint=checkpoint(60), step_at_last_failure=50)))
    assert (after.charged, after.adapted) == (0, 1)


def test_the_next_attempt_is_not_made_before_its_time() -> None:
    waiting = seen(record=Record(attempt=2, not_before=NOW + datetime.timedelta(seconds=7)))
    assert decision(waiting) == Wait(reason="BackingOff", message="the next attempt begins", seconds=7.0)
    assert next_look_seconds(waiting, decision(waiting), spec=spec_of(), now=NOW) == 7.0
    assert decision(waiting, schedule=SUSPENDED) == Hold()
    assert decision(seen(record=Record(attempt=2, not_before=NOW))) == Create(attempt=2, num_nodes=2)


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ({"causes": ["Stalled"]}, {"cause": "Stalled"}),
        ({"log_contains": ["ncclRemoteError"]}, {"log": "W0: ncclRemoteError: peer hung up"}),
        ({"log_contains": ["nothing", "asked to leave"]}, {"message": "the node was asked to leave"}),
        (
            {"causes": ["Killed"], "exit_codes": [9], "log_contains": ["x"]},
            {"cause": "Killed", "exit_code": 9, "log": "x"},
        ),
    ],
)
def test_a_rule_fits_by_cause_exit_code_and_log_together(rule: dict[str, Any], fits: dict[str, Any]) -> None:
    ruled = RecoveryRule(**rule, action="fail")
    said = words(**{"cause": "Oops", **fits})
    assert classify(gang(failed(exit_code=said.exit_code, termination=said)), rules=[ruled]).action == "fail"
    assert classify(gang(failed(exit_code=3, termination=words(cause="Other"))), rules=[ruled]).action == "retry"


def test_a_rule_fits_by_what_is_true_of_the_node() -> None:
    rule = RecoveryRule(node_conditions=["DiskPressure", "FanStopped"], action="exclude_node")
    hot, cool = (failed(termination=words(), node_conditions=frozenset(said)) for said in ({"FanStopped"}, {"Cool"}))
    assert classify(gang(hot), rules=[rule]).action == "exclude_node"
    assert classify(gang(cool), rules=[rule]).action == "retry"


@pytest.mark.parametrize("lost", ["NodeNotReady", "NodeGone"])
def test_what_went_with_its_node_is_not_the_job_s_fault_and_what_ended_by_itself_is(lost: str) -> None:
    told = frozenset({lost})
    silent = classify(gang(failed(exit_code=137, node="n7", node_conditions=told)))
    assert (silent.cause, silent.charged, silent.message) == (lost, False, f"node n7: {lost}")
    spoke = classify(gang(failed(node="n7", termination=words(cause="Oops", message="no"), node_conditions=told)))
    assert (spoke.cause, spoke.charged, spoke.message) == ("Oops", True, f"no; node n7: {lost}")
    forged = classify(gang(failed(node="n7", termination=words(cause=lost), node_conditions=told)))
    assert forged.charged, "a trainer's words make nothing free"
    config = classify(gang(failed(exit_code=2, node_conditions=told)))
    assert (config.cause, config.action) == ("ConfigError", "fail")


@pytest.mark.parametrize(
    ("ended", "cause"),
    [
        ({"exit_code": 137, "reason": "OOMKilled"}, "OOMKilled"),
        ({"exit_code": 139, "reason": "Error"}, "Killed"),
        ({"exit_code": None, "deleting": True, "phase": "Running"}, "PodDeleted"),
        ({"exit_code": None, "replaced": True, "phase": "Pending"}, "PodDeleted"),
    ],
)
def test_what_ended_by_itself_or_was_removed_did_not_go_with_its_node(ended: dict[str, Any], cause: str) -> None:
    rank = failed(**ended)
    assert classify(gang(replace(rank, node_conditions=frozenset({"NodeNotReady"})))).cause == cause
    assert (
        classify(gang(rank)).charged is classify(gang(replace(rank, node_conditions=frozenset({"NodeGone"})))).charged
    )


def test_of_what_left_no_words_the_end_of_its_log_is_told_and_searched() -> None:
    log = "".join(f"step {number}\n" for number in range(9))
    log += "Traceback:\n\n  import nexa\nModuleNotFoundError: nexa\n"
    got = classify(gang(failed(output=log)))
    assert got.message == "it said last: step 7 | step 8 | Traceback: | import nexa | ModuleNotFoundError: nexa"
    assert classify(gang(failed(output=f"{'x' * 4000}end"))).message.endswith(f"{'x' * 497}end")
    assert classify(gang(failed(output="NVRM: Xid 79\n", node="n1"))).action == "exclude_node"
    rule = RecoveryRule(log_contains=["step 0"], action="fail")
    assert classify(gang(failed(output=log)), rules=[rule]).action == "fail"
    assert classify(gang(failed(output=log, message="Pod was evicted"))).message == "Pod was evicted"


def test_of_ranks_that_failed_alike_the_one_on_the_broken_node_is_the_cause_though_it_ended_later() -> None:
    first = failed(0, node="n1", finished_at="2026-11-23T12:00:01Z", termination=words(cause="NcclError"))
    later = failed(
        1, node="n2", finished_at="2026-11-23T12:00:02Z", termination=words(), node_conditions=frozenset({"XIDErrors"})
    )
    got = classify(gang(first, later))
    assert (got.action, got.node) == ("exclude_node", "n2")


def test_what_is_true_of_good_nodes_is_not_said_and_no_rule_for_logs_reads_a_node_s_name() -> None:
    told = frozenset({"EtcdIsVoter", "DiskPressure"})
    rule = RecoveryRule(log_contains=["gpu"], action="fail")
    got = classify(gang(failed(node="gpu-7", termination=words(message="no"), node_conditions=told)), rules=[rule])
    assert (got.action, got.message) == ("retry", "no; node gpu-7: DiskPressure")
    named = RecoveryRule(node_conditions=["EtcdIsVoter"], action="retry")
    got = classify(gang(failed(node="n", termination=words(message="no"), node_conditions=told)), rules=[named])
    assert got.message == "no; node n: DiskPressure, EtcdIsVoter"


def test_what_follows_a_pod_that_is_gone_puts_no_node_to_blame() -> None:
    rule = RecoveryRule(causes=["PodDeleted"], action="exclude_node")
    got = classify(gang(rank(phase="Pending", replaced=True, node="n2")), rules=[rule])
    assert (got.cause, got.node) == ("PodDeleted", "")


@pytest.mark.parametrize("broken", sorted(BROKEN_NODE_CONDITIONS))
def test_a_node_that_says_that_it_is_broken_is_kept_off(broken: str) -> None:
    lost = failed(node="n7", termination=words(), node_conditions=frozenset({broken, "DiskPressure"}))
    got = classify(gang(lost))
    assert (got.action, got.node, got.charged) == ("exclude_node", "n7", True)


def test_a_rule_that_states_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="would fit every end"):
        RecoveryRule(action="fail")


def test_broken_hardware_is_kept_off_and_so_is_what_a_rule_says() -> None:
    broken = failed(node="n7", termination=words(log="NVRM: Xid (PCI:0000:3b:00): 79, GPU has fallen off the bus."))
    assert (classify(gang(broken)).action, classify(gang(broken)).node) == ("exclude_node", "n7")
    rule = RecoveryRule(exit_codes=[139], action="exclude_node")
    got = decision(seen(gang(failed(exit_code=139, node="n3"))), rules=[rule])
    assert isinstance(got, Restart)
    assert (got.loss.action, got.loss.node) == ("exclude_node", "n3")


def test_the_deadline_counts_all_attempts_and_leaves_out_queue_and_suspension() -> None:
    spent = Account(
        seconds={"productive": 40, "restart": 10, "queue": 500, "suspended": 900}, state="startup", since=ago(5)
    )
    running = seen(gang(rank(0), rank(1)), record=Record(account=spent))
    limit = {"active_deadline_seconds": 60}
    assert decision(running, schedule=limit) == Watch()
    assert next_look_seconds(running, Watch(), spec=spec_of(schedule=limit), now=NOW) == 5.0
    late = seen(gang(rank(0), rank(1)), record=Record(account=Account(seconds={"productive": 60})))
    assert isinstance(decision(late, schedule=limit), Fail)
    assert decision(seen(gang(complete=True), record=late.record), schedule=limit) == Succeed()


def test_a_resumed_job_waits_for_ranks_that_still_commit() -> None:
    stopping = rank(0, deleting=True, gone_by=NOW + datetime.timedelta(seconds=90))
    got = decision(seen(gang(stopping, suspended=True)))
    assert (got.reason, got.seconds) == ("Stopping", 90.0)
    unasked = decision(seen(gang(rank(0), rank(1), suspended=True)))
    assert (unasked.reason, unasked.seconds) == ("Stopping", 2.0), "its controller will ask them in a moment"
    deleted = decision(seen(gang(stopping, deleting=True)))
    assert (deleted.reason, deleted.seconds) == ("Stopping", 90.0)
    silent = rank(0, deleting=True, gone_by=ago(1))
    assert isinstance(decision(seen(gang(silent, suspended=True))), Resume)
    ended = rank(0, phase="Succeeded", deleting=True, gone_by=NOW + datetime.timedelta(seconds=90))
    assert isinstance(decision(seen(gang(ended, suspended=True))), Resume)


def test_a_preempted_gang_waits_for_pods_of_before_and_not_for_one_that_hangs() -> None:
    queue = {"queue_name": "team"}
    saving = rank(0, deleting=True, gone_by=NOW + datetime.timedelta(seconds=90))
    waits = seen(gang(rank(1), forerunners=(saving,)))
    assert decision(waits, schedule=queue) == Watch()
    assert next_look_seconds(waits, Watch(), spec=spec_of(queue), now=NOW) == 120.0
    hangs = rank(0, deleting=True, gone_by=ago(30))
    why = "beside pods that should be gone"
    expected = Resume(attempt=1, num_nodes=2, why=why)
    assert decision(seen(gang(rank(1), forerunners=(saving, hangs))), schedule=queue) == Watch()
    assert decision(seen(gang(rank(1), forerunners=(hangs,))), schedule=queue) == expected
    assert decision(seen(gang(rank(0), rank(1), forerunners=(hangs,))), schedule=queue) == Watch(), "it lacks none"
    assert decision(seen(gang(forerunners=(hangs,), suspended=True)), schedule=queue) == Watch(), "not let go yet"
    ended = rank(0, phase="Failed", deleting=True, gone_by=ago(30))
    assert decision(seen(gang(rank(1), forerunners=(ended,))), schedule=queue) == Watch()


def test_ranks_of_before_a_preemption_that_their_controller_takes_for_lost_ones_are_waited_for() -> None:
    queue = {"queue_name": "team"}
    saving = rank(0, deleting=True, gone_by=NOW + datetime.timedelta(seconds=90))
    called_failed = gang(failure="JobFailed", forerunners=(saving,))
    assert decision(seen(called_failed), schedule=queue) == Linger(seconds=90.0)
    ended = replace(called_failed, forerunners=(rank(0, phase="Failed", deleting=True, gone_by=saving.gone_by),))
    got = decision(seen(ended), schedule=queue)
    assert isinstance(got, Restart)
    assert (got.charged, got.loss.charged) == (0, False)


ELASTIC = {"num_nodes": 4, "min_nodes": 1}


def pending(index: int, seconds: float) -> Any:
    return rank(index, phase="Pending", unplaced_since=ago(seconds))


def placed(count: int) -> list[Any]:
    return [rank(index, node=f"n{index}") for index in range(count)]


def test_a_gang_that_has_no_room_for_a_while_goes_on_with_fewer_pods() -> None:
    crowded = gang(*placed(3), pending(3, 60))
    assert decision(seen(crowded), cluster=ELASTIC) == Shrink(attempt=1, num_nodes=2)  # 8 rows over 3 do not go
    assert decision(seen(crowded), cluster=ELASTIC, batch=12) == Shrink(attempt=1, num_nodes=3)
    assert decision(seen(crowded), cluster=ELASTIC | {"min_nodes": 3}) == Watch()
    assert decision(seen(crowded), cluster={"num_nodes": 4}) == Watch()
    none = gang(*(pending(index, 300) for index in range(4)))
    assert decision(seen(none), cluster=ELASTIC) == Watch()


def test_a_gang_waits_for_room_a_minute_before_it_shrinks() -> None:
    crowded = seen(gang(*placed(3), pending(3, 20)))
    assert decision(crowded, cluster=ELASTIC) == Watch()
    assert next_look_seconds(crowded, Watch(), spec=spec_of(cluster=ELASTIC), now=NOW) == 40.0
    assert next_look_seconds(crowded, Watch(), spec=spec_of(cluster={"num_nodes": 4}), now=NOW) is None


def test_a_gang_whose_pods_a_quota_refuses_goes_on_with_those_that_there_are() -> None:
    def refused(seconds: float, *ranks: Any) -> Observed:
        return seen(gang(*placed(2), *ranks, begun_at=ago(seconds)), refusal="exceeded quota: pods")

    assert decision(refused(60), cluster=ELASTIC) == Shrink(attempt=1, num_nodes=2)
    assert decision(refused(59), cluster=ELASTIC) == Watch()
    assert next_look_seconds(refused(59), Watch(), spec=spec_of(cluster=ELASTIC), now=NOW) == 1.0
    assert decision(refused(60), cluster={"num_nodes": 4}) == Watch()
    assert decision(refused(300, pending(2, 20)), cluster=ELASTIC) == Watch(), "that one may find a node yet"
    assert decision(refused(300, pending(2, 60)), cluster=ELASTIC) == Shrink(attempt=1, num_nodes=2)
    silent = seen(gang(*placed(2), begun_at=ago(300)))
    assert decision(silent, cluster=ELASTIC) == Watch(), "nobody says that they may not be made"


def test_pods_do_not_wait_in_vain_while_room_is_kept_free_for_them() -> None:
    """Though the scheduler finds none for them meanwhile."""
    crowded = gang(*placed(3), pending(3, 90))
    kept, left = seen(crowded, rooms=("demo-a0-room",)), seen(crowded, room_left_at=ago(20))
    assert decision(kept, cluster=ELASTIC) == decision(left, cluster=ELASTIC) == Watch()
    assert next_look_seconds(kept, Watch(), spec=spec_of(cluster=ELASTIC), now=NOW) == 60.0
    assert next_look_seconds(left, Watch(), spec=spec_of(cluster=ELASTIC), now=NOW) == 40.0
    assert isinstance(decision(seen(crowded, room_left_at=ago(60)), cluster=ELASTIC), Shrink)


def grows(**given: Any) -> Any:
    return decision(seen(gang(*placed(2)), record=Record(num_nodes=2), **given), cluster=ELASTIC)


def test_a_smaller_gang_asks_for_room_and_grows_when_there_is_some() -> None:
    assert grows() == grows(room=1, room_since=ago(59)) == Probe(num_pods=2)
    assert grows(room=2, room_since=ago(0)) == Suspend(gang="demo-a0", resizes=True)
    stopped = gang(*(failed(index) for index in (0, 1)), suspended=True)
    more = seen(stopped, record=Record(num_nodes=2), rooms=("demo-a0-room",), room=2, room_since=ago(30))
    assert decision(more, cluster=ELASTIC) == Resume(attempt=1, num_nodes=4, why="with 4 pods")
    starting = gang(rank(0, node="n0"), rank(1, phase="Pending", node="n1"))
    assert decision(seen(starting, record=Record(num_nodes=2)), cluster=ELASTIC) == Watch()


def test_room_for_some_is_not_held_for_nothing() -> None:
    some = {"room": 1, "room_since": ago(60)}
    assert grows(**some) == Probe(num_pods=0), "8 rows over 3 pods do not go"
    got = decision(seen(gang(*placed(2)), record=Record(num_nodes=2), **some), cluster=ELASTIC, batch=12)
    assert got == Suspend(gang="demo-a0", resizes=True)
    stopped = seen(gang(failed(), suspended=True), record=Record(num_nodes=2), rooms=("demo-a0-room",), **some)
    assert decision(stopped, cluster=ELASTIC, batch=12) == Resume(attempt=1, num_nodes=3, why="with 3 pods")


def test_room_of_which_a_job_can_make_nothing_is_asked_for_again_after_a_while() -> None:
    observed = seen(gang(*placed(2)), record=Record(num_nodes=2), room_useless_at=ago(599))
    assert decision(observed, cluster=ELASTIC) == Probe(num_pods=0)
    assert next_look_seconds(observed, Probe(num_pods=0), spec=spec_of(cluster=ELASTIC), now=NOW) == 1.0
    assert grows(room_useless_at=ago(600)) == Probe(num_pods=2)
    assert grows(room_useless_at=ago(9), room=2, room_since=ago(0)) == Suspend(gang="demo-a0", resizes=True)


def test_only_a_job_that_may_be_smaller_asks_for_room() -> None:
    fewer = seen(gang(rank(0)), record=Record(num_nodes=1))
    assert decision(fewer) == Suspend(gang="demo-a0", resizes=True), "numNodes was changed while nobody looked"
    withdrawn = Suspend(gang="demo-a0", withdraw=True, resizes=True)
    assert decision(fewer, schedule={"queue_name": "q"}) == withdrawn, "its queue's owner alone suspends it"
    more = seen(gang(*placed(5)), record=Record(num_nodes=5))
    assert decision(more, cluster=ELASTIC) == Suspend(gang="demo-a0", resizes=True)


def test_a_clock_that_ran_out_or_stands_wakes_nobody() -> None:
    crowded = seen(gang(*(pending(index, 300) for index in range(4))))
    assert next_look_seconds(crowded, Watch(), spec=spec_of(cluster=ELASTIC), now=NOW) is None
    held = seen(record=Record(account=Account(seconds={"productive": 59.5}, state="suspended", since=ago(9))))
    assert next_look_seconds(held, Hold(), spec=spec_of({"active_deadline_seconds": 60}), now=NOW) is None


def test_excluded_nodes_are_tried_again_when_no_other_has_room() -> None:
    record = Record(excluded_nodes=("n1", "n2"))
    short, long = (seen(gang(rank(0), pending(1, seconds)), record=record) for seconds in (299, 300))
    assert decision(short) == Watch()
    assert next_look_seconds(short, Watch(), spec=spec_of(), now=NOW) == 300
    why = "on excluded nodes too: there is room on no other"
    assert decision(long) == Resume(attempt=1, num_nodes=2, why=why, forgives=True)


def test_pods_that_outlive_a_deleted_gang_are_waited_for_and_left_behind_where_they_hang() -> None:
    ending = rank(0, deleting=True, gone_by=NOW + datetime.timedelta(seconds=30))
    got = decision(seen(strays=(ending,)))
    assert (got.reason, got.seconds) == ("Stopping", 30.0)
    assert decision(seen(strays=(failed(),))) == Create(attempt=0, num_nodes=2)
    hanging = rank(0, deleting=True, gone_by=ago(1))
    assert decision(seen(strays=(hanging,))) == Create(attempt=1, num_nodes=2)


def test_a_lost_rank_of_a_smaller_gang_is_followed_by_a_gang_of_that_size() -> None:
    got = decision(seen(gang(rank(0), failed(1)), record=Record(num_nodes=2)), cluster=ELASTIC)
    assert isinstance(got, Restart)
    assert got.num_nodes == 2


def test_a_smaller_gang_takes_excluded_nodes_again_when_it_asks_for_room_in_vain() -> None:
    record = Record(num_nodes=2, excluded_nodes=("n1",))
    short, long = (seen(gang(*placed(2)), record=record, room_wanted_since=ago(seconds)) for seconds in (299, 300))
    assert decision(short, cluster=ELASTIC) == Probe(num_pods=2)
    assert decision(long, cluster=ELASTIC) == Probe(num_pods=2, forgives=True)
    assert grows(room_wanted_since=ago(900)) == Probe(num_pods=2), "no node is excluded"


def test_ranks_that_are_still_ending_are_heard_before_the_cause_is_judged() -> None:
    """The node of the rank that failed first may be the last to say so."""
    first, ending = failed(0), rank(1)
    assert decision(seen(gang(first, ending), lost_seconds=0.0)) == Linger(seconds=3.0)
    assert decision(seen(gang(first, ending), lost_seconds=2.5)) == Linger(seconds=0.5)
    assert isinstance(decision(seen(gang(first, ending), lost_seconds=3.0)), Restart), "a silent node says nothing more"
    assert isinstance(decision(seen(gang(first), lost_seconds=0.0)), Restart), "nobody is left to say anything"
    final = failed(0, exit_code=5)
    assert isinstance(decision(seen(gang(final, ending), lost_seconds=0.0)), Fail), "nothing can be said against that"

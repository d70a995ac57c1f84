"""Raw children -> facts. Bad and half-written bodies first."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from nexa_operator.observe import (
    Observed,
    Rank,
    Record,
    ignored_seconds,
    newest,
    nodes_of_lost_ranks,
    observe,
    pods_due_seconds,
    read_record,
    refusal_in,
    with_nodes,
)
from nexa_operator.plan import Defaults, make_plan
from nexa_operator.reading import Ref
from tests.unit.operator.builders import (
    GANG_UID,
    NOW,
    UID,
    body,
    checkpoint,
    condition,
    ended,
    failed,
    gang,
    gang_job,
    job,
    pod,
    progress,
    words,
)


def names(refs: Iterable[Ref]) -> list[str]:
    return [ref.name for ref in refs]


def test_children_of_a_namesake_that_was_deleted_are_not_ours():
    observed = observe(body(), children=[gang_job(owner="another-uid")], pods=[pod()])
    assert observed.gang is None
    assert observed.leftovers == ()


def test_pods_of_a_gang_that_was_deleted_are_not_the_new_gang_s():
    observed = observe(body(), children=[gang_job()], pods=[pod(owner="an-older-gang")])
    assert observed.gang is not None
    assert observed.gang.ranks == ()


@pytest.mark.parametrize("message", ["", "Killed", "{", '{"run_id": 1}', "[]", "null"])
def test_last_words_that_are_none_are_no_error(message):
    failed = pod(phase="Failed", containerStatuses=ended(137, message))
    (rank,) = observe(body(), children=[gang_job()], pods=[failed]).gang.ranks
    assert (rank.termination, rank.exit_code, rank.lost) == (None, 137, True)
    assert rank.output == message


def test_what_spoke_leaves_its_words_alone():
    said = words(message="no").as_bytes().decode()
    (rank,) = observe(
        body(), children=[gang_job()], pods=[pod(phase="Failed", containerStatuses=ended(1, said))]
    ).gang.ranks
    assert (rank.termination, rank.output) == (words(message="no"), "")


def test_a_pod_without_a_status_is_pending():
    bare = pod()
    del bare["status"]
    (rank,) = observe(body(), children=[gang_job()], pods=[bare]).gang.ranks
    assert (rank.phase, rank.lost) == ("Pending", False)


def test_a_job_with_a_label_that_is_no_number_is_a_leftover():
    strange = gang_job()
    strange["metadata"]["labels"]["train.nexa.dev/attempt"] = "many"
    assert names(observe(body(), children=[strange], pods=[]).leftovers) == ["demo-a0"]


def test_a_sidecar_s_state_is_not_the_trainer_s():
    statuses = [{"name": "istio", "state": {"terminated": {"exitCode": 9}}}]
    (rank,) = observe(body(), children=[gang_job()], pods=[pod(containerStatuses=statuses)]).gang.ranks
    assert rank.exit_code is None


def test_the_attempt_on_record_is_the_gang_and_the_others_are_leftovers():
    jobs = [gang_job(attempt=attempt) for attempt in (2, 0, 1)]
    observed = observe(body(status={"attempt": 2}), children=jobs, pods=[])
    assert observed.gang.attempt == 2
    assert names(observed.leftovers) == ["demo-a0", "demo-a1"]


def test_a_later_gang_than_on_record_is_the_one_that_lives():
    observed = observe(body(status={"attempt": 1}), children=[gang_job(attempt=1), gang_job(attempt=2)], pods=[])
    assert (observed.record.attempt, observed.gang.attempt, names(observed.leftovers)) == (2, 2, ["demo-a1"])


def test_ranks_are_in_the_order_of_their_indices():
    observed = observe(body(), children=[gang_job()], pods=[pod(10), pod(2), pod(0)])
    assert [rank.index for rank in observed.gang.ranks] == [0, 2, 10]


def test_a_replacement_of_rank_zero_is_asked_rather_than_the_pod_that_goes():
    observed = observe(body(), children=[gang_job()], pods=[pod(0, deleting=True), pod(0, podIP="10.0.0.2")])
    assert observed.gang.rank_zero.ip == "10.0.0.2"


@pytest.mark.parametrize(
    ("conditions", "complete", "failure"),
    [
        ([], False, ""),
        ([condition("SuccessCriteriaMet")], True, ""),
        ([condition("Complete")], True, ""),
        ([condition("FailureTarget", reason="BackoffLimitExceeded")], False, "BackoffLimitExceeded"),
        ([condition("Failed", reason="DeadlineExceeded")], False, "DeadlineExceeded"),
        ([condition("Failed")], False, "Failed"),
        ([{"type": "Failed", "status": "False"}], False, ""),
    ],
)
def test_conditions_of_the_job(conditions, complete, failure):
    gang = observe(body(), children=[gang_job(conditions=conditions)], pods=[]).gang
    assert (gang.complete, gang.failure) == (complete, failure)


def test_last_words_are_read_with_their_checkpoint():
    said = words(checkpoint=checkpoint(70)).as_bytes().decode()
    observed = observe(body(), children=[gang_job()], pods=[pod(phase="Failed", containerStatuses=ended(1, said))])
    assert observed.checkpoint == checkpoint(70)


def test_the_newest_checkpoint_known_counts_wherever_it_was_said():
    status = {"checkpoint": {"step": 60, "uri": "u", "digest": "d"}}
    lags = failed(1, termination=words(checkpoint=checkpoint(50)))
    silent = observe(body(status=status), children=[], pods=[])
    assert silent.checkpoint.step == replace(silent, gang=gang(lags)).checkpoint.step == 60
    ahead = replace(silent, gang=gang(failed(1, termination=words(checkpoint=checkpoint(70)))))
    assert ahead.checkpoint.step == 70
    assert newest(None, checkpoint(5), checkpoint(7), None) == checkpoint(7)


def test_an_attempt_that_found_the_newest_checkpoint_damaged_says_which_one_counts() -> None:
    record = Record(checkpoint=checkpoint(100))
    said, ended = progress(checkpoint=checkpoint(50)), failed(termination=words(checkpoint=checkpoint(60)))
    assert Observed(record=record, progress=said).checkpoint == checkpoint(50)
    assert Observed(record=record, progress=said, gang=gang(ended)).checkpoint == checkpoint(60)
    assert Observed(record=record, progress=progress(), gang=gang(failed(1))).checkpoint == checkpoint(100)


def test_what_a_preempted_gang_committed_is_known_once_it_was_let_go_again() -> None:
    forerunner = failed(termination=words(checkpoint=checkpoint(70)))
    observed = Observed(gang=gang(forerunners=(forerunner,)), record=Record(checkpoint=checkpoint(50)))
    assert observed.checkpoint == checkpoint(70)


def test_of_one_step_the_checkpoint_told_of_last_counts_for_the_one_before_may_be_damaged() -> None:
    again = checkpoint(50).model_copy(update={"digest": "e" * 64})
    status = {"checkpoint": {"step": 50, "uri": "u", "digest": "d"}}
    observed = observe(body(status=status), children=[], pods=[], progress=progress(checkpoint=again))
    assert observed.checkpoint == again
    assert newest() is None


def test_progress_of_another_attempt_is_dropped():
    observed = observe(body(status={"attempt": 1}), children=[], pods=[], progress=progress(attempt=0))
    assert observed.progress is None


def test_a_status_of_an_older_operator_is_read_as_far_as_it_goes():
    assert read_record({}) == Record()
    assert read_record({"conditions": None, "lastFailure": None, "unknown": 1}) == Record()
    assert read_record({"checkpoint": {"step": 10**17}}) == read_record({"checkpoint": {"uri": "x"}}) == Record()
    assert read_record({"conditions": [condition("Failed")]}).finished == "Failed"


@pytest.mark.parametrize(
    ("state", "reason", "ours"),
    [
        ("suspended", "", True),
        ("restart", "Resizing", True),
        ("restart", "Stopping", True),
        ("queue", "RuntimeUnavailable", True),
        ("restart", "Restarting", False),
        ("productive", "", False),
        ("queue", "SuspendedByAnother", False),
    ],
)
def test_whose_will_a_suspension_is_stands_in_the_status(state: str, reason: str, ours: bool) -> None:
    status = {"goodput": {"state": state}, "conditions": [{**condition("Queued"), "reason": reason}]}
    assert read_record(status).suspends is ours
    assert read_record({}).suspends, "a status that was lost"


@pytest.mark.parametrize("label", ["9" * 20, "\u0663", "-1", "x", ""])
def test_a_number_that_no_status_can_hold_is_no_attempt(label: str) -> None:
    forged = gang_job(attempt=0)
    forged["metadata"]["labels"]["train.nexa.dev/attempt"] = label
    observed = observe(body(), children=[forged], pods=[])
    assert (observed.gang, observed.record.attempt, names(observed.leftovers)) == (None, 0, ["demo-a0"])


@pytest.mark.parametrize(("cause", "known"), [("OOMKilled", 2), ("OutOfMemory", None)])
def test_an_attempt_that_was_killed_for_memory_as_a_whole_is_told_of_to_the_next(cause, known):
    record = read_record({"attempt": 3, "lastFailure": {"attempt": 2, "cause": cause}})
    assert record.out_of_memory_attempt == known
    plan = make_plan(
        job(),
        owner_uid=UID,
        attempt=3,
        defaults=Defaults(image="i"),
        out_of_memory_attempt=record.out_of_memory_attempt,
    )
    assert dict(plan.environment).get("NEXA_OUT_OF_MEMORY_ATTEMPT") == (known and str(known))


def test_why_a_pod_waits_is_known():
    waiting = [{"name": "trainer", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}]
    unscheduled = [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}]
    pods = [pod(0, phase="Pending", containerStatuses=waiting), pod(1, phase="Pending", conditions=unscheduled)]
    first, second = observe(body(), children=[gang_job()], pods=pods).gang.ranks
    assert (first.reason, first.message) == ("ImagePullBackOff", "no such image")
    assert second.message == "0/3 nodes are available"


def test_owners_are_told_by_uid():
    assert observe(body(), children=[gang_job()], pods=[pod(owner=GANG_UID)]).gang.ranks


def room(attempt: int = 0, *, placed: int = 0, of: int = 2) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    role = {"train.nexa.dev/role": "room", "train.nexa.dev/attempt": str(attempt)}
    asking = gang_job(attempt=attempt)
    asking["metadata"] |= {"name": f"demo-a{attempt}-room", "uid": "room", "labels": role}
    pods = [pod(index, owner="room") for index in range(of)]
    for index, each in enumerate(pods):
        each["metadata"]["labels"] = role
        found = {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-11-23T12:00:00Z"}
        each["status"] = {"phase": "Running", "conditions": [found]} if index < placed else {"phase": "Pending"}
    return asking, pods


def test_pods_that_ask_for_room_are_counted_apart_from_the_gang() -> None:
    asking, pods = room(placed=1)
    seen = observe(body(), children=[gang_job(), asking], pods=[pod(0), *pods])
    assert (seen.rooms, seen.room, seen.leftovers) == ((Ref("demo-a0-room", "room"),), 1, ())
    assert seen.gang is not None
    assert [rank.index for rank in seen.gang.ranks] == [0]


def test_room_that_was_found_for_an_earlier_attempt_is_none() -> None:
    asking, pods = room(attempt=0, placed=2)
    seen = observe(body(status={"attempt": 1}), children=[gang_job(attempt=1), asking], pods=pods)
    assert (names(seen.rooms), seen.room) == (["demo-a0-room"], 0)


def test_room_that_an_evicted_pod_had_is_none() -> None:
    asking, pods = room(placed=2)
    pods[0]["status"]["phase"] = "Failed"
    seen = observe(body(), children=[gang_job(), asking], pods=pods)
    assert (seen.room, seen.room_since) == (1, NOW)


def test_pods_that_ask_for_room_in_vain_are_known_since_when() -> None:
    asking, pods = room()
    for second, each in enumerate(pods):
        waits = {"type": "PodScheduled", "status": "False", "lastTransitionTime": f"2026-11-23T12:00:0{second}Z"}
        each["status"]["conditions"] = [waits]
    seen = observe(body(), children=[gang_job(), asking], pods=pods)
    assert seen.room_wanted_since == NOW + datetime.timedelta(seconds=1)
    assert observe(body(), children=[gang_job(), asking], pods=room(placed=2)[1]).room_wanted_since is None


def test_room_that_somebody_else_s_pods_found_is_none() -> None:
    asking, pods = room(placed=2)
    pods[0]["metadata"]["ownerReferences"] = []
    assert observe(body(), children=[gang_job(), asking], pods=pods).room == 1


def crowded(**changes: Any) -> Observed:
    made = gang_job()
    made["metadata"] |= {"creationTimestamp": "2026-11-23T12:00:00Z"}
    record = Record(num_nodes=2)
    seen = observe(body(), children=[made], pods=[pod(0)])
    assert seen.gang is not None
    return replace(seen, record=record, gang=replace(seen.gang, **changes))


def test_a_gang_lacks_pods_once_they_are_late_and_unless_it_stands_or_ends() -> None:
    soon, late = NOW + datetime.timedelta(seconds=4), NOW + datetime.timedelta(seconds=10)
    assert pods_due_seconds(crowded(), soon) == 6.0
    assert pods_due_seconds(crowded(), late) == 0.0
    for stands in ({"suspended": True}, {"deleting": True}, {"complete": True}, {"failure": "Why"}):
        assert pods_due_seconds(crowded(**stands), late) is None
    assert pods_due_seconds(crowded(ranks=(Rank(index=0), Rank(index=1))), late) is None
    assert pods_due_seconds(crowded(forerunners=(Rank(index=0, deleting=True),)), late) is None, "they come after it"
    assert pods_due_seconds(observe(body(), children=[], pods=[]), late) is None


def test_pods_of_a_gang_that_its_queue_let_go_are_late_from_then_on() -> None:
    made = gang_job(conditions=[condition("Suspended", lastTransitionTime="2026-11-23T12:01:00Z")])
    made["status"]["conditions"][0]["status"] = "False"
    made["metadata"]["creationTimestamp"] = "2026-11-23T12:00:00Z"
    let_go = replace(observe(body(), children=[made], pods=[]), record=Record(num_nodes=2))
    assert pods_due_seconds(let_go, NOW + datetime.timedelta(seconds=64)) == 6.0


def test_a_pod_that_no_scheduler_tries_is_ignored_after_a_while_and_one_that_was_tried_is_not() -> None:
    untried, tried, placed = (pod(index, phase="Pending") for index in range(3))
    for each in (untried, tried, placed):
        each["metadata"]["creationTimestamp"] = "2026-11-23T12:00:00Z"
    tried["status"]["conditions"] = [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]
    placed["spec"] = {"nodeName": "n1"}
    soon, late = NOW + datetime.timedelta(seconds=4), NOW + datetime.timedelta(seconds=10)

    def seconds(pods: list[dict[str, Any]], now: datetime.datetime) -> float | None:
        return ignored_seconds(observe(body(), children=[gang_job()], pods=pods).gang, now)

    assert (seconds([untried, tried], soon), seconds([placed, untried], late)) == (6.0, 0.0)
    assert seconds([tried, placed, pod(0)], late) is None
    assert ignored_seconds(None, late) is None


@pytest.mark.parametrize("label", ["first", "-1", "1.5", "\u0663", "9" * 20])
def test_a_pod_whose_index_is_none_is_not_of_the_gang_and_hides_no_other(label: str) -> None:
    strange = pod(1, phase="Failed")
    strange["metadata"]["labels"] = {"batch.kubernetes.io/job-completion-index": label, "train.nexa.dev/attempt": "0"}
    gang = observe(body(), children=[gang_job()], pods=[pod(0), strange]).gang
    assert gang is not None
    assert [rank.index for rank in gang.ranks] == [0]
    assert observe(body(), children=[], pods=[strange]).strays == ()


@pytest.mark.parametrize("time", ["2026-12-31T23:59:60Z", "soon", "2026-11-23"])
def test_a_time_that_is_none_here_is_no_error(time: str) -> None:
    status = {"nextAttemptTime": time, "completionTime": time, "goodput": {"state": "queue", "since": time}}
    assert read_record(status, NOW).attempt == 0


def test_a_refusal_is_the_last_one_and_the_same_for_every_name_that_was_tried() -> None:
    gang = crowded().gang
    assert gang is not None
    assert gang.owners == (GANG_UID,)
    said = 'Error creating: pods "demo-a0-1-%s" is forbidden: exceeded quota: %s'
    early = {"lastTimestamp": "2026-11-23T12:00:00Z", "message": said % ("abcde", "old"), "metadata": {}}
    late = {"eventTime": "2026-11-23T12:00:01.5Z", "message": said % ("vwxyz", "new"), "metadata": {}}
    assert refusal_in([late, early], gang) == "Error creating: pods is forbidden: exceeded quota: new"
    assert refusal_in([], gang) == ""


def test_a_gang_says_itself_how_large_it_is() -> None:
    carrier = gang_job(attempt=2)
    carrier["metadata"]["labels"]["train.nexa.dev/nodes"] = "1"
    assert observe(body(status={"attempt": 1, "numNodes": 2}), children=[carrier], pods=[]).record.num_nodes == 1
    assert observe(body(), children=[carrier], pods=[]).record.num_nodes == 1


def test_pods_that_outlive_their_gang_are_seen() -> None:
    left = pod(0, deleting=True)
    left["metadata"]["labels"]["train.nexa.dev/attempt"] = "0"
    earlier = pod(1, deleting=True)
    earlier["metadata"]["labels"]["train.nexa.dev/attempt"] = "1"
    seen = observe(body(), children=[], pods=[left, earlier])
    assert [rank.index for rank in seen.strays] == [0]
    assert seen.strays[0].gone_by == NOW
    assert [rank.index for rank in seen.others] == [1]


def test_pods_of_other_gangs_are_seen_and_what_asks_for_room_is_none_of_them() -> None:
    asking, rooms = room()
    of_before = pod(1, owner="the-gang-before", deleting=True)
    seen = observe(body(), children=[gang_job(), asking], pods=[pod(0), of_before, *rooms])
    assert seen.gang is not None
    assert [rank.index for rank in seen.gang.ranks] == [0]
    assert [rank.index for rank in seen.others] == [1]


def test_where_a_rank_is_placed_or_since_when_it_is_not() -> None:
    waits = {"type": "PodScheduled", "status": "False", "lastTransitionTime": "2026-11-23T11:59:00Z"}
    pending = pod(1, phase="Pending", conditions=[waits])
    placed = {**pod(0), "spec": {"nodeName": "n1"}}
    seen = observe(body(), children=[gang_job()], pods=[placed, pending])
    assert seen.gang is not None
    first, second = seen.gang.ranks
    assert (first.node, first.unplaced_since) == ("n1", None)
    assert (second.node, second.unplaced_since) == ("", NOW - datetime.timedelta(seconds=60))


def test_nodes_are_asked_where_ranks_were_lost_the_first_to_end_first_and_no_more_than_a_few() -> None:
    lost = [failed(index, node=f"n{index}", finished_at=f"2026-11-23T12:00:{30 - index}Z") for index in range(20)]
    assert nodes_of_lost_ranks(gang(*lost)) == tuple(f"n{index}" for index in range(19, 11, -1))
    silent = failed(30, node="silent")
    spoke = [replace(rank, termination=words()) for rank in lost]
    assert nodes_of_lost_ranks(gang(*spoke, silent))[0] == "silent", "it hung, and the others failed of that"
    assert nodes_of_lost_ranks(gang(Rank(index=0, phase="Pending", node="n0", replaced=True))) == ()
    assert nodes_of_lost_ranks(gang(Rank(index=0, phase="Running", node="n0"), failed(1))) == ()
    assert nodes_of_lost_ranks(gang(failed(0, node="n0"), failed(1, node="n0"))) == ("n0",)
    assert nodes_of_lost_ranks(None) == ()


def node(**conditions: str) -> dict[str, Any]:
    return {"status": {"conditions": [{"type": kind, "status": said} for kind, said in conditions.items()]}}


@pytest.mark.parametrize(
    ("there", "told"),
    [
        (None, {"NodeGone"}),
        ({}, {"NodeNotReady"}),
        (node(Ready="Unknown"), {"NodeNotReady"}),
        (node(Ready="False", KernelDeadlock="True"), {"NodeNotReady", "KernelDeadlock"}),
        (node(Ready="True", KernelDeadlock="False", ReadonlyFilesystem="Unknown"), set()),
        (node(Ready="True", DiskPressure="True"), {"DiskPressure"}),
        (node(Ready="True", KernelReady="True", StorageReady="Unknown"), {"KernelReady"}),
        (node(Ready="True", AcceleratedHardwareReady="False"), {"AcceleratedHardwareNotReady"}),
    ],
)
def test_what_is_true_of_a_node_is_known_of_the_ranks_there(there: dict[str, Any] | None, told: set[str]) -> None:
    seen = with_nodes(gang(failed(0, node="n0"), failed(1, node="n1")), {"n0": there})
    assert [rank.node_conditions for rank in seen.ranks] == [told, set()]

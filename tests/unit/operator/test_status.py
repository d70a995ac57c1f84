"""What is written to status and said in events."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from nexa_operator.classify import Loss
from nexa_operator.decide import Create, Fail, Hold, Probe, Rest, Restart, Resume, Shrink, Succeed, Suspend, Wait, Watch
from nexa_operator.observe import Observed, Record
from nexa_operator.reading import condition_of
from nexa_operator.status import Context, caught_up, duration, happenings, next_status
from nexa_train.config.protocol import CheckpointRef
from tests.unit.operator.builders import LATER, NOW, checkpoint, failed, gang, progress, rank, seen, words


def write(
    previous: dict[str, Any], observed: Observed, decision: Any, *, now: Any = NOW, **more: Any
) -> dict[str, Any]:
    context = Context(generation=1, created=NOW, run_id="r", num_nodes=2, now=now, **more)
    return next_status(previous, seen=observed, decision=decision, context=context)


def truths(status: dict[str, Any]) -> dict[str, str]:
    return {item["type"]: item["reason"] for item in status["conditions"] if item["status"] == "True"}


LOSS = Loss(cause="Boom", message="it broke", exit_code=1)
RUNNING = gang(rank(0), rank(1))
CREATE = Create(attempt=0, num_nodes=2)
STARTS = (
    CREATE,
    Resume(attempt=1, num_nodes=2),
    Restart(attempt=1, num_nodes=2, losses=1, loss=LOSS, charged=1),
    Shrink(attempt=1, num_nodes=2),
)


@pytest.mark.parametrize(
    ("observed", "decision", "phase", "true"),
    [
        (seen(), Create(attempt=0, num_nodes=2), "Pending", {"Queued": "Creating", "Reconciling": "Creating"}),
        (seen(gang()), Watch(), "Pending", {"Queued": "PodsPending", "Reconciling": "PodsPending"}),
        (seen(gang(rank(0))), Watch(), "Pending", {"Queued": "PodsPending", "Reconciling": "PodsPending"}),
        (seen(RUNNING), Watch(), "Running", {"Running": "Running", "Ready": "Running"}),
        (
            seen(gang(rank(0, phase="Succeeded"), rank(1))),
            Watch(),
            "Running",
            {"Running": "Running", "Ready": "Running"},
        ),
        (seen(), Hold(), "Suspended", {"Suspended": "Suspended", "Ready": "Suspended"}),
        (seen(RUNNING), Suspend(gang="demo-a0"), "Suspending", {"Reconciling": "Suspending"}),
        (seen(gang(rank(0), suspended=True)), Hold(seconds=90.0), "Suspending", {"Reconciling": "Suspending"}),
        (seen(), Succeed(), "Succeeded", {"Succeeded": "Finished", "Ready": "Succeeded"}),
        (seen(), Fail(reason="Boom", message="m"), "Failed", {"Failed": "Boom", "Stalled": "Boom"}),
        (
            seen(),
            Restart(attempt=1, num_nodes=2, losses=1, loss=LOSS, charged=1),
            "Restarting",
            {"Queued": "Restarting", "Reconciling": "Restarting"},
        ),
        (seen(), Resume(attempt=1, num_nodes=2), "Pending", {"Queued": "Resuming", "Reconciling": "Resuming"}),
        (
            seen(unavailable="no JobSet"),
            Wait(reason="RuntimeUnavailable", message="no JobSet"),
            "Pending",
            {"Queued": "RuntimeUnavailable", "Reconciling": "RuntimeUnavailable"},
        ),
        (
            seen(gang(rank(0), rank(1), suspended=True), admission="waits for admission by queue team"),
            Watch(),
            "Queued",
            {"Queued": "WaitingForAdmission", "Reconciling": "WaitingForAdmission"},
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_decision_has_its_phase_and_its_true_conditions(observed, decision, phase, true):
    status = write({}, observed, decision)
    assert status["phase"] == phase
    assert truths(status) == true


@pytest.mark.parametrize("decision", STARTS, ids=lambda value: type(value).__name__)
def test_pods_that_come_up_one_by_one_cost_no_write(decision):
    status = write({}, seen(record=Record(attempt=decision.attempt)), decision)
    record = Record(attempt=decision.attempt, num_nodes=2)
    creating = rank(1, phase="Pending", reason="ContainerCreating")
    for ranks in ([], [rank(0)], [rank(0), creating]):
        assert write(status, seen(gang(*ranks), record=record), Watch(), now=LATER) == status


def test_what_holds_a_pod_up_is_said_and_so_is_that_it_no_longer_does():
    begun = write({}, seen(), CREATE)
    held = write(begun, seen(gang(rank(0, phase="Pending", message="no room"))), Watch())
    assert truths(held)["Queued"] == "PodsPending"
    freed = write(held, seen(gang(rank(0, phase="Pending"))), Watch())
    assert "no room" not in str(freed)
    refused = write({}, seen(), CREATE, trouble="quota")
    assert truths(write(refused, seen(gang()), Watch()))["Queued"] == "PodsPending"


def test_a_scheduler_that_does_not_answer_is_named_once_pods_have_waited_for_it():
    begun = write({}, seen(), CREATE)
    untried = rank(0, phase="Pending", untried_since=NOW, scheduler="absent")
    waiting = seen(gang(untried, rank(1)), record=Record(num_nodes=2))
    assert write(begun, waiting, Watch(), now=NOW + datetime.timedelta(seconds=9)) == begun
    ignored = write(begun, waiting, Watch(), now=LATER)
    assert "1 of 2 pods run: no scheduler absent has tried" in condition_of(ignored, "Queued")["message"]
    assert write(ignored, waiting, Watch(), now=LATER + datetime.timedelta(hours=1)) == ignored


def test_every_condition_is_always_there_with_generation_reason_and_time():
    status = write({}, seen(), Create(attempt=0, num_nodes=2))
    assert [item["type"] for item in status["conditions"]] == [
        "Ready", "Reconciling", "Stalled", "Queued", "Running", "Suspended", "Succeeded", "Failed", "CheckpointReady",
    ]  # fmt: skip
    for item in status["conditions"]:
        assert item["observedGeneration"] == 1
        assert item["reason"]
        assert item["lastTransitionTime"] == "2026-11-23T12:00:00Z"


def test_the_same_world_a_minute_later_gives_the_same_status():
    observed = seen(RUNNING, progress=progress(step=3, total_steps=10, loss=2.0))
    status = write({}, observed, Watch())
    assert write(status, observed, Watch(), now=LATER) == status


def test_a_time_moves_only_when_its_condition_flips():
    waiting = write({}, seen(gang()), Watch())
    one_up = write(waiting, seen(gang(rank(0))), Watch(), now=LATER)
    times = {item["type"]: item["lastTransitionTime"] for item in one_up["conditions"]}
    assert times["Queued"] == "2026-11-23T12:00:00Z", "another message, the same status"
    up = write(one_up, seen(RUNNING), Watch(), now=LATER)
    times = {item["type"]: item["lastTransitionTime"] for item in up["conditions"]}
    assert times["Running"] == times["Queued"] == "2026-11-23T12:01:00Z"
    assert times["Failed"] == "2026-11-23T12:00:00Z"


def test_a_job_never_polled_reports_from_last_words():
    said = words(exit_code=0, cause="Succeeded", step=9, total_steps=9, loss=0.123456789, checkpoint=checkpoint(9))
    done = rank(0, phase="Succeeded", termination=said)
    status = write({}, seen(gang(done, complete=True)), Succeed())
    assert (status["step"], status["progress"], status["loss"]) == (9, "9/9", 0.123457)
    assert status["checkpoint"]["step"] == 9
    assert truths(status)["CheckpointReady"] == "Committed"
    assert status["completionTime"] == "2026-11-23T12:00:00Z"


def test_progress_gives_speed_and_the_time_left_and_an_end_takes_them_away():
    observed = seen(RUNNING, progress=progress(step=5, total_steps=20, tokens_per_second=1234.5678, eta_seconds=3725))
    status = write({}, observed, Watch())
    assert (status["tokensPerSecond"], status["etaSeconds"], status["eta"]) == (1234.57, 3725.0, "1h02m")
    over = write(status, observed, Succeed())
    assert "eta" not in over
    assert over["progress"] == "5/20"


def test_facts_stay_on_record_when_nobody_says_anything():
    status = write({}, seen(RUNNING, progress=progress(step=5, total_steps=20, loss=1.5)), Watch())
    assert write(status, seen(gang()), Watch())["loss"] == 1.5


def test_an_attempt_that_begins_takes_back_no_step_that_was_reached():
    status = write({}, seen(RUNNING, progress=progress(step=50, total_steps=120, loss=1.5)), Watch())
    for told in (progress(), progress(phase="preparing", total_steps=120)):
        begins = write(status, seen(RUNNING, progress=told), Watch(), now=LATER)
        assert (begins["step"], begins["progress"], begins["loss"]) == (50, "50/120", 1.5)
    restored = write(begins, seen(RUNNING, progress=progress(step=40, total_steps=120, loss=1.7)), Watch())
    assert (restored["step"], restored["progress"], restored["loss"]) == (40, "40/120", 1.7)
    first = write({}, seen(RUNNING, progress=progress(total_steps=120)), Watch())
    assert first["progress"] == "0/120"


def test_last_words_of_a_node_whose_ranks_never_began_take_back_no_step_either():
    status = write({}, seen(RUNNING, progress=progress(step=50, total_steps=120, loss=1.5)), Watch())
    over = write(status, seen(gang(failed(termination=words(cause="DataError")))), Fail(reason="DataError", message=""))
    assert (over["progress"], over["loss"]) == ("50/120", 1.5)


def test_a_loss_that_is_no_number_is_left_out_for_json_has_none():
    status = write({}, seen(RUNNING, progress=progress(step=1, loss=float("nan"))), Watch())
    assert "loss" not in status
    assert status["progress"] == "1"


def test_a_restart_puts_the_loss_on_record_before_the_gang_is_removed():
    observed = seen(gang(failed(termination=words(checkpoint=checkpoint(40)))), record=Record(attempt=2))
    status = write(
        {"attempt": 2, "restarts": 4}, observed, Restart(attempt=3, num_nodes=2, losses=1, loss=LOSS, charged=2)
    )
    assert (status["attempt"], status["restarts"], status["chargedRestarts"]) == (3, 5, 2)
    assert status["lastFailure"] == {
        "attempt": 2, "cause": "Boom", "exitCode": 1, "message": "it broke", "charged": True, "checkpointStep": 40,
        "time": "2026-11-23T12:00:00Z",
    }  # fmt: skip


def test_a_checkpoint_that_was_found_damaged_is_told_and_what_is_new_since_refills_the_budget() -> None:
    lost = seen(gang(failed(termination=words(checkpoint=checkpoint(100)))))
    failed_at = write({}, lost, Restart(attempt=1, num_nodes=2, losses=1, loss=LOSS, charged=1))
    assert failed_at["lastFailure"]["checkpointStep"] == failed_at["checkpoint"]["step"] == 100
    goes_on = seen(RUNNING, record=Record(attempt=1), progress=progress(step=50, checkpoint=checkpoint(50)))
    status = write(failed_at, goes_on, Watch())
    assert status["lastFailure"]["checkpointStep"] == status["checkpoint"]["step"] == 50
    (given_up, _) = happenings(failed_at, status, Watch())
    assert (given_up.type, given_up.reason) == ("Warning", "CheckpointGivenUp")
    assert given_up.message.startswith("the one of step 100 is damaged; attempt 1 goes on from step 50: d")
    later = write(status, seen(RUNNING, progress=progress(step=60, checkpoint=checkpoint(60))), Watch())
    assert (later["lastFailure"]["checkpointStep"], later["checkpoint"]["step"]) == (50, 60)
    assert told(status, later, Watch()) == [("Normal", "CheckpointCommitted")]


def test_with_what_an_attempt_is_carried_out_is_on_record_until_the_next_begins() -> None:
    begun = write({}, seen(), CREATE, image="trainer:1", storage="team")
    assert (begun["image"], begun["storage"]) == ("trainer:1", "team")
    runs = write(begun, seen(RUNNING), Watch())
    assert (runs["image"], runs["storage"]) == ("trainer:1", "team")
    next_one = write(runs, seen(), Resume(attempt=1, num_nodes=2), image="trainer:2")
    assert next_one["image"] == "trainer:2"
    assert "storage" not in next_one


def test_a_resumption_is_no_restart():
    status = write({"attempt": 0, "restarts": 1}, seen(), Resume(attempt=1, num_nodes=2))
    assert (status["attempt"], status["restarts"]) == (1, 1)


def test_a_refusal_of_the_api_server_is_said_where_it_can_be_seen():
    status = write({}, seen(), Create(attempt=0, num_nodes=2), trouble="POST jobs: 403: exceeded quota")
    assert truths(status)["Queued"] == "Refused"
    (queued,) = [item for item in status["conditions"] if item["type"] == "Queued"]
    assert queued["message"] == "POST jobs: 403: exceeded quota"


def test_why_pods_wait_is_said():
    waiting = rank(1, phase="Pending", reason="ImagePullBackOff", message="no such image")
    status = write({}, seen(gang(rank(0), waiting)), Watch())
    (queued,) = [item for item in status["conditions"] if item["type"] == "Queued"]
    assert queued["message"] == "1 of 2 pods run: ImagePullBackOff no such image"


def test_why_pods_are_not_made_is_said():
    status = write({}, seen(gang(rank(0)), refusal="exceeded quota: team"), Watch())
    (queued,) = [item for item in status["conditions"] if item["type"] == "Queued"]
    assert (queued["reason"], queued["message"]) == ("PodsRefused", "1 of 2 pods run: exceeded quota: team")


@pytest.mark.parametrize("kind", ["configmap", "secret"])
def test_a_storage_profile_that_is_missing_is_said_with_what_would_help(kind: str):
    said = f'{kind} "nexa-storage-team-a" not found'
    waiting = rank(phase="Pending", reason="CreateContainerConfigError", message=said)
    status = write({}, seen(gang(waiting)), Watch())
    (queued,) = [item for item in status["conditions"] if item["type"] == "Queued"]
    assert queued["reason"] == "StorageProfileMissing"
    assert said in queued["message"]
    assert "ConfigMap and a Secret of that name in the job's namespace" in queued["message"]


def test_a_pod_out_of_reach_is_a_condition_and_changes_no_other():
    reached, unreached = (write({}, seen(RUNNING), Watch(), progress_known=known) for known in (True, False))
    assert truths(unreached) == {**truths(reached), "ProgressUnknown": "Unreachable"}
    back = write(unreached, seen(RUNNING), Watch())
    assert "ProgressUnknown" in {item["type"] for item in back["conditions"]}
    assert truths(back) == truths(reached)


@pytest.mark.parametrize("cause", ["", "not a word!", "1st", "ж", "a" * 500])
def test_a_cause_from_the_trainer_becomes_a_reason_that_the_server_takes(cause):
    (reason,) = {
        reason for kind, reason in truths(write({}, seen(), Fail(reason=cause, message=""))).items() if kind == "Failed"
    }
    assert reason.isidentifier()
    assert len(reason) <= 128


def test_a_message_is_cut_before_the_server_would_refuse_it():
    status = write({}, seen(), Fail(reason="A", message="x" * 100_000))
    assert all(len(item["message"]) <= 1024 for item in status["conditions"])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, None), (float("inf"), None), (-3, "0s"), (45.4, "45s"), (61, "1m01s"), (7260, "2h01m")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def told(old: dict[str, Any], new: dict[str, Any], decision: Any) -> list[tuple[str, str]]:
    return [(happening.type, happening.reason) for happening in happenings(old, new, decision)]


def test_a_happening_is_told_when_it_happens_and_not_again():
    waiting = write({}, seen(gang()), Watch())
    running = write(waiting, seen(RUNNING), Watch())
    assert told(waiting, running, Watch()) == [("Normal", "Running")]
    assert told(running, running, Watch()) == []


def test_a_checkpoint_is_told_before_the_end_that_it_belongs_to():
    running = write({}, seen(RUNNING), Watch())
    done = rank(0, phase="Succeeded", termination=words(checkpoint=checkpoint(9)))
    over = write(running, seen(gang(done, complete=True)), Succeed())
    assert told(running, over, Succeed()) == [("Normal", "CheckpointCommitted"), ("Normal", "Succeeded")]


def test_a_restart_is_told_with_its_cause():
    decision = Restart(attempt=1, num_nodes=2, losses=1, loss=LOSS, charged=1)
    new = write({}, seen(gang(failed())), decision)
    (happening,) = happenings({}, new, decision)
    assert happening.message == "attempt 1 after Boom (exit code 1): it broke"
    assert happening.type == "Warning"


def test_a_restart_that_waits_says_until_when_and_the_next_attempt_forgets_it() -> None:
    waits = Restart(attempt=3, num_nodes=2, losses=2, loss=LOSS, charged=2, wait_seconds=10)
    status = write({}, seen(gang(failed())), waits)
    assert (status["nextAttemptTime"], status["lossesWithoutCheckpoint"]) == ("2026-11-23T12:00:10Z", 2)
    backing_off = write(status, seen(), Wait(reason="BackingOff", message="the next attempt begins", seconds=10))
    assert truths(backing_off)["Queued"] == "BackingOff"
    assert "2026-11-23T12:00:10Z" in backing_off["conditions"][3]["message"]
    begun = write(backing_off, seen(), Create(attempt=3, num_nodes=2), now=LATER)
    assert "nextAttemptTime" not in begun
    assert begun["lossesWithoutCheckpoint"] == 2


def test_excluded_nodes_are_kept_the_oldest_forgotten_and_told_once() -> None:
    status: dict[str, Any] = {}
    for number in [*range(33), 5]:
        lost = Loss(cause="Xid", action="exclude_node", node=f"n{number}")
        before, record = status, Record(excluded_nodes=tuple(status.get("excludedNodes", ())))
        decision = Restart(attempt=number + 1, num_nodes=2, losses=1, loss=lost, charged=1)
        status = write(before, seen(gang(failed()), record=record), decision)
    assert len(status["excludedNodes"]) == 32
    assert (status["excludedNodes"][0], status["excludedNodes"][-1]) == ("n1", "n5")
    assert [h.message for h in happenings(before, status, decision) if h.reason == "NodeExcluded"]
    assert not [h for h in happenings(status, status, Watch()) if h.reason == "NodeExcluded"]
    forgiven = write(status, seen(gang(rank(0))), Probe(num_pods=1, forgives=True))
    assert "excludedNodes" not in forgiven


def test_another_size_is_told_and_on_record() -> None:
    smaller = Shrink(attempt=1, num_nodes=1)
    status = write({}, seen(gang(rank(0))), smaller)
    assert (status["numNodes"], status["phase"], truths(status)["Queued"]) == (1, "Restarting", "Shrinking")
    assert [h.reason for h in happenings({}, status, smaller)] == ["Shrunk"]
    resizes = Suspend(gang="demo-a1", resizes=True)
    growing = write(status, seen(gang(rank(0))), resizes)
    assert (growing["phase"], truths(growing)["Queued"]) == ("Restarting", "Resizing")
    assert "Suspended" not in truths(growing)
    assert [h.reason for h in happenings(status, growing, resizes)] == ["Resizing"]


def later(previous: dict[str, Any], observed: Observed, generation: int = 2) -> dict[str, Any]:
    context = Context(generation=generation, created=NOW, run_id="r", num_nodes=2, now=LATER)
    return caught_up(previous, seen=observed, decision=Rest(), context=context)


def test_a_finished_job_has_seen_a_later_generation_and_says_the_same() -> None:
    failed_for = Fail(reason="DeadlineExceeded", message="it is over")
    before = write({}, seen(gang(rank(0)), record=Record(checkpoint=checkpoint(100))), failed_for)
    after = later(before, seen(record=Record(checkpoint=checkpoint(100))))
    assert after["observedGeneration"] == 2
    assert [each.pop("observedGeneration") for each in after["conditions"]] == [2] * len(after["conditions"])
    same = [{k: v for k, v in each.items() if k != "observedGeneration"} for each in before["conditions"]]
    assert after["conditions"] == same
    assert {**after, "conditions": 0} == {**before, "conditions": 0, "observedGeneration": 2}


@pytest.mark.parametrize("known", [None, checkpoint(100)])
def test_a_finished_job_names_what_its_ranks_committed_while_they_were_ended(known: CheckpointRef | None) -> None:
    failed_for = Fail(reason="DeadlineExceeded", message="it is over")
    before = write({}, seen(gang(rank(0)), record=Record(checkpoint=known)), failed_for)
    said = words(cause="Stopped", exit_code=75, step=137, total_steps=500, checkpoint=checkpoint(137))
    ended = gang(rank(0, deleting=True, termination=said), deleting=True)
    after = later(before, seen(ended, record=Record(checkpoint=known)), generation=1)
    assert (after["checkpoint"]["step"], after["step"], after["progress"]) == (137, 137, "137/500")
    assert (after["phase"], truths(after)["Failed"]) == ("Failed", "DeadlineExceeded")
    assert [(h.reason, h.message[:9]) for h in happenings(before, after, Rest())] == [
        ("CheckpointCommitted", "step 137:")
    ]
    ready = next(each for each in after["conditions"] if each["type"] == "CheckpointReady")
    assert (ready["status"], ready["message"]) == ("True", "step 137")
    assert later(after, seen(record=Record(checkpoint=checkpoint(137))), generation=1) == after


def test_what_the_server_refused_does_not_make_pods_that_run_pending() -> None:
    context = Context(generation=1, created=NOW, run_id="r", num_nodes=2, now=NOW, trouble="500")
    for ranks, phase in (((rank(0), rank(1)), "Running"), ((rank(0),), "Pending")):
        assert next_status({}, seen=seen(gang(*ranks)), decision=Watch(), context=context)["phase"] == phase


def test_the_last_words_of_rank_zero_count_as_it_goes_and_those_of_another_where_it_left_none() -> None:
    said = words(step=191, trained_seconds=460.0, uncommitted_seconds=0.0)
    polled = progress(step=150, trained_seconds=400.0, uncommitted_seconds=390.0)
    for ranks in ((rank(0, deleting=True, termination=said),), (rank(0), rank(1, termination=said))):
        assert write({}, seen(gang(*ranks), progress=polled), Watch())["step"] == 191
    early = rank(1, termination=words(step=0))
    assert write({}, seen(gang(rank(0), early), progress=polled), Watch())["step"] == 150

"""Where time went: every second is counted once, and nothing is written while nothing changes."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

from nexa_operator import goodput
from nexa_operator.classify import Loss
from nexa_operator.decide import Create, Decision, Fail, Hold, Restart, Resume, Succeed, Suspend, Watch
from nexa_operator.goodput import Account
from nexa_operator.observe import Observed, read_record
from nexa_operator.status import Context, next_status
from tests.unit.operator.builders import NOW, gang, progress, rank, seen, words

LOSS = Loss(cause="Killed", exit_code=1)
RUNS, WAITS = gang(rank(0), rank(1)), gang(rank(0), rank(1, phase="Pending"))


def after(seconds: float) -> datetime.datetime:
    return NOW + datetime.timedelta(seconds=seconds)


def story(*chapters: tuple[float, Observed, Decision], deadline: int = 600) -> dict[str, Any]:
    """The status after looks at those seconds."""
    status: dict[str, Any] = {}
    for seconds, observed, decision in chapters:
        with_record = Observed(gang=observed.gang, progress=observed.progress, record=read_record(status, NOW))
        context = Context(
            generation=1, created=NOW, run_id="r", num_nodes=2, now=after(seconds), progress_deadline_seconds=deadline
        )
        status = next_status(status, seen=with_record, decision=decision, context=context)
    return dict(status["goodput"])


def trained(seconds: float, uncommitted: float = 0.0) -> Observed:
    return seen(RUNS, progress=progress(trained_seconds=seconds, uncommitted_seconds=uncommitted))


RESTART = Restart(attempt=1, num_nodes=2, loss=LOSS, charged=1, losses=1)
BEGIN = [
    (0.0, seen(), Create(attempt=0, num_nodes=2)),
    (1.0, seen(WAITS), Watch()),
    (5.0, seen(RUNS), Watch()),
    (20.0, trained(10.0), Watch()),
]


def test_a_quiet_life() -> None:
    assert story(*BEGIN, (110.0, trained(100.0), Succeed())) == {
        "queueSeconds": 5.0,
        "startupSeconds": 5.0,
        "productiveSeconds": 100.0,
        "ratio": 0.909,
    }


def test_pods_that_have_their_nodes_and_never_start_are_on_the_job_s_clock() -> None:
    held_up = gang(*(rank(index, phase="Pending", node=f"n{index}", reason="ImagePullBackOff") for index in (0, 1)))
    got = story(BEGIN[0], BEGIN[1], (5.0, seen(held_up), Watch()))
    assert (got["queueSeconds"], got["state"]) == (5.0, "startup")


def test_a_run_that_was_never_asked_tells_at_its_end() -> None:
    ended = gang(rank(0, phase="Succeeded", termination=words(exit_code=0, cause="Succeeded", trained_seconds=30.0)))
    got = story(*BEGIN[:3], (45.0, seen(ended), Succeed()))
    assert (got["startupSeconds"], got["productiveSeconds"]) == (10.0, 30.0)


def test_steps_that_were_not_committed_are_lost_and_what_follows_is_restart() -> None:
    got = story(
        *BEGIN,
        (50.0, trained(38.0, uncommitted=8.0), RESTART),  # two seconds after its last word
        (52.0, seen(WAITS), Watch()),
        (55.0, seen(RUNS), Watch()),
        (70.0, trained(5.0), Watch()),
        (100.0, trained(35.0), Succeed()),
    )
    assert (got["productiveSeconds"], got["lostSeconds"], got["restartSeconds"]) == (65.0, 10.0, 15.0)
    assert sum(got[f"{state}Seconds"] for state in goodput.STATES if f"{state}Seconds" in got) == 100.0


def test_standing_still_is_no_work() -> None:
    stalled = Restart(attempt=1, num_nodes=2, loss=Loss(cause="Stalled", exit_code=70), charged=1, losses=1)
    got = story(*BEGIN, (100.0, trained(30.0, uncommitted=4.0), stalled), deadline=60)
    assert (got["stallSeconds"], got["lostSeconds"], got["productiveSeconds"]) == (60.0, 4.0, 26.0)


def test_where_nothing_is_known_of_the_attempt_all_of_it_is_lost() -> None:
    account = Account(state="productive", since=NOW)
    got = goodput.lost(account, None, stood_seconds=0, now=after(40))
    assert got.seconds["lost"] == 40.0


def test_a_suspended_job_loses_nothing_and_counts_for_nothing() -> None:
    got = story(
        *BEGIN,
        (30.0, trained(20.0), Suspend(gang="demo-a0")),
        (3_630.0, seen(), Resume(attempt=1, num_nodes=2)),
        (3_640.0, seen(RUNS), Watch()),
    )
    assert (got["suspendedSeconds"], got["productiveSeconds"], got["state"]) == (3_600.0, 20.0, "startup")
    assert got["ratio"] == pytest.approx(20 / 40)


def test_a_job_that_is_held_from_the_start_has_no_ratio() -> None:
    assert "ratio" not in story((0.0, seen(), Hold()), (50.0, seen(), Hold()))


def test_an_end_stops_the_clock() -> None:
    got = story(*BEGIN, (40.0, trained(30.0, uncommitted=2.0), Fail(reason="X", message="", loss=LOSS)))
    assert "state" not in got
    assert (got["productiveSeconds"], got["lostSeconds"]) == (28.0, 2.0)


def test_nothing_changes_while_nothing_happens() -> None:
    assert story(*BEGIN) == story(*BEGIN, (90.0, trained(80.0), Watch()))


def test_what_is_written_is_read_back() -> None:
    account = Account(seconds={"productive": 12.5, "restart": 0.0}, state="restart", since=after(12.5))
    for seconds in (12.5, 4_000.0):
        assert goodput.read({"goodput": account.to_status(after(seconds))}, NOW) == account
    assert goodput.read({}, NOW) == Account()


def test_what_is_written_while_a_state_lasts_counts_it_until_then_and_once() -> None:
    step = progress(step=1, trained_seconds=90.0, uncommitted_seconds=0.0)
    days = progress(step=9, trained_seconds=260_000.0, uncommitted_seconds=50.0)
    told = [(100.0, seen(RUNS, progress=step), Watch()), (260_010.0, seen(RUNS, progress=days), Watch())]
    got = story(*BEGIN, *told)
    assert (got["productiveSeconds"], got["startupSeconds"], got["ratio"]) == (260_000.0, 5.0, 1.0)
    assert (got["state"], got["since"]) == ("productive", "2026-11-23T12:00:10.000Z")
    lost = story(*BEGIN, *told, (260_020.0, seen(RUNS, progress=days), RESTART))
    assert (lost["productiveSeconds"], lost["lostSeconds"]) == (259_950.0, 60.0)
    assert story(*BEGIN, *told, (260_020.0, seen(RUNS), RESTART))["lostSeconds"] == 260_010.0, "nothing is known of it"


def test_thousands_of_writes_count_no_second_more_than_there_were() -> None:
    chapters = [(20.0 + n * 10.04, seen(RUNS, progress=progress(step=n, trained_seconds=10.0)), Watch())
                for n in range(1, 2_000)]  # fmt: skip
    got = story(*BEGIN, *chapters)
    assert sum(got[f"{state}Seconds"] for state in goodput.STATES if f"{state}Seconds" in got) == pytest.approx(
        chapters[-1][0], abs=0.1
    )
    assert got["startupSeconds"] == 5.0


def test_what_a_state_has_lasted_is_in_the_deadline_once() -> None:
    status = {"goodput": Account(seconds={"queue": 10.0}, state="startup", since=after(10)).to_status(after(70))}
    assert status["goodput"]["startupSeconds"] == 60.0
    assert read_record(status, NOW).account.active_seconds(after(100)) == 90.0


def test_time_before_any_operator_looked_was_spent_in_the_queue() -> None:
    status = {"goodput": Account(state="startup", since=after(30)).to_status(after(30))}
    assert goodput.read(status, NOW).seconds == {"queue": 30.0, "startup": 0.0}


def test_a_job_that_was_restored_with_its_status_begins_its_account_anew() -> None:
    """From a backup: its status is older than itself."""
    spent = Account(seconds={"queue": 5.0, "productive": 600.0}, state="productive", since=after(5))
    status = {"goodput": spent.to_status(after(605))}
    restored = after(260_000)
    account = goodput.read(status, restored)
    assert account == Account(state="productive", since=restored)
    assert account.active_seconds(after(260_030)) == 30.0
    moved = account.moved("restart", after(260_030))
    for seconds in (260_030, 260_090):
        again = goodput.read({"goodput": moved.to_status(after(seconds))}, restored)
        assert again.until(after(seconds)) == moved.until(after(seconds))


def test_waiting_for_a_queue_is_neither_work_nor_the_job_s_own_time() -> None:
    preempted = gang(rank(0, deleting=True), suspended=True)
    got = story(*BEGIN, (50.0, seen(preempted, admission="waits"), Watch()), (3_650.0, seen(RUNS), Watch()))
    assert (got["productiveSeconds"], got["queueSeconds"], got["state"]) == (40.0, 3_605.0, "startup")


def test_a_restarted_gang_that_finds_no_node_is_queued() -> None:
    waits = gang(rank(0), rank(1, phase="Pending", unplaced_since=NOW))
    got = story(*BEGIN, (50.0, trained(40.0), RESTART), (55.0, seen(waits), Watch()), (155.0, seen(RUNS), Watch()))
    assert (got["restartSeconds"], got["queueSeconds"]) == (5.0, 105.0)


def test_last_words_of_a_rank_that_ended_before_the_suspension_move_nothing() -> None:
    over = rank(0, phase="Failed", termination=words(trained_seconds=9.0))
    held = (100.0, seen(gang(over, suspended=True)), Hold())
    assert story(*BEGIN, held) == story(*BEGIN, held, (200.0, *held[1:]))

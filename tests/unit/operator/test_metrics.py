"""What is counted, and that nobody outside can make a series."""

from __future__ import annotations

import datetime
import random
from typing import Any

import pytest
from prometheus_client import generate_latest

from nexa_operator.classify import classify
from nexa_operator.decide import Watch
from nexa_operator.goodput import STATES
from nexa_operator.metrics import CAUSES, OTHER, PHASES, Metrics
from nexa_operator.observe import Gang
from nexa_operator.status import Context, next_status
from tests.unit.operator.builders import NOW, failed, gang, progress, rank, seen, words

HOSTILE = ['"} 1\nnexa_up 1', "a" * 4096, "", "\x00", "Killed ", "killed", "{}", "ünï", "$(id)", "../../etc/passwd"]


def series(metrics: Metrics, name: str) -> dict[tuple[str, ...], float]:
    """Value by labels of one sample."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == name
    }


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_known_cause_has_a_series_of_its_own_and_any_other_has_none():
    metrics = Metrics()
    for cause in ("OOMKilled", "Killed", "DataError", "Stalled", "Killed", *HOSTILE):
        metrics.restarted(cause)
    assert series(metrics, "nexa_restarts_total") == {
        ("OOMKilled",): 1, ("Killed",): 2, ("DataError",): 1, ("Stalled",): 1, (OTHER,): len(HOSTILE),
    }  # fmt: skip


def test_ten_thousand_hostile_words_make_no_series_and_no_line():
    metrics, rng = Metrics(), random.Random(7)
    for _ in range(10_000):
        word = "".join(chr(rng.randrange(1, 0x2FFF)) for _ in range(rng.randrange(40)))
        metrics.restarted(word)
        metrics.listed([{"status": {"phase": word}}, {}], NOW)
    before = len(generate_latest(metrics.registry).splitlines())
    metrics.restarted("another")
    assert len(generate_latest(metrics.registry).splitlines()) == before
    assert set(series(metrics, "nexa_restarts_total")) == {(OTHER,)}
    assert set(series(metrics, "nexa_jobs")) == {(phase,) for phase in (*PHASES, OTHER)}


LOSSES = [
    gang(failed(exit_code=137)),
    gang(failed(exit_code=3)),
    gang(failed(disruption="TerminationByKubelet")),
    gang(failed(reason="OOMKilled", exit_code=137)),
    gang(failed(reason="Evicted")),
    gang(failure="DeadlineExceeded"),
    gang(failure="BackoffLimitExceeded"),
    gang(rank(deleting=True)),
    gang(failed(exit_code=137, node_conditions=frozenset({"NodeNotReady"}))),
    gang(failed(exit_code=None, node_conditions=frozenset({"NodeGone"}))),
    gang(failed(termination=words(cause="OutOfMemory"))),
    gang(failed(termination=words(cause="NonFiniteLossError"))),
]


@pytest.mark.parametrize("lost", LOSSES, ids=range(len(LOSSES)))
def test_every_cause_that_the_operator_finds_itself_is_known(lost: Gang):
    assert classify(lost).cause in CAUSES


def test_calls_are_counted_by_verb_and_class_of_the_answer():
    metrics = Metrics()
    for verb, status in (("list", 200), ("create", 201), ("create", 409), ("patch", 503), ("get", 0)):
        metrics.called(verb, status)
    assert set(series(metrics, "nexa_api_calls_total")) == {
        ("list", "2xx"), ("create", "2xx"), ("create", "4xx"), ("patch", "5xx"), ("get", "none"),
    }  # fmt: skip


STARTED = {"startTime": "2026-11-23T11:58:00Z"}


@pytest.mark.parametrize(
    ("old", "new", "seconds"),
    [
        ({}, {**STARTED, "step": 1}, [120.0]),
        ({**STARTED, "step": 0}, {**STARTED, "step": 7}, [120.0]),
        ({**STARTED, "step": 7}, {**STARTED, "step": 8}, []),
        ({**STARTED, "step": 0}, {**STARTED, "step": 0}, []),
        ({}, {"step": 1}, []),
        ({}, {"startTime": "2026-11-23T12:00:01Z", "step": 1}, [0.0]),
    ],
)
def test_the_first_step_is_timed_once_a_job(old: dict[str, Any], new: dict[str, Any], seconds: list[float]):
    metrics = Metrics()
    metrics.told(old, new, NOW)
    metrics.told(new, new, NOW + datetime.timedelta(seconds=9))
    assert series(metrics, "nexa_time_to_first_step_seconds_count") == {(): len(seconds)}
    assert series(metrics, "nexa_time_to_first_step_seconds_sum") == {(): sum(seconds)}


def test_ages_grow_until_something_is_heard():
    clock = Clock()
    metrics = Metrics(clock=clock)
    metrics.heard("pods")
    metrics.heard("jobs")
    clock.seconds += 30
    metrics.heard("jobs")
    clock.seconds += 5
    assert series(metrics, "nexa_watch_age_seconds") == {("pods",): 35, ("jobs",): 5}
    assert series(metrics, "nexa_resync_age_seconds") == {(): 35}
    metrics.listed([{"status": {"phase": "Running"}}, {"status": {}}], NOW)
    assert series(metrics, "nexa_resync_age_seconds") == {(): 0}
    counted = series(metrics, "nexa_jobs")
    assert (counted["Running",], counted["Pending",], counted["Failed",], counted[OTHER,]) == (1, 1, 0, 0)


def test_the_time_of_all_jobs_is_told_by_what_it_went_to():
    metrics = Metrics()
    one = {"queueSeconds": 4.0, "productiveSeconds": 60.0, "evilSeconds": 1.0}
    metrics.listed([{"status": {"goodput": one}}, {"status": {"goodput": {"productiveSeconds": 5.5}}}, {}], NOW)
    counted = series(metrics, "nexa_goodput_seconds")
    assert (counted["queue",], counted["productive",], counted["lost",]) == (4.0, 65.5, 0.0)
    assert set(counted) == {(state,) for state in STATES}


def test_a_job_that_runs_quietly_is_counted_up_to_the_list() -> None:
    metrics = Metrics()
    since = {"state": "productive", "since": "2026-11-23T12:00:04Z"}
    written = since | {"queueSeconds": 4.0, "productiveSeconds": 10.0}
    created = {"creationTimestamp": "2026-11-23T12:00:00Z"}
    metrics.listed([{"metadata": created, "status": {"goodput": written}}], NOW + datetime.timedelta(seconds=604))
    counted = series(metrics, "nexa_goodput_seconds")
    assert (counted["queue",], counted["productive",]) == (4.0, 600.0)


def test_the_first_step_of_a_later_attempt_is_none_of_the_job() -> None:
    metrics, status = Metrics(), {"startTime": "2026-11-23T11:58:00Z"}
    for attempt, step in ((0, 0), (0, 7), (1, 0), (1, 5), (2, 0), (2, 1)):
        observed = seen(gang(rank(0), rank(1)), progress=progress(attempt=attempt, step=step))
        context = Context(generation=1, created=NOW, run_id="r", num_nodes=2, now=NOW)
        new = next_status(status, seen=observed, decision=Watch(), context=context)
        metrics.told(status, new, NOW)
        status = new
    assert series(metrics, "nexa_time_to_first_step_seconds_count") == {(): 1}

"""What benchmarks say is what was measured: turns end where told, ratios are judged the right way round."""

from __future__ import annotations

import io
import json
from typing import Any

from benchmarks.checkpoint import Watch, checkpoint_part
from benchmarks.contender import Step, Turns
from benchmarks.controllers import OPERATOR_USER
from benchmarks.fleet import NAMESPACE, Turn
from benchmarks.operator import first_child_seconds, percentile, requests_per_job
from benchmarks.report import Part, Target


def test_a_side_trains_until_its_tokens_are_through_and_stops_when_told() -> None:
    outbox = io.StringIO()
    turns = Turns(io.StringIO('{"tokens": 10}\n{"tokens": 1}\n{}\n'), outbox)
    assert not turns.begin()
    step = Step(tokens=6, positions=8, targets=3, loss=1.0)
    stops = [turns.after_step(step) for _ in range(3)]
    assert stops == [False, False, True]
    ready, first, second = (json.loads(line) for line in outbox.getvalue().splitlines())
    assert ready == {"ready": True}
    assert [len(answer["steps"]) for answer in (first, second)] == [2, 1]


def test_a_side_whose_other_end_is_gone_does_not_train() -> None:
    assert Turns(io.StringIO(""), io.StringIO()).begin()


def test_targets_are_met_from_their_own_side() -> None:
    assert Target("speed", 1.3, 1.3).met
    assert not Target("speed", 1.29, 1.3).met
    assert Target("memory", 0.7, 0.8, at_most=True).met
    assert not Target("memory", 0.9, 0.8, at_most=True).met


def test_a_part_is_a_table_and_a_document() -> None:
    part = Part("Speed", ("side", "tokens/s"), [("ours", 1234.56), ("theirs", None)], [Target("speed", 2.0, 4.0)])
    assert "| ours   | 1235     |" in part.text()
    assert "MISSED  speed: 2 (>= 4)" in part.text()
    assert part.document()["rows"][1] == {"side": "theirs", "tokens/s": None}


def test_a_first_look_at_saving_has_one_stall_to_tell_of() -> None:
    watch = object.__new__(Watch)  # as one pair of segments leaves it; the last save waits until it is committed
    watch.segments, watch.stalls, watch.trainers = [(1.02, 1.0), (1.0, 1.0)], [0.01, 0.5], [0.3, 0.2]
    assert [row[1] for row in checkpoint_part(watch).rows] == [0.01, 0.2, 1.02, 1.0]


def test_the_rate_of_each_stretch_counts_from_the_end_of_the_one_before() -> None:
    ended = {f"job-{number}": 10.0 + number / 2 for number in range(1, 5)}
    turn = Turn(0.0, created={"job-1": 10.0, "job-2": 10.1}, ended=ended)
    assert turn.rate == 2.0
    assert turn.rates(2) == [2.0, 2.0]


def test_a_percentile_is_a_value_that_was_measured() -> None:
    hundred = [float(value) for value in range(1, 101)]
    assert (percentile(hundred, 99), percentile(hundred, 50), percentile([7.0], 99)) == (99.0, 50.0, 7.0)


def request(verb: str, resource: str, name: str, *, user: str = OPERATOR_USER, second: int = 0, **more: str) -> Any:
    return {
        "verb": verb,
        "user": {"username": user},
        "objectRef": {"resource": resource, "name": name, "namespace": NAMESPACE, **more},
        "responseStatus": {"code": 201},
        "stageTimestamp": f"2026-11-23T12:00:{second:02}.500000Z",
    }


def test_a_job_s_writes_are_those_of_the_operator_to_it_and_to_what_is_called_after_it() -> None:
    audit = [
        request("create", "nexatrainingjobs", "job-1", user="admin"),
        request("create", "jobs", "job-1-a0"),
        request("create", "events", "job-1.0123456789abcdef"),
        request("patch", "nexatrainingjobs", "job-1", subresource="status"),
        request("create", "jobs", "job-10-a0"),
        request("patch", "leases", "nexa-operator", namespace="nexa-system"),
        request("get", "nexatrainingjobs", "job-1"),
        request("watch", "pods", ""),
    ]
    writes, reads = requests_per_job(audit)
    assert (writes, reads) == ({"job-1": 3, "job-10": 1}, 1)


def test_the_first_child_is_timed_from_one_answer_of_the_server_to_the_other() -> None:
    audit = [
        request("create", "nexatrainingjobs", "job-1", user="admin", second=1),
        request("create", "jobs", "job-1-a0", second=3),
        request("create", "jobs", "job-1-a0", user="someone else", second=2),
    ]
    assert first_child_seconds(audit) == {"job-1": 2.0}

"""What benchmarks say is what was measured: turns end where told, ratios are judged the right way round."""

from __future__ import annotations

import io
import json

from benchmarks.checkpoint import Watch, checkpoint_part
from benchmarks.contender import Step, Turns
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

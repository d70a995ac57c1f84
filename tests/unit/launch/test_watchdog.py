"""What counts as getting on, phase by phase; and stacks in a store."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from nexa_train.artifact.publish import committed_folders
from nexa_train.artifact.retention import apply_retention
from nexa_train.artifact.verify import verify
from nexa_train.config.protocol import Progress
from nexa_train.launch import watchdog
from nexa_train.launch.watchdog import LOOK_SECONDS, MEETING_SECONDS, STOP_SECONDS, Clock, Watchdog, keep
from nexa_train.rundir import RunDir
from nexa_train.store import open_store
from tests.unit.artifact.builders import RUN, publish_chain
from tests.unit.store.small_s3 import SmallS3

DEADLINE = 100.0
PHASES = ["preparing", "validating", "training", "saving", "finished"]


def at(phase: str | None, step: int = 0) -> Progress | None:
    return Progress(run_id="r", phase=phase, step=step) if phase else None


def looks(dog: Watchdog, phase: str | None, *, beats: int = 1, busy: float = 0.0, until: float) -> float | None:
    """When it calls a stall, looked at every second while nothing changes; None: not until then."""
    seconds = (float(second) for second in range(int(dog.since), int(until) + 1))
    return next((now for now in seconds if stalled(dog, phase, beats=beats, busy=busy, now=now)), None)


def stalled(dog: Watchdog, phase: str | None, step: int = 0, *, beats: int = 1, busy: float = 0.0, now: float) -> bool:
    return dog.is_stalled(at(phase, step), beats=beats, busy_seconds=lambda: busy, now=now)


@pytest.mark.parametrize("phase", [None, *PHASES])
def test_nothing_done_for_the_deadline_is_a_stall_in_every_phase(phase: str | None) -> None:
    dog = Watchdog(DEADLINE, now=0)
    assert looks(dog, phase, until=1000) == DEADLINE + 1


@pytest.mark.parametrize("phase", PHASES)
def test_every_beat_gives_ranks_the_whole_deadline_again(phase: str) -> None:
    dog = Watchdog(DEADLINE, now=0)
    for beats in range(1, 50):
        assert not stalled(dog, phase, beats=beats, now=beats * (DEADLINE - 1))
    assert stalled(dog, phase, beats=49, now=49 * (DEADLINE - 1) + DEADLINE + 1)


def test_another_phase_is_something_done() -> None:
    dog = Watchdog(DEADLINE, now=0)
    for number, phase in enumerate(PHASES):
        assert not stalled(dog, phase, now=number * DEADLINE)


def test_nodes_that_have_not_met_yet_wait_longer_than_torchrun_does() -> None:
    dog = Watchdog(DEADLINE, now=0)
    assert looks(dog, None, beats=0, until=2000) == MEETING_SECONDS + 1


def test_a_model_that_takes_long_to_read_is_no_stall_while_its_ranks_work() -> None:
    dog = Watchdog(DEADLINE, now=0)
    for minute in range(60):
        assert not stalled(dog, "preparing", busy=minute * 2, now=minute * 60)
    assert looks(dog, "preparing", busy=59 * 2, until=5000) == 59 * 60 + DEADLINE + 1


def test_ranks_that_spin_in_a_collective_have_stalled_though_they_are_busy() -> None:
    dog = Watchdog(DEADLINE, now=0)
    assert any(stalled(dog, "training", busy=now, now=now) for now in range(200))


def test_ranks_that_are_asked_to_stop_get_three_of_their_longest_steps() -> None:
    dog = Watchdog(600, now=0)
    for step in range(1, 4):
        stalled(dog, "training", step, beats=step, now=step * 20)
    assert not dog.waits_in_vain(at("training", 3), now=65)
    assert not dog.waits_in_vain(at("training", 3), now=124)
    assert dog.waits_in_vain(at("training", 3), now=126)


def test_ranks_that_save_when_they_are_asked_to_stop_are_left_alone() -> None:
    dog = Watchdog(600, now=0)
    assert not dog.waits_in_vain(at("saving"), now=0)
    assert not dog.waits_in_vain(at("saving"), now=500)


def test_ranks_that_have_not_begun_are_ended_soon() -> None:
    dog = Watchdog(600, now=0)
    assert not dog.waits_in_vain(None, now=0)
    assert dog.waits_in_vain(None, now=STOP_SECONDS + 1)


def test_the_time_in_which_nobody_looked_is_not_counted() -> None:
    times = iter([100.0, 100.2, 100.5, 4000.0, 4000.2])
    clock = Clock(lambda: next(times))
    looked = [clock.look() for _ in range(4)]
    assert looked == pytest.approx([0.2, 0.5, 0.5 + LOOK_SECONDS, 0.7 + LOOK_SECONDS])


def test_ranks_that_were_stopped_with_their_launcher_get_what_was_left_of_the_deadline() -> None:
    times = iter([0.0, *range(1, 50), *range(5000, 5200)])
    clock = Clock(lambda: next(times))
    dog = Watchdog(DEADLINE, now=clock.now)
    looks = next(look for look in range(1, 200) if stalled(dog, "training", now=clock.look()))
    assert looks == 1 + DEADLINE + 1, "a second each, the first of which saw a beat"


@pytest.fixture(params=["memory", "local"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{uuid.uuid4()}" if request.param == "memory" else str(tmp_path / "artifacts")


def test_stacks_never_take_the_place_of_others(uri: str) -> None:
    found = [keep(text, store_uri=uri, run_id=RUN, attempt=3, node=0) for text in ("first", "second", "third")]
    folder = f"checkpoints/{RUN}/stacks"
    names = ["attempt-3-node-0.txt", "attempt-3-node-0-2.txt", "attempt-3-node-0-3.txt"]
    assert found == [f"{uri}/{folder}/{name}" for name in names]
    store = open_store(uri)
    assert [store.open(f"{folder}/{name}").read() for name in names] == [b"first", b"second", b"third"]


def test_stacks_are_no_checkpoint_and_stay(uri: str, tmp_path: Path) -> None:
    store = open_store(uri)
    kept = keep("text", store_uri=uri, run_id=RUN, attempt=0, node=1)
    chain = publish_chain(store, tmp_path / "files", 5, 10, 15)
    assert committed_folders(store, RUN) == [one.folder for one in chain]
    assert apply_retention(store, RUN, 1) == [5, 10]
    assert kept is not None
    assert store.open(kept.removeprefix(f"{uri}/")).read() == b"text"
    if "://" not in uri:
        report = verify(uri)
        assert (report.ok, [one.step for one in report.manifests]) == (True, [15])


def test_a_store_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SmallS3()
    server.faults = ["hang"] * 9
    for name, value in {"ENDPOINT_URL": server.endpoint, "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(watchdog, "UPLOAD_SECONDS", 0.2)
    assert keep("text", store_uri="s3://bucket", run_id=RUN, attempt=0, node=0) is None


def test_a_store_that_refuses_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert keep("text", store_uri=str(tmp_path / "file"), run_id=RUN, attempt=0, node=0) is None
    assert "nexa: warning: stacks were not kept: " in capsys.readouterr().err


def test_where_no_rank_is_there_are_no_stacks(tmp_path: Path) -> None:
    assert watchdog.capture(1 << 30, RunDir(tmp_path), others=False) == "no rank was there\n"

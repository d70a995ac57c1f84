"""The folder between launcher and ranks: whole files, first words first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nexa_train.config.protocol import Progress, Termination
from nexa_train.rundir import RunDir


@pytest.fixture
def rundir(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path / "run")
    found.write_run({"step": 0})
    return found


def outcome(cause: str) -> Termination:
    return Termination(run_id="r", exit_code=1, cause=cause)


def test_the_ranks_read_what_the_launcher_wrote(rundir: RunDir) -> None:
    rundir.write_run({"a": [1, {"b": None}]})
    assert rundir.read_run() == {"a": [1, {"b": None}]}


def test_a_stop_that_was_asked_for_before_the_ranks_started_stays_asked_for(rundir: RunDir) -> None:
    rundir.ask_to_stop()
    rundir.write_run({"attempt": 1})
    assert rundir.stop_asked()


def test_what_torchrun_tells_the_ranks_of_a_failed_one_does_not_stop_those_that_follow(rundir: RunDir) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    rundir.stop_on_signals(of_a_rank=True)
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
    assert rundir.stop_asked()
    assert not rundir.launcher_stop_asked()
    rundir.forget_ranks_stop()
    assert not rundir.stop_asked()


def test_a_stop_that_the_launcher_was_asked_for_is_not_forgotten_with_its_ranks(rundir: RunDir) -> None:
    rundir.ask_to_stop()
    rundir.forget_ranks_stop()
    assert rundir.stop_asked()
    assert rundir.launcher_stop_asked()


def test_what_earlier_ranks_warned_of_is_not_told_again(rundir: RunDir) -> None:
    rundir.warn("a damaged checkpoint is not used")
    assert rundir.warnings() == ["a damaged checkpoint is not used"]
    rundir.write_run({"attempt": 1})
    assert rundir.warnings() == []


def test_a_stop_is_seen_once_it_was_asked_for(rundir: RunDir) -> None:
    assert not rundir.stop_asked()
    rundir.ask_to_stop()
    rundir.ask_to_stop()
    assert rundir.stop_asked()


def test_a_stop_may_be_asked_for_before_there_is_a_folder(tmp_path: Path) -> None:
    early = RunDir(tmp_path / "none")
    early.ask_to_stop()
    assert early.stop_asked()


def test_there_is_no_progress_before_the_first_word(rundir: RunDir) -> None:
    assert rundir.read_progress() is None


def test_every_beat_of_every_process_is_counted(rundir: RunDir) -> None:
    assert rundir.beats() == 0
    threads = [threading.Thread(target=lambda: [rundir.beat() for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rundir.beats() == 800


def test_other_ranks_begin_without_the_beats_and_stacks_of_earlier_ones(rundir: RunDir) -> None:
    rundir.beat()
    rundir.own_stacks(3).touch()
    assert [path.name for path in rundir.stacks()] == [f"stacks-3-{os.getpid()}"]
    rundir.write_run({"attempt": 1})
    assert (rundir.beats(), rundir.stacks()) == (0, [])


def test_progress_tells_how_long_it_is_since_it_was_written(rundir: RunDir) -> None:
    rundir.write_progress(Progress(run_id="r", step=3))
    ago = time.time() - 60
    os.utime(rundir.path / "progress.json", (ago, ago))
    found = rundir.read_progress()
    assert found is not None
    assert (found.step, found.seconds_since_last_step) == (3, pytest.approx(60, abs=5))


def test_a_clock_that_was_set_back_gives_no_negative_silence(rundir: RunDir) -> None:
    rundir.write_progress(Progress(run_id="r"))
    ahead = time.time() + 3600
    os.utime(rundir.path / "progress.json", (ahead, ahead))
    found = rundir.read_progress()
    assert found is not None
    assert found.seconds_since_last_step == 0


def test_the_first_last_words_of_a_rank_stay(rundir: RunDir) -> None:
    rundir.write_outcome(0, outcome("NonFiniteLossError"))
    rundir.write_outcome(0, outcome("Stopped"))
    assert [each.cause for each in rundir.read_outcomes()] == ["NonFiniteLossError"]


def test_the_rank_that_failed_first_is_named_first(rundir: RunDir) -> None:
    for rank, (cause, age) in enumerate([("Second", 10), ("Third", 5), ("First", 20)]):
        rundir.write_outcome(rank, outcome(cause))
        when = time.time() - age
        os.utime(rundir.path / f"outcome-{rank}.json", (when, when))
    assert [each.cause for each in rundir.read_outcomes()] == ["First", "Second", "Third"]


def test_a_reader_never_sees_half_a_file(rundir: RunDir) -> None:
    said = [Progress(run_id="r" * length, step=length) for length in (1, 20_000)]
    rundir.write_progress(said[0])
    done = threading.Event()

    def write() -> None:
        for turn in range(200):
            rundir.write_progress(said[turn % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        found = rundir.read_progress()
        assert found is not None
        assert len(found.run_id) == found.step
    writer.join()


def test_no_draft_is_left_behind(rundir: RunDir) -> None:
    rundir.write_progress(Progress(run_id="r"))
    rundir.write_outcome(3, outcome("NexaError"))
    assert sorted(path.name for path in rundir.path.iterdir()) == ["outcome-3.json", "progress.json", "run.json"]


def abandoned(folder: Path) -> RunDir:
    """A run folder whose launcher was killed while its ranks restored and saved."""
    found = RunDir(folder)
    for tensors in (found.restoring, found.saving(7, 0)):
        tensors.mkdir(parents=True)
        (tensors / "model.safetensors").write_bytes(bytes(9))
    (folder / "lock").touch()
    (folder / "ranks.log").touch()
    return found


def tensors(rundir: RunDir) -> list[str]:
    return sorted(path.name for path in rundir.path.iterdir() if path.is_dir())


def test_tensors_that_a_killed_launcher_left_are_dropped_by_the_next_one_and_nothing_else(tmp_path: Path) -> None:
    killed = abandoned(tmp_path / "runs" / "killed")
    with RunDir(tmp_path / "runs" / "new").held("*"):
        assert sorted(path.name for path in killed.path.iterdir()) == ["lock", "ranks.log"]


def test_tensors_of_a_launcher_that_lives_are_left_alone_until_it_is_killed(tmp_path: Path) -> None:
    hold = "import sys, pathlib, nexa_train.rundir as r\nwith r.RunDir(pathlib.Path(sys.argv[1])).held('*'): input('.')"
    lives = abandoned(tmp_path / "runs" / "lives")
    launcher = subprocess.Popen(
        [sys.executable, "-c", hold, str(lives.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert launcher.stdout is not None
    assert launcher.stdout.read(1)
    with RunDir(tmp_path / "runs" / "new").held("*"):
        assert tensors(lives) == ["restore", "save-7-0"]
    launcher.kill()
    launcher.communicate()
    with RunDir(tmp_path / "runs" / "newer").held("*"):
        assert tensors(lives) == []


def test_own_tensors_stay_while_the_folder_is_held(tmp_path: Path) -> None:
    own = abandoned(tmp_path / "runs" / "own")
    with own.held("*"):
        assert tensors(own) == ["restore", "save-7-0"]


@pytest.mark.parametrize("what", ["another name", "no lock", "a link", "somebody else's"])
def test_folders_that_may_be_somebody_elses_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    found = abandoned(tmp_path / "elsewhere" / "nexa-run-found")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    if what == "a link":
        (temporary / "nexa-run-found").symlink_to(found.path)
    else:
        name = "found" if what == "another name" else "nexa-run-found"
        found = RunDir(found.path.rename(temporary / name))
    if what == "no lock":
        (found.path / "lock").unlink()
    if what == "somebody else's":
        monkeypatch.setattr(os, "geteuid", lambda: found.path.stat().st_uid + 1)
    with RunDir(temporary / "nexa-run-new").held("nexa-run-*"):
        assert tensors(found) == ["restore", "save-7-0"]

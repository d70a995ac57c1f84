"""What counts as getting on before ranks run; and processes that really hang, recover, are stopped, or go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nexa_train.launch.guard import LOOKS, MOVED_BYTES, Done, Idleness, done_until_now
from tests.cluster.run import wait_until

DEADLINE = 100.0


def test_nothing_done_in_all_looks_of_a_deadline_is_a_hang_and_in_one_less_it_is_not() -> None:
    idleness = Idleness(DEADLINE, Done(5.0, 7))
    assert [idleness.is_over(Done(5.0, 7)) for _ in range(LOOKS + 1)] == [False] * LOOKS + [True]


@pytest.mark.parametrize("done", [Done(1.01, 0), Done(0.0, MOVED_BYTES + 1)], ids=["processor", "bytes"])
def test_processor_time_or_bytes_alone_are_getting_on(done: Done) -> None:
    idleness, total = Idleness(DEADLINE, Done(0.0, 0)), Done(0.0, 0)
    for _ in range(10):
        total = Done(total.seconds + done.seconds, total.num_bytes + done.num_bytes)
        assert not any(idleness.is_over(total) for _ in range(LOOKS))
    assert [idleness.is_over(total) for _ in range(2)] == [False, True]


def test_little_adds_up_over_the_deadline() -> None:
    idleness = Idleness(DEADLINE, Done(0.0, 0))
    assert not any(idleness.is_over(Done(look * 0.06, 0)) for look in range(5 * LOOKS))


def test_what_children_did_counts_while_they_live_and_after() -> None:
    before = done_until_now()
    work = "import sys; sum(range(20_000_000)); sys.stdout.buffer.write(bytes(4 * 2**20)); sys.stdout.flush(); input()"
    child = subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read(4 * 2**20)
    alive = done_until_now()
    child.communicate(b"\n")
    after = done_until_now()
    for done in (alive, after):
        assert done.seconds - before.seconds > 0.1
        assert done.num_bytes - before.num_bytes > 8 * 2**20, "written there and read here"


GUARDED = """
import signal, subprocess, sys, time
from pathlib import Path
from nexa_train.launch.guard import guarded
folder = Path(sys.argv[1])
def say(stacks):
    folder.joinpath("said").write_text(stacks)
    {say}
with guarded({deadline}, say):
    folder.joinpath("begun").touch()
    {body}
{then}
folder.joinpath("went on").touch()
"""


def start(folder: Path, body: str, *, say: str = "", deadline: float = 1.0, then: str = "") -> subprocess.Popen[str]:
    program = GUARDED.format(body=body, say=say, deadline=deadline, then=then)
    return subprocess.Popen([sys.executable, "-c", program, str(folder)], text=True, stderr=subprocess.PIPE)


def test_a_process_that_hangs_says_where_and_ends_with_70_and_so_do_its_children(tmp_path: Path) -> None:
    process = start(tmp_path, "subprocess.run(['sleep', '600'])")
    wait_until(lambda: psutil.Process(process.pid).children(), timeout_seconds=30, what="a child")
    (child,) = psutil.Process(process.pid).children()
    process.communicate(timeout=60)
    assert process.returncode == 70
    assert "most recent call first" in (tmp_path / "said").read_text()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert not (tmp_path / "went on").exists()


@pytest.mark.parametrize("say", ["time.sleep(1.5)", "raise OSError('no space')"], ids=["slowly", "in vain"])
def test_once_it_is_decided_nobody_goes_on_and_it_ends_with_70_whatever_is_said(tmp_path: Path, say: str) -> None:
    body = "while not folder.joinpath('said').exists(): time.sleep(0.2)"
    process = start(tmp_path, body, say=say)
    process.communicate(timeout=60)
    assert process.returncode == 70
    assert not (tmp_path / "went on").exists()


# Where others take the processors, too, one that computes must have a few hundredths of one within the deadline.
@pytest.mark.parametrize(
    ("body", "deadline"),
    [
        ("end = time.monotonic() + 12\n    while time.monotonic() < end: pass", 5.0),
        ("for _ in range(25): folder.joinpath('bytes').write_bytes(bytes(2**20)); time.sleep(0.1)", 1.0),
        ("subprocess.run(['timeout', '12', 'sh', '-c', 'while true; do true; done'])", 5.0),
    ],
    ids=["computes", "writes", "has a child compute"],
)
def test_who_gets_on_is_left_alone(tmp_path: Path, body: str, deadline: float) -> None:
    process = start(tmp_path, body, deadline=deadline)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert not (tmp_path / "said").exists()


def test_after_the_block_nobody_looks_any_more(tmp_path: Path) -> None:
    process = start(tmp_path, "pass", deadline=0.5, then="time.sleep(1.2)")  # longer than the deadline
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_process_that_was_stopped_has_not_hung(tmp_path: Path) -> None:
    process = start(tmp_path, "while not folder.joinpath('go').exists(): time.sleep(0.05)", deadline=2.0)
    wait_until(lambda: (tmp_path / "begun").exists(), timeout_seconds=30, what="its beginning")
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)  # longer than the deadline
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.5)  # several of its looks
    (tmp_path / "go").touch()
    process.communicate(timeout=60)
    assert process.returncode == 0

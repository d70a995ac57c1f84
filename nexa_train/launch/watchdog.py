"""Whether ranks get on, and where they stand when they do not. Used by `node` while ranks run.

What counts is what was done, never a clock of theirs: ranks write a beat for each step, batch of the validation split
and file of a checkpoint (`RunDir.beat`; `relay` tells other nodes' beats here, too). Importing libraries and reading a
model cannot be counted so; there it is the processor time that ranks take, which is next to none where they hang.
"""

from __future__ import annotations

import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread

from nexa_train.artifact.manifest import run_folder
from nexa_train.config.protocol import Progress
from nexa_train.errors import AlreadyExistsError, NexaError
from nexa_train.launch.processes import descendants, processor_seconds, send
from nexa_train.rundir import RunDir
from nexa_train.store import open_store

MEETING_SECONDS = 900.0
"""The least that nodes get to meet: pods may be queued, and torchrun gives up by itself after ten minutes."""
BUSY_SHARE = 0.01
"""Ranks that took so much of the deadline as processor time do something: one that hangs takes a tenth of it."""
BUSY_LOOK = 0.05
"""How often that is looked at, as a share of the deadline: it means to read a file of each thread."""
STACKS_SECONDS = 5.0
"""Time that ranks get to write their stacks."""
OTHERS_SECONDS = 10.0
"""How long ranks that hang are left alone where there are other nodes: those look at theirs within this time, and
their ranks fail as soon as these are gone."""
STOP_SECONDS = 10.0
"""The least that ranks get to come to the end of their step once they are asked to stop."""
STOP_STEPS = 3
"""And how many times the longest step, or batch of the validation split, so far."""
UPLOAD_SECONDS = 30.0
"""How long the store may take for the stacks: it may be the reason for the stall."""
LOOK_SECONDS = 1.0
"""The most that one look counts for; from one to the next it is a fifth of that, unless the launcher was stopped."""
_POLL_SECONDS = 0.1


class Clock:
    """Counts the seconds in which somebody looked: it stands still while the launcher does.

    Launcher and ranks are stopped together, by Slurm's SUSPEND, `docker pause` or a machine that sleeps, and the
    launcher may look again before any rank had time for a step.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = 0.0
        self._clock, self._looked = clock, clock()

    def look(self) -> float:
        """The seconds until now, this look included."""
        before, self._looked = self._looked, self._clock()
        self.now += min(self._looked - before, LOOK_SECONDS)
        return self.now


class Watchdog:
    """Judges from one look to the next. Holds no clock: ranks that were stopped with their launcher have not stalled.

    Args:
        now: in seconds, of a `Clock`; `is_stalled` takes the same.
    """

    def __init__(self, deadline_seconds: float, *, now: float) -> None:
        self.deadline_seconds, self.since = deadline_seconds, now
        self.seen: tuple[int, str] = (0, "")
        self.busy_seconds, self.busy_seen = 0.0, now
        self.longest_step = 0.0
        self.asked_to_stop: float | None = None

    def is_stalled(
        self, progress: Progress | None, *, beats: int, busy_seconds: Callable[[], float], now: float
    ) -> bool:
        """Whether nothing was done for too long.

        Args:
            busy_seconds: says how much processor time the ranks took until now; asked now and then while they start.
        """
        seen = beats, progress.phase if progress else ""
        if seen != self.seen:
            if self.seen[1] in ("training", "validating"):
                self.longest_step = max(self.longest_step, now - self.since)
            self.seen, self.since = seen, now
        if starts(progress) and now - self.busy_seen >= BUSY_LOOK * self.deadline_seconds:
            self.busy_seen, busy = now, busy_seconds()
            if busy - self.busy_seconds > BUSY_SHARE * self.deadline_seconds:
                self.busy_seconds, self.since = busy, now
        limit = self.deadline_seconds if beats else max(self.deadline_seconds, MEETING_SECONDS)
        return now - self.since > limit

    def waits_in_vain(self, progress: Progress | None, *, now: float) -> bool:
        """Whether ranks that were asked to stop do not come to the end of their step, as another node's are gone.

        Where they save, only the deadline and the pod's grace period count: a file may take any time.
        """
        self.asked_to_stop = now if self.asked_to_stop is None else self.asked_to_stop
        if progress and progress.phase in ("saving", "finished"):
            return False
        return now - max(self.since, self.asked_to_stop) > max(STOP_SECONDS, STOP_STEPS * self.longest_step)


def starts(progress: Progress | None) -> bool:
    """Whether ranks are still before their first batch."""
    return progress is None or progress.phase in ("starting", "preparing")


def busy_seconds(launched: int) -> float:
    """Processor time that the ranks below a process took."""
    return sum(map(processor_seconds, _ranks(launched)))


def capture(launched: int, rundir: RunDir, *, others: bool) -> str:
    """Have every rank below a process write its stacks (`rank` registers SIGUSR1); returns them.

    Args:
        others: whether other nodes' ranks hang with these.
    """
    files = {int(path.name.rpartition("-")[2]): path for path in rundir.stacks()}
    states = {pid: _state(pid) for pid in _ranks(launched)}
    asked = [pid for pid in states if pid in files]  # the signal would kill one that does not know it yet
    for pid in asked:
        send(pid, signal.SIGUSR1)
    if others:
        time.sleep(OTHERS_SECONDS)
    for pid in asked:
        send(pid, signal.SIGCONT)  # one that was stopped can write now
    _wait_until_still([files[pid] for pid in asked])
    parts = [f"process {pid}, {state}\n{_read(files.get(pid))}" for pid, state in states.items()]
    return "\n".join(parts) or "no rank was there\n"


def keep(text: str, *, store_uri: str, run_id: str, attempt: int, node: int) -> str | None:
    """Put stacks beside the run's checkpoints, never over others.

    Returns:
        Their URI; None: the store did not take them in time.
    """
    kept: list[str] = []

    def create() -> None:
        try:
            store = open_store(store_uri)
            for key in _keys(run_id, attempt, node):
                with suppress(AlreadyExistsError):
                    store.create(key, text.encode("utf-8", "replace"))
                    kept.append(f"{store.uri.rstrip('/')}/{key}")
                    return
        except NexaError as exc:
            print(f"nexa: warning: stacks were not kept: {exc}", file=sys.stderr, flush=True)

    thread = Thread(target=create, name="stacks", daemon=True)
    thread.start()
    thread.join(UPLOAD_SECONDS)
    return kept[0] if kept else None


def _keys(run_id: str, attempt: int, node: int) -> Iterator[str]:
    """Attempts count anew where a job is made again, and are all the first on one machine."""
    first = f"{run_folder(run_id)}/stacks/attempt-{attempt}-node-{node}"
    return itertools.chain([f"{first}.txt"], (f"{first}-{number}.txt" for number in itertools.count(2)))


def _wait_until_still(files: list[Path]) -> None:
    """Until all have been written to and none grows any more."""
    deadline, before = time.monotonic() + STACKS_SECONDS, [0]
    while time.monotonic() < deadline:
        sizes = [path.stat().st_size for path in files]
        if sizes == before and all(sizes):
            return
        before = sizes
        time.sleep(_POLL_SECONDS)


def _read(path: Path | None) -> str:
    text = path.read_text(encoding="utf-8", errors="replace") if path else ""
    return text or "it wrote no stacks\n"


def _ranks(launched: int) -> list[int]:
    return [pid for pid in descendants(launched) if _is_rank(pid)]


def _is_rank(pid: int) -> bool:
    """Not torchrun, whose arguments name the rank's module too: a signal would end it, and with it all ranks."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"nexa_train.rank" in words and b"nexa_train.launch.torchrun" not in words


def _state(pid: int) -> str:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                return line.partition(":")[2].strip()
    return "gone"

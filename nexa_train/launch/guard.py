"""Ends a process that hangs while it makes ready for ranks, after it said where it stands. Used by `node`.

What counts is what it and its children did: processor time, and bytes, for a slow download takes little else. What
sockets receive is charged to no process, so all that comes in by the network counts: in a pod that is the pod's own,
elsewhere other programs' traffic may hide a hang. A thread that holds the interpreter's lock hides one, too.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Lock, Thread

from nexa_train.config.protocol import EXIT_STALLED
from nexa_train.launch.processes import bytes_moved, bytes_received, descendants, processor_seconds, send
from nexa_train.launch.watchdog import BUSY_SHARE

LOOKS = 20
"""Within a deadline. They are counted, not the seconds: a process that was stopped, or its machine, has not hung."""
LEAST_BUSY_SECONDS = 0.3
"""Of processor time: within a deadline of seconds the looks themselves take more than that share."""
MOVED_BYTES = 2**20
"""Or who moved so much: an operator that asks for progress, and Prometheus, bring a tenth of it in ten minutes."""


@dataclass(frozen=True)
class Done:
    """What was done until a moment."""

    seconds: float
    """Of processor time."""
    num_bytes: int


class Idleness:
    """Judges from one look to the next. Pure."""

    def __init__(self, deadline_seconds: float, done: Done) -> None:
        self._busy_seconds = max(BUSY_SHARE * deadline_seconds, LEAST_BUSY_SECONDS)
        self._seen, self._looks = done, 0

    def is_over(self, done: Done) -> bool:
        """Whether next to nothing was done for all looks of a deadline."""
        busy, moved = done.seconds - self._seen.seconds, done.num_bytes - self._seen.num_bytes
        if busy > self._busy_seconds or moved > MOVED_BYTES:
            self._seen, self._looks = done, 0
        else:
            self._looks += 1
        return self._looks > LOOKS


@contextmanager
def guarded(deadline_seconds: float, say: Callable[[str], object]) -> Iterator[None]:
    """End this process with 70 where it gets next to nothing done for so long; its children with it.

    Args:
        say: called before, in a thread of its own, with the stacks of all threads. Nobody goes on meanwhile: whoever
            comes to the end of the block waits there to be ended.
    """
    over, deciding = Event(), Lock()
    Thread(target=_guard, args=(deadline_seconds, over, deciding, say), name="guard", daemon=True).start()
    try:
        yield
    finally:
        with deciding:
            over.set()


def _guard(deadline_seconds: float, over: Event, deciding: Lock, say: Callable[[str], object]) -> None:
    idleness = Idleness(deadline_seconds, done_until_now())
    while not over.wait(deadline_seconds / LOOKS):
        if not idleness.is_over(done_until_now()):
            continue
        with deciding:
            if over.is_set():
                return
            try:
                say(_stacks())
            finally:
                _end()


def done_until_now() -> Done:
    """By this process and those below it, also those that have ended."""
    family = descendants(os.getpid())
    seconds = sum(processor_seconds(pid, of_children=True) for pid in family)
    return Done(seconds, sum(map(bytes_moved, family)) + bytes_received())


def _stacks() -> str:
    with suppress(OSError), tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()
    return "the stacks could not be written\n"


def _end() -> None:
    for pid in reversed(descendants(os.getpid())[1:]):
        send(pid, signal.SIGKILL)
    os._exit(EXIT_STALLED)

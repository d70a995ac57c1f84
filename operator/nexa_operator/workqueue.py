"""A queue of objects to look at: each at most once in it, each with at most one worker. Between handlers and
`reconcile.py`; knows nothing of Kubernetes.

An object that is added while a worker has it is looked at again afterwards, so no change is missed and a hundred
changes cost one or two looks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

K = TypeVar("K")
Timers: TypeAlias = dict[K, asyncio.TimerHandle]

SOON_SECONDS = 0.3
"""In which what belongs together is heard."""
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 60.0


@dataclass
class WorkQueue(Generic[K]):
    """For one event loop; not for threads."""

    _ready: deque[K] = field(default_factory=deque)
    _dirty: set[K] = field(default_factory=set)
    _taken: set[K] = field(default_factory=set)
    _soon: Timers[K] = field(default_factory=dict)
    _failures: dict[K, int] = field(default_factory=dict)
    _timers: Timers[K] = field(default_factory=dict)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    def __len__(self) -> int:
        return len(self._dirty)

    def add(self, key: K) -> None:
        """Look at it as soon as a worker is free; nothing new if that is already to happen."""
        if key in self._dirty:
            return
        self._dirty.add(key)
        if key not in self._taken:
            self._put(key)

    def add_soon(self, key: K) -> None:
        """Look at it in a moment, with what comes until then; nothing new if it is looked at before."""
        if key not in self._dirty and key not in self._soon:
            self._soon[key] = asyncio.get_running_loop().call_later(SOON_SECONDS, self._ring, self._soon, key)

    def add_after(self, key: K, seconds: float) -> None:
        """Look at it again then; an earlier appointment stays."""
        timer, loop = self._timers.get(key), asyncio.get_running_loop()
        if timer is not None and timer.when() <= loop.time() + seconds:
            return
        self._stop(self._timers, key)
        self._timers[key] = loop.call_later(seconds, self._ring, self._timers, key)

    def cancel(self, key: K) -> None:
        """No appointment for it any more."""
        self._stop(self._soon, key)
        self._stop(self._timers, key)

    def add_again(self, key: K) -> float:
        """Look at it again after a failure, each time twice as late; returns the delay in seconds.

        An appointment that the failed look made goes: with it the next one would come as soon as if nothing failed.
        """
        self._stop(self._timers, key)
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay = min(FIRST_DELAY_SECONDS * 2.0 ** min(failures, 16), LONGEST_DELAY_SECONDS)
        self.add_after(key, delay)
        return delay

    def forget_failures(self, key: K) -> None:
        """It went well: the next failure waits the shortest time again."""
        self._failures.pop(key, None)

    async def take(self) -> K:
        """The next one; nobody else gets it until `done`."""
        while not self._ready:
            self._more.clear()
            await self._more.wait()
        key = self._ready.popleft()
        self._dirty.discard(key)
        self._taken.add(key)
        self._stop(self._soon, key)
        return key

    def done(self, key: K) -> None:
        """The worker is through with it."""
        self._taken.discard(key)
        if key in self._dirty:
            self._put(key)

    def _put(self, key: K) -> None:
        self._ready.append(key)
        self._more.set()

    @staticmethod
    def _stop(timers: Timers[K], key: K) -> None:
        if timer := timers.pop(key, None):
            timer.cancel()

    def _ring(self, timers: Timers[K], key: K) -> None:
        timers.pop(key, None)
        self.add(key)

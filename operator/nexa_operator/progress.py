"""Reads /progress of pod 0 of every running gang. Beside the reconciler: fed by it, and wakes it on news.

A pod that cannot be reached changes what is known, never what runs, and holds up nobody: each gang is read at a time of
its own, those that did not answer apart from those that did.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import httpx
import structlog
from pydantic import ValidationError

from nexa_train.config.protocol import PROGRESS_PORT, Progress

K = TypeVar("K")
log = structlog.get_logger(__name__)

MISSES_UNTIL_UNKNOWN = 3
"""A pod that starts does not answer at once."""
_TIMEOUT_SECONDS = 5.0
"""For a whole answer: of its parts each could take as long."""
_MOST_BYTES = 65_536
"""A pod is a tenant's. What ours answer is a hundredth of it."""
_NUM_AT_ONCE = 32
"""Of those that answered when they were last asked, and as many of the others: httpx has a hundred connections."""
_LONGEST_SECONDS = 60.0
"""Between two questions to a pod that does not answer."""
_TICKS = 10
"""How often in an interval those are looked for whose time has come."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where one gang's progress is read, and whose it must be: addresses of pods are used again."""

    ip: str
    run_id: str
    attempt: int


@dataclass
class _Entry:
    target: Target
    latest: Progress | None = None
    misses: int = 0
    due_at: float = -math.inf

    @property
    def answers(self) -> bool:
        return self.latest is not None and self.misses == 0


@dataclass
class ProgressReader(Generic[K]):
    """The latest word of each gang, by the key of its job."""

    on_news: Callable[[K], None]
    transport: httpx.AsyncBaseTransport
    """Bare: a client would follow what tenants' pods redirect to, and keep their cookies for good."""
    interval_seconds: float = 10.0
    """Between two questions to a gang, so a job's status is written at most as often on its account."""
    clock: Callable[[], float] = time.monotonic
    _answering: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_NUM_AT_ONCE))
    _silent: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_NUM_AT_ONCE))
    _entries: dict[K, _Entry] = field(default_factory=dict)

    def watch(self, key: K, target: Target) -> None:
        """Read it from now on; a new target forgets what the old one said."""
        entry = self._entries.get(key)
        if entry is None or entry.target != target:
            self._entries[key] = _Entry(target)

    def forget(self, key: K) -> None:
        """It does not run any more."""
        self._entries.pop(key, None)

    def latest(self, key: K) -> Progress | None:
        entry = self._entries.get(key)
        return entry.latest if entry else None

    def is_known(self, key: K) -> bool:
        """False once it has been out of reach for some looks."""
        entry = self._entries.get(key)
        return entry is None or entry.misses < MISSES_UNTIL_UNKNOWN

    async def read_forever(self) -> None:
        """Each gang when its time has come, whatever the others do."""
        async with asyncio.TaskGroup() as reads:
            while True:
                for key in self.take_due():
                    reads.create_task(self.read(key))
                await asyncio.sleep(self.interval_seconds / _TICKS)

    def take_due(self) -> Iterator[K]:
        """Those whose time has come; each only once until it was read."""
        now = self.clock()
        for key, entry in self._entries.items():
            if entry.due_at <= now:
                entry.due_at = math.inf
                yield key

    async def read(self, key: K) -> None:
        """Ask this one, now."""
        entry = self._entries.get(key)
        if entry is None:
            return
        async with self._answering if entry.answers else self._silent:
            seen = await self._fetch(entry.target)
        self._note(key, entry, seen)
        entry.due_at = self.clock() + self._delay_seconds(entry)

    def _delay_seconds(self, entry: _Entry) -> float:
        """Until it is asked again: twice as long each time once it is out of reach."""
        in_vain = max(0, entry.misses - MISSES_UNTIL_UNKNOWN + 1)
        delay = self.interval_seconds * 2.0 ** min(in_vain, 16)
        return max(self.interval_seconds, min(delay, _LONGEST_SECONDS))

    def _note(self, key: K, entry: _Entry, seen: Progress | None) -> None:
        known_before, latest_before = self.is_known(key), entry.latest
        entry.misses = 0 if seen else entry.misses + 1
        entry.latest = seen or entry.latest
        if self._entries.get(key) is entry and (entry.latest != latest_before or self.is_known(key) != known_before):
            self.on_news(key)

    async def _fetch(self, target: Target) -> Progress | None:
        host = f"[{target.ip}]" if ":" in target.ip else target.ip
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                seen = Progress.model_validate_json(await self._read(f"http://{host}:{PROGRESS_PORT}/progress"))
        except (TimeoutError, httpx.HTTPError, ValidationError):
            return None
        except Exception as exc:
            # Whatever else a tenant's pod makes of its answer: nobody else's progress may depend on it.
            log.debug("no progress", ip=target.ip, error=repr(exc), exc_info=True)
            return None
        return seen if (seen.run_id, seen.attempt) == (target.run_id, target.attempt) else None

    async def _read(self, url: str) -> bytes:
        """The body as it came: nothing is unpacked, for a few bytes may become any number. Cut where it is too long."""
        read = bytearray()
        request = httpx.Request("GET", url, headers={"Accept-Encoding": "identity"})
        answer = await self.transport.handle_async_request(request)
        async with aclosing(answer):
            if answer.status_code != httpx.codes.OK:
                raise httpx.HTTPStatusError(str(answer.status_code), request=request, response=answer)
            async for part in answer.aiter_raw():
                read += part
                if len(read) > _MOST_BYTES:
                    break
        return bytes(read[:_MOST_BYTES])

"""Reads /progress of pod 0 of every running gang. Beside the reconciler: fed by it, and wakes it on news.

A pod that cannot be reached changes what is known, never what runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import httpx
from pydantic import ValidationError

from nexa_train.config.protocol import PROGRESS_PORT, Progress

K = TypeVar("K")

MISSES_UNTIL_UNKNOWN = 3
"""A pod that starts does not answer at once."""
_TIMEOUT_SECONDS = 5.0
"""For a whole answer: of its parts each could take as long."""
_MOST_BYTES = 65_536
"""A pod is a tenant's. What ours answer is a hundredth of it."""
_NUM_AT_ONCE = 32


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


@dataclass
class ProgressReader(Generic[K]):
    """The latest word of each gang, by the key of its job."""

    on_news: Callable[[K], None]
    client: httpx.AsyncClient
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

    async def read_forever(self, *, interval_seconds: float) -> None:
        """One round an interval, so a job's status is written at most as often on its account."""
        while True:
            await asyncio.sleep(interval_seconds)
            await self.read_all()

    async def read_all(self) -> None:
        """One round over all gangs."""
        limit = asyncio.Semaphore(_NUM_AT_ONCE)

        async def read(key: K, entry: _Entry) -> None:
            async with limit:
                seen = await self._fetch(entry.target)
            self._note(key, entry, seen)

        await asyncio.gather(*(read(key, entry) for key, entry in list(self._entries.items())))

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
        return seen if (seen.run_id, seen.attempt) == (target.run_id, target.attempt) else None

    async def _read(self, url: str) -> bytes:
        """The body as it came: nothing is unpacked, for a few bytes may become any number. Cut where it is too long."""
        read = bytearray()
        async with self.client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as answer:
            answer.raise_for_status()
            async for part in answer.aiter_raw():
                read += part
                if len(read) > _MOST_BYTES:
                    break
        return bytes(read[:_MOST_BYTES])

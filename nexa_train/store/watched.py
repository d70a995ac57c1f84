"""A store that says whenever it got something done, for whoever watches that a run gets on.

Before: `rank` wraps the store that a run publishes to. After: that store.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nexa_train.store.base import Opened, Store, Stored


@dataclass(frozen=True)
class WatchedStore:
    """`store`; `done` is called after each of its calls that succeeded, in the thread that made it."""

    store: Store
    done: Callable[[], None]

    @property
    def uri(self) -> str:
        """See `Store.uri`."""
        return self.store.uri

    def create(self, key: str, source: bytes | Path) -> Stored:
        """See `Store.create`."""
        stored = self.store.create(key, source)
        self.done()
        return stored

    def open(self, key: str, *, version_id: str | None = None) -> Opened:
        """See `Store.open`."""
        opened = self.store.open(key, version_id=version_id)
        self.done()
        return opened

    def list(self, prefix: str = "") -> builtins.list[Stored]:
        """See `Store.list`."""
        found = self.store.list(prefix)
        self.done()
        return found

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        self.store.delete(key)
        self.done()

    def probe(self) -> None:
        """See `Store.probe`."""
        self.store.probe()
        self.done()

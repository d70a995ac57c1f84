"""A store in this process's memory: for tests, and for trying things out without a folder or a server.

Before: `open_store("memory://NAME")`. After: nothing. The same name gives the same store for the life of the
process.
"""

from __future__ import annotations

import builtins
import io
import threading
from pathlib import Path
from typing import ClassVar, cast

from nexa_train.errors import AlreadyExistsError, NotFoundError
from nexa_train.store.base import Opened, Stored, check_key, check_prefix


class MemoryStore:
    """A dictionary with the contract of `Store`."""

    _named: ClassVar[dict[str, MemoryStore]] = {}
    _naming: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, name: str = "unnamed") -> None:
        self.uri = f"memory://{name}"
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    @classmethod
    def named(cls, name: str) -> MemoryStore:
        """The one store of that name in this process."""
        with cls._naming:
            return cls._named.setdefault(name, cls(name))

    def __repr__(self) -> str:
        return f"MemoryStore({self.uri!r})"

    def create(self, key: str, source: bytes | Path) -> Stored:
        """See `Store.create`."""
        check_key(key)
        content = bytes(source) if not isinstance(source, Path) else source.read_bytes()
        with self._lock:
            if key in self._objects:
                raise AlreadyExistsError(f"{key} already exists in {self.uri}; nothing was overwritten")
            self._objects[key] = content
        return Stored(key=key, size=len(content))

    def open(self, key: str, *, version_id: str | None = None) -> Opened:
        """See `Store.open`; versions are not kept, so `version_id` makes no difference."""
        content = self._objects.get(check_key(key))
        if content is None:
            raise NotFoundError(f"{key} is not in {self.uri}")
        raw = cast(io.RawIOBase, io.BytesIO(content))  # BufferedReader needs no more than readinto()
        return Opened(raw, stored=Stored(key=key, size=len(content)))

    def list(self, prefix: str = "") -> builtins.list[Stored]:
        """See `Store.list`."""
        folder = check_prefix(prefix)
        start = f"{folder}/" if folder else ""
        with self._lock:
            return [
                Stored(key=key, size=len(content))
                for key, content in sorted(self._objects.items())
                if key.startswith(start)
            ]

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        with self._lock:
            self._objects.pop(check_key(key), None)

    def probe(self) -> None:
        """Nothing to prove: `create` is a dictionary's, under a lock."""

"""The contract of every store, and the rules for keys that hold on all of them.

Before: `artifact.publish` and `artifact.verify` call these five methods. After: `local`, `s3` and `memory`
carry them out. There is no way to overwrite: an object is created once, read, listed and deleted.
"""

from __future__ import annotations

import builtins
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from nexa_train.errors import ConfigError

RESERVED = ".nexa"
"""First segment of every object a store keeps for itself (probes, half-written files); never listed."""

# The characters that file systems, S3 and URLs all take as they are: a key means the same everywhere.
_SEGMENT = re.compile(r"[A-Za-z0-9._=+@, -]+")
_MAX_KEY_BYTES = 1024  # S3's limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One object: its key relative to the store, its size in bytes and, on a versioned bucket, its version.

    Listings carry no version: S3 gives it on writing and reading only.
    """

    key: str
    size: int
    version_id: str | None = None


class Opened(io.BufferedReader):
    """A binary stream over one object, knowing which object and version it reads. Close it, or use `with`."""

    def __init__(self, raw: io.RawIOBase, *, stored: Stored, buffer_size: int = 1 << 20) -> None:
        super().__init__(raw, buffer_size)
        self.stored = stored


@runtime_checkable
class Store(Protocol):
    """Five calls. Safe to share between threads.

    Every call raises RefusedError when the store answers no or cannot be reached, and ConfigError for a key
    that is not a plain relative path.
    """

    @property
    def uri(self) -> str:
        """What `open_store` takes to open this store again; holds no credentials."""

    def create(self, key: str, source: bytes | Path) -> Stored:
        """Write `source` (bytes, or the file at a path) under `key`, all of it or nothing.

        Raises:
            AlreadyExistsError: the key is taken; what is there stays untouched.
        """

    def open(self, key: str, *, version_id: str | None = None) -> Opened:
        """Read `key` as a stream, in the version asked for where the store keeps versions.

        Raises:
            NotFoundError: there is no such object, or no such version of it.
        """

    def list(self, prefix: str = "") -> builtins.list[Stored]:
        """Every object below the folder `prefix`, sorted by key. A folder that is not there is empty."""

    def delete(self, key: str) -> None:
        """Remove `key`; one that is not there is no error. A versioned bucket hides it behind a marker."""

    def probe(self) -> None:
        """Prove with a real write that this store never overwrites; leaves nothing behind.

        Raises:
            NotFoundError: the bucket does not exist.
            RefusedError: forbidden, unreachable, or a second create was let through.
        """


def check_key(key: str) -> str:
    """`key`, if it is a plain relative path that means the same on every store.

    Raises:
        ConfigError: it is absolute, too long, reserved, or has odd characters or empty, `.` or `..` segments.
    """
    segments = key.split("/")
    if any(segment in ("", ".", "..") for segment in segments):
        raise ConfigError(f"store key {key!r} must be a relative path without empty, '.' or '..' segments")
    if not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise ConfigError(f"store key {key!r} may only hold letters, digits, spaces and . _ - = + @ , between slashes")
    if segments[0] == RESERVED:
        raise ConfigError(f"store key {key!r} starts with {RESERVED}/, which the store keeps for itself")
    if len(key) > _MAX_KEY_BYTES:
        raise ConfigError(f"store key {key[:40]!r}... has {len(key)} bytes, expected at most {_MAX_KEY_BYTES}")
    return key


def is_key(key: str) -> bool:
    """Whether `check_key` lets it pass; a listing also shows what others have put into a folder or a bucket."""
    try:
        check_key(key)
    except ConfigError:
        return False
    return True


def check_prefix(prefix: str) -> str:
    """`prefix` without its trailing slash; empty means the whole store.

    Raises:
        ConfigError: as for `check_key`.
    """
    stripped = prefix.rstrip("/")
    return check_key(stripped) if stripped else ""

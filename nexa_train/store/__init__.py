"""Where bytes rest: one small contract (`Store`) over a folder, an S3 bucket or memory.

Before: `nexa_train.artifact` decides which objects a checkpoint consists of. After: nothing; a store is the
last stage. `open_store` is the only way in; it imports a storage client when a store of that kind is opened.
"""

from __future__ import annotations

import os

from nexa_train.errors import ConfigError
from nexa_train.store import address
from nexa_train.store.base import Opened, Store, Stored

SUPPORTED = "a folder, file:///FOLDER, s3://BUCKET/PREFIX, memory://NAME"


def open_store(uri: str | os.PathLike[str]) -> Store:
    """The store that `uri` names; nothing is read or written until it is used.

    Raises:
        ConfigError: the scheme is not supported or the address is incomplete.
    """
    text = os.fspath(uri)
    named = address.parse(text)
    if named.is_local:
        return _local(named.path)
    match named.scheme:
        case "memory" if named.host:
            return _memory(named.host + named.path.rstrip("/"))
        case "s3" if named.host:
            return _s3(named.host, named.path.strip("/"))
    raise ConfigError(f"artifact store {text!r} is not supported; expected {SUPPORTED}")


def _local(folder: str) -> Store:
    from nexa_train.store.local import LocalStore  # noqa: PLC0415 - each kind loads its own client

    if not folder:
        raise ConfigError(f"artifact store '' is not supported; expected {SUPPORTED}")
    return LocalStore(address.local_path(folder))


def _memory(name: str) -> Store:
    from nexa_train.store.memory import MemoryStore  # noqa: PLC0415 - each kind loads its own client

    return MemoryStore.named(name)


def _s3(bucket: str, prefix: str) -> Store:
    from nexa_train.store.s3 import S3Store  # noqa: PLC0415 - obstore takes 40 ms to import

    return S3Store(bucket, prefix=prefix)


__all__ = ["Opened", "Store", "Stored", "open_store"]

"""A store in a folder of this machine (or of a shared file system): the embedded default, no server.

Before: `open_store("artifacts")`. After: nothing. An object is written to a temporary file, synced, and then
given its name with a hard link, which fails if the name is taken: so nothing is ever overwritten, and a crash
at any moment leaves either no object or a whole one. Who writes a temporary file holds a lock on it, which ends with
the process: so what a killed writer left is known, and `probe` removes it.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import fcntl
import io
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NoReturn

from nexa_train.errors import AlreadyExistsError, NotFoundError, RefusedError
from nexa_train.store.base import RESERVED, Opened, Stored, check_key, check_prefix

# A concurrent delete may prune the folder between making it and linking into it; where locks do not reach other
# machines, a probe there may take a temporary file for one that was left behind.
_LINK_ATTEMPTS = 100
_CHUNK_BYTES = 1 << 20


class LocalStore:
    """A folder with the contract of `Store`. The folder is made by the first write."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.uri = str(self.root)

    def __repr__(self) -> str:
        return f"LocalStore({self.uri!r})"

    def create(self, key: str, source: bytes | Path) -> Stored:
        """See `Store.create`."""
        return self._create(check_key(key), source)

    def open(self, key: str, *, version_id: str | None = None) -> Opened:
        """See `Store.open`; a folder keeps no versions, so `version_id` makes no difference."""
        check_key(key)
        try:
            raw = (self.root / key).open("rb", buffering=0)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as exc:
            raise NotFoundError(f"{key} is not in {self.uri}") from exc
        except OSError as exc:
            self._refuse("read", key, exc)
        return Opened(_File(self, key, raw), stored=Stored(key=key, size=os.fstat(raw.fileno()).st_size))

    def list(self, prefix: str = "") -> builtins.list[Stored]:
        """See `Store.list`."""
        folder = self.root / check_prefix(prefix)
        try:
            found = [stored for path in _files(folder, skip=self.root / RESERVED) if (stored := self._stored(path))]
        except OSError as exc:
            self._refuse("list", prefix or ".", exc)
        return sorted(found, key=lambda stored: stored.key)

    def delete(self, key: str) -> None:
        """See `Store.delete`; folders left empty go too."""
        self._delete(check_key(key))

    def probe(self) -> None:
        """See `Store.probe`; also proves that this file system has hard links, and removes what killed writers left."""
        self._sweep()
        key = f"{RESERVED}/probe/{secrets.token_hex(8)}"
        self._create(key, b"first")
        try:
            self._create(key, b"second")
        except AlreadyExistsError:
            return
        finally:
            self._delete(key)
        raise RefusedError(f"{self.uri} let a second create through: checkpoints there would not be safe")

    def _create(self, key: str, source: bytes | Path) -> Stored:
        target = self.root / key
        try:
            for _ in range(_LINK_ATTEMPTS):
                with self._temporary() as (temporary, file):
                    if os.fstat(file.fileno()).st_nlink == 0:
                        continue  # a probe took it for one that was left behind, before it was locked
                    size = _fill(file, source)
                    if _link(temporary, target):
                        return Stored(key=key, size=size)
            raise FileNotFoundError(errno.ENOENT, "what is written there is deleted again and again", str(target))
        except FileExistsError as exc:
            raise AlreadyExistsError(f"{key} already exists in {self.uri}; nothing was overwritten") from exc
        except OSError as exc:
            self._refuse("write", key, exc)

    def _delete(self, key: str) -> None:
        path = self.root / key
        try:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                _sync_folder(path.parent)
        except NotADirectoryError:
            return
        except OSError as exc:
            self._refuse("delete", key, exc)
        _prune(path.parent, stop=self.root)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[Path, IO[bytes]]]:
        """An empty file under a name of its own, locked."""
        self._temporaries.mkdir(parents=True, exist_ok=True)
        path = self._temporaries / secrets.token_hex(16)
        try:
            with path.open("xb") as file:
                with contextlib.suppress(OSError):  # a file system without locks is not swept either
                    fcntl.flock(file, fcntl.LOCK_EX)
                yield path, file
        finally:
            path.unlink(missing_ok=True)

    @property
    def _temporaries(self) -> Path:
        return self.root / RESERVED / "tmp"

    def _sweep(self) -> None:
        """Remove the temporary files that nobody writes any more."""
        temporaries: builtins.list[Path] = []
        with contextlib.suppress(OSError):
            temporaries = builtins.list(_files(self._temporaries, skip=Path()))
        for path in temporaries:
            with contextlib.suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    def _stored(self, path: Path) -> Stored | None:
        with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
            return Stored(key=path.relative_to(self.root).as_posix(), size=path.stat().st_size)
        return None

    def _refuse(self, action: str, key: str, exc: OSError) -> NoReturn:
        reason = exc.strerror or str(exc)
        raise RefusedError(
            f"cannot {action} {key} in {self.uri}: {reason}; check the folder's owner, space and type"
        ) from exc


class _File(io.RawIOBase):
    """The bytes of one object as a raw stream; a disk that fails meanwhile is the store's refusal, and no damage."""

    def __init__(self, store: LocalStore, key: str, raw: io.FileIO) -> None:
        self._store, self._key, self._raw = store, key, raw

    def readable(self) -> bool:
        """Always: this is what the stream is for."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer` with what comes next."""
        try:
            return self._raw.readinto(buffer)
        except OSError as exc:
            self._store._refuse("read", self._key, exc)

    def close(self) -> None:
        """See `io.IOBase.close`."""
        self._raw.close()
        super().close()


def _files(folder: Path, *, skip: Path) -> Iterator[Path]:
    def refuse(exc: OSError) -> None:
        if not isinstance(exc, FileNotFoundError | NotADirectoryError):  # pruned, or never there
            raise exc  # or checkpoints that cannot be listed would pass for none

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if Path(parent, name) != skip]
        yield from (Path(parent, name) for name in names)


def _fill(file: IO[bytes], source: bytes | Path) -> int:
    """Write all of `source` into the open file and have it on the disk; its size.

    Not by name: what is locked, written, synced and measured must be the file that gets the object's name.
    """
    if isinstance(source, Path):
        with source.open("rb") as read:
            shutil.copyfileobj(read, file, _CHUNK_BYTES)
    else:
        file.write(source)
    file.flush()
    os.fsync(file.fileno())
    return os.fstat(file.fileno()).st_size


def _link(temporary: Path, target: Path) -> bool:
    """Give `temporary` its name; False if it or the folder was deleted meanwhile."""
    try:
        _make_folder(target.parent)
        os.link(temporary, target)
    except FileNotFoundError:
        return False
    _sync_folder(target.parent)
    return True


def _make_folder(folder: Path) -> None:
    """Like `mkdir -p`, with each new name made durable, or a power cut could take a commit with it."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        # One look, or a folder that a concurrent delete prunes and another write makes again would pass for a file.
        # Not found is no answer about the object: `_link` tries again.
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "a file is in the way of a folder", str(folder)) from None
        return
    _sync_folder(folder.parent)


def _prune(folder: Path, *, stop: Path) -> None:
    while folder != stop and folder.is_relative_to(stop):
        try:
            folder.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return  # not empty: somebody else's objects
        folder = folder.parent


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return  # pruned by a concurrent delete, so there is nothing to make durable
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A store in a folder of this machine (or of a shared file system): the embedded default, no server.

Before: `open_store("artifacts")`. After: nothing. An object is written to a temporary file, synced, and then
given its name with a hard link, which fails if the name is taken: so nothing is ever overwritten, and a crash
at any moment leaves either no object or a whole one.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from nexa_train.errors import AlreadyExistsError, NotFoundError, RefusedError
from nexa_train.store.base import RESERVED, Opened, Stored, check_key, check_prefix

# A concurrent delete may prune the folder between making it and linking into it.
_LINK_ATTEMPTS = 100


class LocalStore:
    """A folder with the contract of `Store`. The folder is made by the first write."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root.expanduser()))
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
        return Opened(raw, stored=Stored(key=key, size=os.fstat(raw.fileno()).st_size))

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
        """See `Store.probe`; also proves that this file system has hard links."""
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
            with self._temporary(source) as temporary:
                _link(temporary, target)
                return Stored(key=key, size=temporary.stat().st_size)
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
    def _temporary(self, source: bytes | Path) -> Iterator[Path]:
        folder = self.root / RESERVED / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / secrets.token_hex(16)
        try:
            if isinstance(source, Path):
                shutil.copyfile(source, path)
            else:
                path.write_bytes(source)
            _sync_file(path)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _stored(self, path: Path) -> Stored | None:
        with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
            return Stored(key=path.relative_to(self.root).as_posix(), size=path.stat().st_size)
        return None

    def _refuse(self, action: str, key: str, exc: OSError) -> NoReturn:
        reason = exc.strerror or str(exc)
        raise RefusedError(
            f"cannot {action} {key} in {self.uri}: {reason}; check the folder's owner, space and type"
        ) from exc


def _files(folder: Path, *, skip: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(parent, name) != skip]
        yield from (Path(parent, name) for name in names)


def _link(temporary: Path, target: Path) -> None:
    for _ in range(_LINK_ATTEMPTS):
        try:
            _make_folder(target.parent)
            os.link(temporary, target)
        except FileNotFoundError:
            continue
        return _sync_folder(target.parent)
    raise FileNotFoundError(2, "the folder is deleted again and again while it is written to", str(target.parent))


def _make_folder(folder: Path) -> None:
    """Like `mkdir -p`, with each new name made durable, or a power cut could take a commit with it."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if folder.is_dir():
            return
        # A concurrent delete pruned it in between, which is no answer about the object: `_link` tries again.
        if folder.exists():
            raise NotADirectoryError(errno.ENOTDIR, "a file is in the way of a folder", str(folder)) from None
        raise FileNotFoundError(errno.ENOENT, "the folder was deleted", str(folder)) from None
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


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return  # pruned by a concurrent delete, so there is nothing to make durable
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

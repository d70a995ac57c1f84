"""Writing checkpoints and finding them again.

Before: `nexa_train.checkpoint` has the files on disk and a `ManifestDraft`. After: `nexa_train.store` holds
them. Bytes go first, each object created only if absent, under a folder of this attempt alone; the manifest
goes last and is the commit. So an attempt that was thought dead can never touch what its successor committed,
and a crash leaves either a whole checkpoint or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nexa_train.artifact.manifest import (
    MANIFEST_NAME,
    RUN_NAME,
    FileEntry,
    Manifest,
    ManifestDraft,
    canonical_json,
    check_path,
    parse_step_folder,
    run_folder,
    step_folder,
)
from nexa_train.errors import (
    AlreadyExistsError,
    ConfigError,
    DamagedError,
    NotFoundError,
    SupersededError,
)
from nexa_train.store.base import Store, Stored

_RUN_SCHEMA = "1.0"
_CHUNK_BYTES = 1 << 20
# Hashing a file takes one core; more threads than this only queue at the disk or the network.
_THREADS = min(8, 2 * (os.cpu_count() or 1))

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A checkpoint that is there: its manifest, the digest of that, and the manifest's key in the store."""

    manifest: Manifest
    digest: str
    key: str

    @property
    def folder(self) -> str:
        """The step's folder, relative to the store."""
        return self.key.rpartition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The newest checkpoint whose every byte is right, and what is wrong with newer ones, newest first."""

    committed: Committed | None
    damaged: list[str]


def claim_run(
    store: Store, run_id: str, identity: Mapping[str, Any], *, frozen: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Make `run_id` stand for `identity`, for good, or find that it does already.

    Args:
        identity: what must be equal for two attempts to be one run.
        frozen: what the first attempt found out and every later one must use: the resolved microbatch.

    Returns:
        The identity with the frozen values of whoever came first.

    Raises:
        ConfigError: the run id stands for another identity; names the keys that differ.
    """
    key = f"{run_folder(run_id)}/{RUN_NAME}"
    document = {
        "schema_version": _RUN_SCHEMA,
        "run_id": run_id,
        "identity": dict(identity),
        "frozen": dict(frozen or {}),
    }
    content = canonical_json(document)
    try:
        store.create(key, content)
    except AlreadyExistsError:
        content = _read(store, key)
    first = _run_document(content, key=key)
    _check_same_identity(run_id, stored=first["identity"], given=json.loads(canonical_json(identity)))
    return {**first["frozen"], **first["identity"]}


class Publisher:
    """Commits the checkpoints of one attempt at one run.

    Safe to call again for a step that failed half-way: what is there already and is ours counts as written.
    """

    def __init__(self, store: Store, run_id: str, attempt: str) -> None:
        self._store = store
        self._run_id = run_id
        # Two attempts may bear one name (a pod started twice); the nonce still keeps their bytes apart.
        self._writer = check_path(f"{attempt}-{secrets.token_hex(4)}")
        run_folder(run_id)

    def publish(self, step: int, files: Mapping[str, Path], draft: ManifestDraft) -> Committed:
        """Upload `files` (logical path to file on disk), then commit them with the manifest.

        Raises:
            SupersededError: another attempt committed this step with other content.
            RefusedError: the store said no; nothing was committed.
            ValueError: the draft or a path is not valid; nothing was uploaded.
        """
        folder = step_folder(self._run_id, step)
        for path in files:
            check_path(path)
        entries = _parallel(lambda item: self._upload(folder, *item), sorted(files.items()))
        manifest = draft.complete(run_id=self._run_id, step=step, files=entries)
        key = f"{folder}/{MANIFEST_NAME}"
        self._commit(key, manifest)
        return Committed(manifest=manifest, digest=manifest.digest, key=key)

    def _upload(self, folder: str, path: str, source: Path) -> FileEntry:
        relative = f"data/{self._writer}/{path}"
        with source.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        key = f"{folder}/{relative}"
        try:
            stored = self._store.create(key, source)
        except AlreadyExistsError:
            stored = self._own(key, sha256)
        return FileEntry(path=path, object=relative, size=stored.size, sha256=sha256, version_id=stored.version_id)

    def _own(self, key: str, sha256: str) -> Stored:
        """What an earlier call of this very publisher wrote: nobody else knows the nonce."""
        with self._store.open(key) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != sha256:
                raise DamagedError(f"{key} holds sha256 {found}, expected {sha256}: the file changed between tries")
            return stream.stored

    def _commit(self, key: str, manifest: Manifest) -> None:
        content = manifest.to_bytes()
        try:
            self._store.create(key, content)
        except AlreadyExistsError as exc:
            winner = _read(self._store, key)
            if winner != content:
                raise SupersededError(
                    f"step {manifest.step} of {manifest.run_id} was committed by another attempt "
                    f"(manifest {hashlib.sha256(winner).hexdigest()}, ours {manifest.digest}); end this one"
                ) from exc


def read_manifest(store: Store, folder: str) -> Committed:
    """The checkpoint committed in `folder`, which is what `step_folder` gives. Reads no data.

    An empty folder reads the manifest at the root of the store: a checkpoint copied out of its place.

    Raises:
        NotFoundError: nothing is committed there.
        DamagedError: the manifest is not valid, not canonical, or belongs elsewhere.
        ConfigError: it was written by a later major version of Nexa.
    """
    place = folder.strip("/")
    key = f"{place}/{MANIFEST_NAME}".lstrip("/")
    content = _read(store, key)
    try:
        manifest = Manifest.from_bytes(content)
    except DamagedError as exc:
        raise DamagedError(f"{key} in {store.uri}: {exc}") from exc
    if place and place != manifest.folder:
        raise DamagedError(f"{key} in {store.uri} is the manifest of {manifest.folder}: it was moved or copied")
    return Committed(manifest=manifest, digest=hashlib.sha256(content).hexdigest(), key=key)


def manifest_uri(store: Store, run_id: str, step: int) -> str:
    """Where the manifest of a step is, for people and for `verify`."""
    return f"{store.uri.rstrip('/')}/{step_folder(run_id, step)}/{MANIFEST_NAME}"


def committed_folders(store: Store, run_id: str) -> list[str]:
    """The folders of the run that hold a manifest, oldest step first. What has none does not exist."""
    names = (stored.key.rpartition("/") for stored in store.list(run_folder(run_id)))
    steps = {folder: parse_step_folder(folder) for folder, _, name in names if name == MANIFEST_NAME}
    committed = {folder: parsed[1] for folder, parsed in steps.items() if parsed}
    return sorted(committed, key=lambda folder: committed[folder])


def newest_valid(store: Store, run_id: str, *, set_aside: bool = False) -> Found:
    """The newest checkpoint of the run that is whole, every byte of it read and checked.

    Args:
        set_aside: rename the manifests of damaged newer ones to `damaged-DIGEST.json`, so that the steps can
            be committed again. For the one who resumes the run, not for those who look.

    Raises:
        RefusedError: the store could not be read: that says nothing about the checkpoints.
        ConfigError: a manifest was written by a later major version of Nexa.
    """
    damaged: list[str] = []
    for folder in reversed(committed_folders(store, run_id)):
        try:
            committed = read_manifest(store, folder)
            for problem in check_files(store, committed):
                raise DamagedError(problem)
        except NotFoundError:
            continue  # deleted since it was listed
        except DamagedError as exc:
            damaged.append(str(exc))
            if set_aside:
                _set_aside(store, folder)
        else:
            return Found(committed=committed, damaged=damaged)
    return Found(committed=None, damaged=damaged)


def check_files(store: Store, committed: Committed) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each; empty if every byte is as committed."""
    entries = committed.manifest.files
    found = _parallel(lambda entry: _problem(lambda: _hash(store, committed, entry)), entries)
    return [problem for problem in found if problem]


def fetch(store: Store, committed: Committed, into: Path) -> Path:
    """Download every file of a checkpoint below `into`, checked on the way, and return `into`.

    A file gets its name only when its bytes are right.

    Raises:
        DamagedError: a file has another size or sha256 than the manifest says.
        NotFoundError: an object, or the version of it that was committed, is gone.
    """
    into.mkdir(parents=True, exist_ok=True)
    _parallel(lambda entry: _download(store, committed, entry, into), committed.manifest.files)
    return into


def apply_retention(store: Store, run_id: str, keep_last: int) -> list[int]:
    """Delete all but the newest `keep_last` checkpoints, oldest first, and return the steps that went.

    A manifest goes before its data: a crash in between leaves no checkpoint that lacks bytes.

    Raises:
        ConfigError: `keep_last` is less than one, which would delete the newest.
    """
    if keep_last < 1:
        raise ConfigError(f"keep_last is {keep_last}, expected at least 1: the newest checkpoint always stays")
    surplus = committed_folders(store, run_id)[:-keep_last]
    for folder in surplus:
        store.delete(f"{folder}/{MANIFEST_NAME}")
        _parallel(lambda stored: store.delete(stored.key), store.list(folder))
    return [parsed[1] for folder in surplus if (parsed := parse_step_folder(folder))]


def _read(store: Store, key: str) -> bytes:
    with store.open(key) as stream:
        return stream.read()


def _run_document(content: bytes, *, key: str) -> dict[str, Any]:
    try:
        document = json.loads(content)
        if document["schema_version"].partition(".")[0] != _RUN_SCHEMA.partition(".")[0]:
            raise ConfigError(f"{key} has schema version {document['schema_version']}: use a later nexa")
        return {"identity": dict(document["identity"]), "frozen": dict(document["frozen"])}
    except (ValueError, TypeError, KeyError, AttributeError) as exc:
        raise DamagedError(f"{key} is not the identity of a run: {exc!r}") from exc


def _check_same_identity(run_id: str, *, stored: dict[str, Any], given: dict[str, Any]) -> None:
    if differences := sorted(_differences(stored, given)):
        shown = "; ".join(differences[:10]) + ("; ..." if len(differences) > 10 else "")
        raise ConfigError(
            f"run id {run_id} exists with another config: {shown}; take another --run-name or the config it began with"
        )


def _differences(stored: Any, given: Any, at: str = "") -> Iterable[str]:
    if isinstance(stored, dict) and isinstance(given, dict):
        for name in stored.keys() | given.keys():
            inner = f"{at}.{name}" if at else name
            yield from _differences(stored.get(name, _ABSENT), given.get(name, _ABSENT), inner)
    elif stored != given or type(stored) is not type(given):
        yield f"{at} was {_shown(stored)}, is {_shown(given)}"


_ABSENT = object()


def _shown(value: object) -> str:
    return "not set" if value is _ABSENT else json.dumps(value, ensure_ascii=False)[:80]


def _parallel(call: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return list(pool.map(call, items))


def _problem(check: Callable[[], None]) -> str | None:
    try:
        check()
    except (DamagedError, NotFoundError) as exc:
        return str(exc)
    return None


def _hash(store: Store, committed: Committed, entry: FileEntry) -> None:
    _copy(store, committed, entry, write=lambda chunk: None)


def _download(store: Store, committed: Committed, entry: FileEntry, into: Path) -> None:
    target = into / entry.path
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            _copy(store, committed, entry, write=file.write)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _copy(store: Store, committed: Committed, entry: FileEntry, *, write: Callable[[bytes], object]) -> None:
    """Read one file in the version that was committed, length and hash checked together."""
    name = f"{entry.path} of {committed.manifest.folder} in {store.uri}"
    digest, size = hashlib.sha256(), 0
    key = f"{committed.folder}/{entry.object}".lstrip("/")
    with store.open(key, version_id=entry.version_id) as stream:
        if stream.stored.size != entry.size:
            raise DamagedError(f"{name} has {stream.stored.size} bytes, expected {entry.size}")
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            write(chunk)
    if size != entry.size or digest.hexdigest() != entry.sha256:
        raise DamagedError(f"{name} has sha256 {digest.hexdigest()}, expected {entry.sha256}")


def _set_aside(store: Store, folder: str) -> None:
    key = f"{folder}/{MANIFEST_NAME}"
    content = _read(store, key)
    with contextlib.suppress(AlreadyExistsError):  # set aside before by one who did not live to delete it
        store.create(f"{folder}/damaged-{hashlib.sha256(content).hexdigest()}.json", content)
    store.delete(key)

"""Writing checkpoints and finding them again.

Before: `nexa_train.checkpoint` has the files on disk and a `ManifestDraft`. After: `nexa_train.store` holds
them. Bytes go first, each object created only if absent, under a folder of this attempt alone; the manifest
goes last and is the commit. So an attempt that was thought dead can never touch what its successor committed,
and a crash leaves either a whole checkpoint or none. `steps` says which name commits; `retention` deletes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nexa_train.artifact.manifest import (
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
from nexa_train.artifact.steps import StepState, manifest_name, step_state, step_states
from nexa_train.errors import (
    AlreadyExistsError,
    ConfigError,
    DamagedError,
    ForeignError,
    NotFoundError,
    RefusedError,
    SupersededError,
)
from nexa_train.store.base import Opened, Store, Stored, is_key

_RUN_SCHEMA = "1.0"
_CHUNK_BYTES = 1 << 20
# Hashing a file takes one core; more threads than this only queue at the disk or the network.
_THREADS = min(8, 2 * (os.cpu_count() or 1))
# Each further look means that another attempt has committed or deleted in the meantime.
_LOOKS = 50
# Characters of a value in an error.
_SHOWN = 80

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


def claimed(store: Store, run_id: str) -> dict[str, Any]:
    """The identity that `run_id` stands for; empty: none yet."""
    key = f"{run_folder(run_id)}/{RUN_NAME}"
    content = _read_or_nothing(store, key)
    return _run_document(content, key=key)["identity"] if content else {}


class Publisher:
    """Commits the checkpoints of one attempt at one run.

    Safe to call again for a step that failed half-way: what is there already and is ours counts as written.

    Args:
        nonce: the same on all ranks of an attempt, so that their files lie in one folder; None: a fresh one.
    """

    def __init__(self, store: Store, run_id: str, attempt: str, *, nonce: str | None = None) -> None:
        self.store = store
        self.run_id = run_id
        # Two attempts may bear one name (a pod started twice); the nonce still keeps their bytes apart.
        self._writer = check_path(f"{attempt}-{nonce or secrets.token_hex(4)}")
        self._given_up: dict[int, int] = {}
        run_folder(run_id)

    def resume(self, into: Path | None = None) -> Found:
        """The checkpoint to go on from; damaged newer ones are given up, so that this attempt can commit them anew.

        For the one who commits. A step that another attempt gives up from now on is closed to this one.

        Args:
            into: the folder that its files are downloaded to, checked on the way; None: they are checked alone.

        Raises:
            ForeignError: another run's checkpoint is in this run's place; nothing was given up.
            RefusedError: the store could not be read or written: that says nothing about the checkpoints.
            ConfigError: a manifest was written by a later major version of Nexa.
        """
        read = _fetching(self.store, into) if into else _checking(self.store)
        found, self._given_up = _look(self.store, self.run_id, read, give_up=True)
        return found

    def publish(self, step: int, files: Mapping[str, Path], draft: ManifestDraft) -> Committed:
        """Upload `files` (logical path to file on disk), then commit them with the manifest.

        Raises:
            SupersededError: another attempt committed this step with other content.
            RefusedError: the store said no; nothing was committed.
            ValueError: the draft or a path is not valid; nothing was uploaded.
        """
        for path in files:
            check_path(path)
        entries = parallel(lambda item: self.upload(step, *item), sorted(files.items()))
        return self.commit(step, entries, draft)

    def upload(self, step: int, path: str, source: bytes | Path, *, sha256: str | None = None) -> FileEntry:
        """Write one file of a step, which nobody sees before `commit`.

        Args:
            path: its logical name. sha256: of `source`, where that is known already.

        Raises:
            RefusedError: the store said no.
            ValueError: the path is not valid; nothing was uploaded.
        """
        relative = self._object(path)
        sha256 = sha256 or _sha256(source)
        key = f"{step_folder(self.run_id, step)}/{relative}"
        try:
            stored = self.store.create(key, source)
        except AlreadyExistsError:
            stored = self._own(key, sha256)
        return FileEntry(path=path, object=relative, size=stored.size, sha256=sha256, version_id=stored.version_id)

    def take_back(self, step: int, paths: Iterable[str]) -> None:
        """Delete what `upload` wrote of a step under these paths, where it did. Not once `commit` was called: whatever
        was answered, the step may have been committed.

        Raises:
            RefusedError: the store said no; what is left stays.
        """
        for path in paths:
            self.store.delete(f"{step_folder(self.run_id, step)}/{self._object(path)}")

    def _object(self, path: str) -> str:
        """Where a file's bytes are, from the step's folder."""
        return f"data/{self._writer}/{check_path(path)}"

    def commit(self, step: int, entries: Sequence[FileEntry], draft: ManifestDraft) -> Committed:
        """Make a step of what was uploaded: the manifest goes last.

        Raises:
            SupersededError: another attempt committed this step with other content, or gave it up.
            RefusedError: the store said no; nothing was committed.
            ValueError: the draft or an entry is not valid.
        """
        manifest = draft.complete(run_id=self.run_id, step=step, files=entries)
        generation = self._given_up.get(step, 0) + 1
        key, content = f"{manifest.folder}/{manifest_name(generation)}", manifest.to_bytes()
        digest = hashlib.sha256(content).hexdigest()
        self._create(key, manifest, content, digest)
        # The name may have been free because a successor went past it and has deleted what was there.
        if step_now(self.store, manifest.folder).generation > generation:
            raise SupersededError(f"{key} came too late: another attempt gave this step up; end this one")
        return Committed(manifest=manifest, digest=digest, key=key)

    def _own(self, key: str, sha256: str) -> Stored:
        """What an earlier call of this very publisher wrote: nobody else knows the nonce."""
        with self.store.open(key) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            if found != sha256:
                raise DamagedError(f"{key} holds sha256 {found}, expected {sha256}: the file changed between tries")
            return stream.stored

    def _create(self, key: str, manifest: Manifest, content: bytes, digest: str) -> None:
        try:
            self.store.create(key, content)
        except AlreadyExistsError as exc:
            winner = _read_or_nothing(self.store, key)
            if not winner:
                raise SupersededError(
                    f"step {manifest.step} of {manifest.run_id} was given up by another attempt, which has committed "
                    "a later one; end this one"
                ) from exc
            if winner != content:
                raise SupersededError(
                    f"step {manifest.step} of {manifest.run_id} was committed by another attempt "
                    f"(manifest {hashlib.sha256(winner).hexdigest()}, ours {digest}); end this one"
                ) from exc


def read_manifest(store: Store, folder: str) -> Committed:
    """The checkpoint committed in `folder`, which is what `step_folder` gives. Reads no data.

    An empty folder reads the manifest at the top of the store: a checkpoint copied out of its place.

    Raises:
        NotFoundError: nothing is committed there.
        DamagedError: the manifest is not valid, not canonical, or belongs elsewhere.
        ForeignError: it belongs to another run.
        ConfigError: it was written by a later major version of Nexa.
    """
    place = folder.strip("/")
    state = step_now(store, place)
    if not state.committed:
        raise NotFoundError(f"no checkpoint is committed at {place or '.'} in {store.uri}")
    return _read_manifest(store, state.key)


def _read_manifest(store: Store, key: str) -> Committed:
    content, place = _read(store, key), key.rpartition("/")[0]
    try:
        manifest = Manifest.from_bytes(content)
    except DamagedError as exc:
        raise DamagedError(f"{key} in {store.uri}: {exc}") from exc
    if odd := next((entry.object for entry in manifest.files if not is_key(entry.object)), ""):
        raise DamagedError(f"{key} in {store.uri}: nexa gives no object the name {odd!r}")
    if place and place != manifest.folder:
        said = f"{key} in {store.uri} is the manifest of {manifest.folder}"
        run_id, _ = parse_step_folder(place) or (manifest.run_id, 0)
        if run_id != manifest.run_id:
            raise ForeignError(
                f"{said}, expected one of run {run_id}: it was moved or copied; move it away, or take another "
                "--run-name or artifacts.uri"
            )
        raise DamagedError(f"{said}: it was moved or copied")
    return Committed(manifest=manifest, digest=hashlib.sha256(content).hexdigest(), key=key)


def manifest_uri(store: Store, committed: Committed) -> str:
    """Where the manifest of a checkpoint is, for people and for `verify`."""
    return f"{store.uri.rstrip('/')}/{committed.key}"


def committed_folders(store: Store, run_id: str) -> list[str]:
    """The folders of the run's committed checkpoints, oldest step first. What has no manifest does not exist."""
    return [state.folder for state in run_steps(store, run_id) if state.committed]


def run_steps(store: Store, run_id: str) -> list[StepState]:
    """Every step of the run that has an object, lowest first."""
    return [state for state in step_states(store.list(run_folder(run_id))) if state.number >= 0]


def newest_valid(store: Store, run_id: str) -> Found:
    """The newest checkpoint of the run that is whole, every byte of it read and checked. Changes nothing.

    Raises:
        ForeignError: another run's checkpoint is in this run's place.
        RefusedError: the store could not be read: that says nothing about the checkpoints.
        ConfigError: a manifest was written by a later major version of Nexa.
    """
    return _look(store, run_id, _checking(store), give_up=False)[0]


_Read = Callable[[Committed], None]
"""Reads every byte of a checkpoint; raises DamagedError or NotFoundError where one is not as committed."""


class _Moved(Exception):
    """A step is no longer what the listing said: another attempt commits or deletes at this moment."""


def _checking(store: Store) -> _Read:
    def check(committed: Committed) -> None:
        for problem in check_files(store, committed):
            raise DamagedError(problem)

    return check


def _fetching(store: Store, into: Path) -> _Read:
    def download(committed: Committed) -> None:
        shutil.rmtree(into, ignore_errors=True)
        fetch(store, committed, into)

    return download


def _look(store: Store, run_id: str, read: _Read, *, give_up: bool) -> tuple[Found, dict[int, int]]:
    """The newest checkpoint that `read` finds whole, and how many names of each later step are used up."""
    for _ in range(_LOOKS):
        with contextlib.suppress(_Moved):  # then only a new listing says what is the newest
            return _look_once(store, run_steps(store, run_id), read, give_up=give_up)
    raise RefusedError(
        f"the checkpoints of {run_id} in {store.uri} changed {_LOOKS} times while they were read: end other attempts"
    )


def _look_once(store: Store, steps: Sequence[StepState], read: _Read, *, give_up: bool) -> tuple[Found, dict[int, int]]:
    damaged: list[str] = []
    later: list[StepState] = []
    found = None
    for step in reversed(steps):
        if step.committed:
            problem, found = _examine(store, step, read)
            if found:
                break
            damaged.append(problem)
        later.append(step)
    # Only now: where a checkpoint is refused, nothing has been touched.
    used = {step.number: _give_up(store, step) if give_up and step.committed else step.generation for step in later}
    return Found(committed=found, damaged=damaged), used


def _examine(store: Store, step: StepState, read: _Read) -> tuple[str, Committed | None]:
    try:
        committed = _read_manifest(store, step.key)
        read(committed)
    except ForeignError:
        raise
    except (DamagedError, NotFoundError) as exc:
        _check_unmoved(store, step)
        return str(exc), None
    return "", committed


def still_there(store: Store, committed: Committed) -> bool:
    """Whether a checkpoint is committed still: one that retention deletes while it is read is not damaged."""
    return not committed.folder or step_now(store, committed.folder).key == committed.key


def _check_unmoved(store: Store, step: StepState) -> None:
    now = step_now(store, step.folder)
    if (now.generation, now.committed) != (step.generation, step.committed):
        raise _Moved


def step_now(store: Store, folder: str) -> StepState:
    return step_state(folder, store.list(folder))


def _give_up(store: Store, step: StepState) -> int:
    """Take the name after a damaged manifest's, and keep that as evidence under another."""
    content = _read_or_nothing(store, step.key)
    if not content:
        raise _Moved
    with contextlib.suppress(AlreadyExistsError):  # by one who did not live to do the rest
        store.create(f"{step.folder}/damaged-{hashlib.sha256(content).hexdigest()}.json", content)
    try:
        store.create(f"{step.folder}/{manifest_name(step.generation + 1)}", b"")
    except AlreadyExistsError:
        raise _Moved from None
    store.delete(step.key)
    return step.generation + 1


def check_files(store: Store, committed: Committed) -> list[str]:
    """What is wrong with the files of a checkpoint, one line each; empty if every byte is as committed."""
    entries = committed.manifest.files
    found = parallel(lambda entry: _problem(lambda: _hash(store, committed, entry)), entries)
    return [problem for problem in found if problem]


def fetch(store: Store, committed: Committed, into: Path) -> Path:
    """Download every file of a checkpoint below `into`, checked on the way, and return `into`.

    A file gets its name only when its bytes are right.

    Raises:
        DamagedError: a file has another size or sha256 than the manifest says.
        NotFoundError: an object, or the version of it that was committed, is gone.
    """
    into.mkdir(parents=True, exist_ok=True)
    parallel(lambda entry: _download(store, committed, entry, into), committed.manifest.files)
    return into


def _sha256(source: bytes | Path) -> str:
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(store: Store, key: str) -> bytes:
    with store.open(key) as stream:
        return stream.read()


def _read_or_nothing(store: Store, key: str) -> bytes:
    try:
        return _read(store, key)
    except NotFoundError:  # deleted since, by a successor that went past it
        return b""


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
    if value is _ABSENT:
        return "not set"
    text = json.dumps(value, ensure_ascii=False)
    # Its end is kept: that of a model or a data set is its digest, after a path.
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]}"


def parallel(call: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
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
    """Read one file, in the version that was committed where that is there, length and hash checked together."""
    name = f"{entry.path} of {committed.manifest.folder} in {store.uri}"
    digest, size = hashlib.sha256(), 0
    key = f"{committed.folder}/{entry.object}".lstrip("/")
    with _opened(store, key, entry.version_id) as stream:
        if stream.stored.size != entry.size:
            raise DamagedError(f"{name} has {stream.stored.size} bytes, expected {entry.size}")
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            write(chunk)
    if size != entry.size or digest.hexdigest() != entry.sha256:
        raise DamagedError(f"{name} has sha256 {digest.hexdigest()}, expected {entry.sha256}")


def _opened(store: Store, key: str, version_id: str | None) -> Opened:
    """A version says where to look first, the hash what was found: in a copy of a bucket versions have other names."""
    if version_id is None:
        return store.open(key)
    try:
        return store.open(key, version_id=version_id)
    except NotFoundError:
        return store.open(key)

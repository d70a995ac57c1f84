"""What a checkpoint is: a manifest that names every file with its size and sha256. Pure values.

Before: the trainer fills a `ManifestDraft`. After: `artifact.publish` adds the files and writes the manifest
last, which is the commit. No clock, environment, logger or client here: the operator imports this module too.

A manifest is canonical JSON (sorted keys, no spaces, UTF-8, finite numbers), so equal content means equal
bytes, and the sha256 of those bytes is the artifact's name.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from nexa_train.errors import ConfigError, DamagedError

SCHEMA_VERSION = "1.0"
MANIFEST_NAME = "manifest.json"
RUN_NAME = "run.json"
CHECKPOINTS = "checkpoints"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"(\d+)\.(\d+)")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_STEP = re.compile(r"step-(\d{8,18})")
_MAX_DEPTH = 64
_LONGEST_PLACE = 80
_ATOMS = frozenset({type(None), bool, int})
"""Fit as they are, so a list or dict spares a call for each."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


def canonical_json(obj: object) -> bytes:
    """The one way to write `obj` as JSON: keys sorted by code point, no spaces, UTF-8, no NaN or Infinity.

    Raises:
        ValueError: a number is not finite, a key is not a string, or a value has no JSON form.
    """
    return _written(_plain(obj, at="$"))


def _written(plain: object) -> bytes:
    return json.dumps(plain, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def digest_of(obj: object) -> str:
    """sha256 of the canonical JSON of `obj`, in hex.

    Raises:
        ValueError: as for `canonical_json`.
    """
    return hashlib.sha256(canonical_json(obj)).hexdigest()


def run_folder(run_id: str) -> str:
    """`checkpoints/RUN_ID`, the folder of one run.

    Raises:
        ConfigError: the run id is no plain name.
    """
    if not _is_run_id(run_id):
        raise ConfigError(
            f"run id {run_id!r} must be 1 to 128 letters, digits, '.', '_' or '-', begin with a letter or a "
            f"digit, and not be {CHECKPOINTS!r}"
        )
    return f"{CHECKPOINTS}/{run_id}"


def step_folder(run_id: str, step: int) -> str:
    """`checkpoints/RUN_ID/step-00000050`, the folder of one checkpoint; padded, so that names sort by step.

    Raises:
        ConfigError: the run id is no plain name, or the step is negative.
    """
    if step < 0:
        raise ConfigError(f"step {step} is negative")
    return f"{run_folder(run_id)}/step-{step:08d}"


def parse_step_folder(folder: str) -> tuple[str, int] | None:
    """The run id and step that `step_folder` made `folder` from; None for any other name."""
    segments = folder.strip("/").split("/")
    if len(segments) != 3 or segments[0] != CHECKPOINTS or not _is_run_id(segments[1]):
        return None
    match = _STEP.fullmatch(segments[2])
    if not match or segments[2] != f"step-{int(match.group(1)):08d}":
        return None
    return segments[1], int(match.group(1))


def check_path(path: str) -> str:
    """`path`, if it is relative, in normal form and stays inside its folder.

    Raises:
        ValueError: it is absolute or has an empty, `.` or `..` segment, a backslash or a control character.
    """
    if any(segment in ("", ".", "..") for segment in path.split("/")) or _CONTROL.search(path):
        raise ValueError(f"path {path!r} must be relative, without empty, '.' or '..' segments or odd characters")
    return path


def _is_run_id(name: str) -> bool:
    return bool(_RUN_ID.fullmatch(name)) and name != CHECKPOINTS


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint.

    Attributes:
        path: its logical name, as in "model.safetensors": what a reader sees.
        object: where its bytes are, relative to the step's folder: "data/ATTEMPT-NONCE/model.safetensors".
        size: bytes.
        sha256: of its bytes, in hex.
        version_id: the version that was committed, on a versioned bucket.
        extra: fields of a later minor version, kept as they are.
    """

    path: str
    object: str
    size: int
    sha256: str
    version_id: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "extra", _copied(self.extra, dict, at="files[].extra"))
        check_path(self.path)
        check_path(self.object)
        if type(self.size) is not int or self.size < 0:
            raise ValueError(f"size of {self.path!r} is {self.size!r}, expected a number of bytes")
        _check_sha256(self.sha256, f"sha256 of {self.path!r}")

    def to_dict(self) -> dict[str, Any]:
        """As in the manifest."""
        return {
            **_plain(self.extra, at="files[]"),
            "path": self.path,
            "object": self.object,
            "size": self.size,
            "sha256": self.sha256,
            "version_id": self.version_id,
        }

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> FileEntry:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing or of the wrong kind.
        """
        kinds: dict[str, type] = {"path": str, "object": str, "size": int, "sha256": str, "version_id": str}
        if entry.get("version_id") is None:
            del kinds["version_id"]
        _check_kinds(entry, kinds, at="files[]")
        own = {"path", "object", "size", "sha256", "version_id"}
        return cls(
            path=entry["path"],
            object=entry["object"],
            size=entry["size"],
            sha256=entry["sha256"],
            version_id=entry.get("version_id"),
            extra={name: entry[name] for name in entry if name not in own},
        )


@dataclass(frozen=True, kw_only=True)
class ManifestDraft:
    """All of a manifest that the trainer knows before a byte is uploaded.

    Every section is copied on the way in, so a later change to the caller's dict changes nothing here.

    Attributes:
        config: the resolved description of the job.
        weights_digest: sha256 over the weights, in hex: equal for equal weights, whatever the files.
        parent: digest of the manifest this step was trained from; None for the first.
        metrics: loss, perplexity, validation_loss and the like; finite numbers.
        dataset: uri, version, digest, rows, dropped, truncated.
        code: revision, digest of uncommitted changes, package versions, image digest.
        world: ranks, microbatch, threads, processor, backend, precision.
        cursor: how far in the data: samples.
        logs: what was measured on the way.
        extra: fields of a later minor version, kept as they are.
    """

    config: Mapping[str, Any]
    weights_digest: str | None = None
    parent: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    dataset: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, Any] = field(default_factory=dict)
    world: Mapping[str, Any] = field(default_factory=dict)
    cursor: Mapping[str, Any] = field(default_factory=dict)
    logs: Sequence[Any] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*_SECTIONS, "extra"):
            object.__setattr__(self, name, _copied(getattr(self, name), dict, at=name))
        object.__setattr__(self, "logs", _copied(self.logs, list, at="logs"))
        for name in ("weights_digest", "parent"):
            if (digest := getattr(self, name)) is not None:
                _check_sha256(digest, name)

    def complete(self, *, run_id: str, step: int, files: Sequence[FileEntry]) -> Manifest:
        """The manifest of this draft with its files.

        Raises:
            ValueError: two files have one path, or an extra field takes the name of one of ours.
        """
        known = {f.name: getattr(self, f.name) for f in fields(ManifestDraft)}
        return Manifest(run_id=run_id, step=step, files=tuple(files), **known)


@dataclass(frozen=True, kw_only=True)
class Manifest(ManifestDraft):
    """A committed checkpoint. Equal manifests have equal bytes and equal digests."""

    run_id: str
    step: int
    files: tuple[FileEntry, ...]
    schema_version: str = SCHEMA_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_major(self.schema_version)
        if type(self.step) is not int or parse_step_folder(self.folder) != (self.run_id, self.step):
            raise ValueError(f"run_id {self.run_id!r} and step {self.step!r} do not name a checkpoint")
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda entry: entry.path)))
        paths = [entry.path for entry in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError(f"two files have the path {next(p for p in paths if paths.count(p) > 1)!r}")
        if clash := set(self.extra) & _FIELDS:
            raise ValueError(f"extra field {min(clash)!r} takes the name of a field of the manifest")

    @property
    def config_digest(self) -> str:
        """sha256 of the resolved config, in hex."""
        return digest_of(self.config)

    @property
    def digest(self) -> str:
        """The artifact's name: sha256 of its canonical bytes, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def folder(self) -> str:
        """Where it belongs, relative to the store."""
        return f"{CHECKPOINTS}/{self.run_id}/step-{self.step:08d}"

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.size for entry in self.files)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; the inverse of `from_dict`."""
        document: dict[str, Any] = _plain(self._document(), at="$")
        return document

    def to_bytes(self) -> bytes:
        """The canonical JSON that is stored."""
        return _written(self._document())

    def _document(self) -> dict[str, Any]:
        """Not a copy: all in it was copied, and found to have a JSON form, on the way in."""
        known = {name: getattr(self, name) for name in _FIELDS - {"files", "config_digest"}}
        entries = [entry.to_dict() for entry in self.files]
        return {**self.extra, **known, "config_digest": self.config_digest, "files": entries}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Manifest:
        """The manifest that `to_dict` wrote. Unknown fields are kept; `document` is not changed.

        Raises:
            ConfigError: it was written by a later major version of Nexa.
            DamagedError: a field is missing, of the wrong kind, or contradicts another.
        """
        try:
            _check_major(document.get("schema_version"))
            return cls._from_checked(document)
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise DamagedError(f"the manifest is not valid: {exc}") from exc

    @classmethod
    def _from_checked(cls, document: Mapping[str, Any]) -> Manifest:
        kinds: dict[str, type] = {
            "run_id": str,
            "step": int,
            "config_digest": str,
            "logs": list,
            "files": list,
        }
        if missing := _FIELDS - set(document):
            raise ValueError(f"field {min(missing)!r} is missing")
        _check_kinds(document, kinds | dict.fromkeys(_SECTIONS, dict), at="manifest")
        values = {name: document[name] for name in _FIELDS - {"files", "config_digest"}}
        files = tuple(FileEntry.from_dict(entry) for entry in document["files"])
        extra = {name: document[name] for name in set(document) - _FIELDS}
        manifest = cls(**values, files=files, extra=extra)
        if manifest.config_digest != document["config_digest"]:
            raise ValueError(f"config_digest is {document['config_digest']}, but config has {manifest.config_digest}")
        return manifest

    @classmethod
    def from_bytes(cls, content: bytes) -> Manifest:
        """The manifest in `content`, which must be canonical: any other spelling would have another digest.

        Raises:
            ConfigError: it was written by a later major version of Nexa.
            DamagedError: it is no JSON, not canonical, or not valid.
        """
        try:
            document = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as exc:
            raise DamagedError(f"the manifest is not JSON: {exc}") from exc
        if not isinstance(document, dict):
            raise DamagedError(f"the manifest is a JSON {type(document).__name__}, expected an object")
        manifest = cls.from_dict(document)
        if manifest.to_bytes() != content:
            raise DamagedError("the manifest is not canonical JSON: it was edited after it was committed")
        return manifest


_SECTIONS = ("config", "metrics", "dataset", "code", "world", "cursor")
_FIELDS = frozenset(f.name for f in fields(Manifest)) - {"extra"} | {"config_digest"}


def _check_major(version: object) -> None:
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if not match:
        raise ValueError(f"schema_version is {version!r}, expected one like {SCHEMA_VERSION!r}")
    if match.group(1) != SCHEMA_VERSION.partition(".")[0]:
        raise ConfigError(
            f"the manifest has schema version {version}; this nexa reads {SCHEMA_VERSION}: use a later nexa"
        )


def _check_sha256(digest: object, name: str) -> None:
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise ValueError(f"{name} is {digest!r}, expected 64 hexadecimal digits")


def _check_kinds(document: Mapping[str, Any], kinds: Mapping[str, type], *, at: str) -> None:
    for name, kind in kinds.items():
        if name not in document:
            raise ValueError(f"{at} field {name!r} is missing")
        if type(document[name]) is not kind:
            raise ValueError(f"{at} field {name!r} is {document[name]!r:.80}, expected {kind.__name__}")


def _copied(value: object, kind: type, *, at: str) -> Any:
    plain = _plain(value, at=at)
    if not isinstance(plain, kind):
        raise ValueError(f"{at} is {value!r:.80}, expected {kind.__name__}")
    return plain


def _plain(value: object, *, at: str) -> Any:
    """`value` as fresh dicts, lists, strings, numbers, booleans and None; else ValueError saying where."""
    try:
        return _fresh(value, 0)
    except _UnfitError as exc:
        raise ValueError(exc.said(at)) from None


class _UnfitError(Exception):
    """What has no JSON form. Where it stands is put together on the way out, for nearly all values have one."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem, self.place = problem, ""

    def within(self, place: str) -> _UnfitError:
        self.place = place + self.place
        return self

    def said(self, at: str) -> str:
        return f"{at}{self.place}"[:_LONGEST_PLACE] + f" {self.problem}"


def _fresh(value: object, depth: int) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _UnfitError(f"is {value}, expected a finite number")
        return value
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        return _fresh_dict(value, depth)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return _fresh_list(value, depth)
    raise _UnfitError(f"is a {type(value).__name__}, which has no JSON form")


def _fresh_dict(value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
    _check_room(value, depth)
    fresh: dict[str, Any] = {}
    for key in value:
        if not isinstance(key, str):
            raise _UnfitError(f"has the key {key!r}, expected a string")
        _text(key)
    try:
        for key, item in value.items():
            fresh[key] = item if type(item) in _ATOMS else _fresh(item, depth + 1)
    except _UnfitError as exc:
        raise exc.within(f".{key}") from None
    return fresh


def _fresh_list(value: Sequence[Any], depth: int) -> list[Any]:
    _check_room(value, depth)
    fresh: list[Any] = []
    try:
        for item in value:
            fresh.append(item if type(item) in _ATOMS else _fresh(item, depth + 1))
    except _UnfitError as exc:
        raise exc.within(f"[{len(fresh)}]") from None
    return fresh


def _check_room(value: Mapping[Any, Any] | Sequence[Any], depth: int) -> None:
    if depth > _MAX_DEPTH or (depth == _MAX_DEPTH and value):
        raise _UnfitError(f"is nested more than {_MAX_DEPTH} deep")


def _text(value: str) -> str:
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _UnfitError("holds half of a surrogate pair, which UTF-8 cannot write") from None
    return value

"""A store in a bucket of S3, MinIO or anything that speaks S3 with conditional writes.

Before: `open_store("s3://BUCKET/PREFIX")`. After: nothing. Creating is one `PUT` with `If-None-Match: *`.
Endpoint and credentials come from the environment alone (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, or a web identity); no message shows them.

Two clients, so that one layer retries: reads, listings and deletes are retried by obstore; a create never is,
because an answer "exists" to a repeated request cannot tell our own bytes from another's. `_Creation` retries
it and remembers whether a reply was lost.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import logging
import mmap
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import obstore
import obstore.exceptions as refusals
import obstore.store
import stamina

from nexa_train.errors import AlreadyExistsError, ConfigError, NexaError, NotFoundError, RefusedError
from nexa_train.store.base import RESERVED, Opened, Stored, check_key, check_prefix

if TYPE_CHECKING:
    from obstore import BytesStream, GetOptions
    from obstore.store import ClientConfig, RetryConfig

_MAX_PUT_BYTES = 5 * 1024**3  # AWS' limit for one PUT; obstore sets no condition on a multipart upload
_CHUNK_BYTES = 4 * 1024**2
_CREATE_ATTEMPTS = 5
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([\w.]+)</Code>")
_DETAIL = re.compile(r"<Message>([^<]{1,200})</Message>")
_NO_BUCKET = "NoSuchBucket"
_UNVERSIONED = ("", "null")  # what a bucket without versioning, or with it suspended, answers

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Patience:
    """How long one client waits: for a connection, for a whole request, and over how many tries."""

    connect_seconds: float
    request_seconds: float
    retries: int
    retry_seconds: float

    @property
    def client_options(self) -> ClientConfig:
        return {
            "connect_timeout": timedelta(seconds=self.connect_seconds),
            "timeout": timedelta(seconds=self.request_seconds),
            "read_timeout": timedelta(seconds=min(60, self.request_seconds)),
        }

    @property
    def retry_config(self) -> RetryConfig:
        return {"max_retries": self.retries, "retry_timeout": timedelta(seconds=self.retry_seconds)}


_READING = _Patience(connect_seconds=5, request_seconds=3600, retries=5, retry_seconds=60)
_CREATING = _Patience(connect_seconds=5, request_seconds=3600, retries=0, retry_seconds=0)
# A probe answers a person who waits: at most two tries of three seconds.
_PROBING = _Patience(connect_seconds=3, request_seconds=4, retries=1, retry_seconds=4)


class S3Store:
    """A bucket, or a prefix in one, with the contract of `Store`."""

    def __init__(self, bucket: str, *, prefix: str = "") -> None:
        self.bucket = bucket
        self.prefix = check_prefix(prefix)
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        self._endpoint = _endpoint()
        self._reader = self._client(_READING)
        self._creator = self._client(_CREATING)

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def create(self, key: str, source: bytes | Path) -> Stored:
        """See `Store.create`. A file is mapped, not read into memory.

        Raises:
            RefusedError: also for more than 5 GiB, the most that one conditional write may hold.
        """
        return self._create(check_key(key), source, client=self._creator)

    def open(self, key: str, *, version_id: str | None = None) -> Opened:
        """See `Store.open`."""
        check_key(key)
        options: GetOptions = {"version": version_id} if version_id else {}
        with self._translated("read", key):
            answer = obstore.get(self._reader, key, options=options)
            meta = answer.meta
            stream = answer.stream(min_chunk_size=_CHUNK_BYTES)
        stored = Stored(key=key, size=meta["size"], version_id=_version(meta["version"]))
        return Opened(_Body(stream, store=self, key=key), stored=stored, buffer_size=_CHUNK_BYTES)

    def list(self, prefix: str = "") -> builtins.list[Stored]:
        """See `Store.list`."""
        folder = check_prefix(prefix)
        with self._translated("list", folder or "."):
            found = [meta for page in obstore.list(self._reader, folder or None) for meta in page]
        kept = [meta for meta in found if not meta["path"].startswith(f"{RESERVED}/")]
        return sorted((Stored(key=meta["path"], size=meta["size"]) for meta in kept), key=lambda stored: stored.key)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        with self._translated("delete", check_key(key)):
            try:
                obstore.delete(self._reader, key)
            except FileNotFoundError as exc:
                if _found(_CODE, str(exc)) == _NO_BUCKET:
                    raise

    def probe(self) -> None:
        """See `Store.probe`; answers within ten seconds."""
        client = self._client(_PROBING)
        key = f"{RESERVED}/probe/{secrets.token_hex(8)}"
        with self._translated("write", key):
            proven = _refuses_to_overwrite(client, key)
            obstore.delete(client, key)
        if proven:
            return
        raise RefusedError(
            f"bucket {self.bucket} on {self._host} overwrites what exists: it ignores 'If-None-Match: *', so "
            "checkpoints there would not be safe; use a store with conditional writes (AWS S3, MinIO)"
        )

    def _create(self, key: str, source: bytes | Path, *, client: obstore.store.S3Store) -> Stored:
        creation = _Creation(store=client, key=key, body=_body(source, key=key))
        with self._translated("write", key):
            try:
                return creation.run()
            except _Taken:
                raise AlreadyExistsError(f"{key} already exists in {self.uri}; nothing was overwritten") from None

    @property
    def _host(self) -> str:
        return urlsplit(self._endpoint).netloc.rpartition("@")[2] if self._endpoint else "AWS S3"

    def _client(self, patience: _Patience) -> obstore.store.S3Store:
        config: obstore.store.S3Config = {"region": _region(), "disable_bulk_delete": True}
        if self._endpoint:
            config["endpoint"] = self._endpoint
            config["virtual_hosted_style_request"] = False
        try:
            return obstore.store.S3Store(
                self.bucket,
                prefix=self.prefix or None,
                config=config,
                client_options={"allow_http": self._endpoint.startswith("http://"), **patience.client_options},
                retry_config=patience.retry_config,
            )
        except refusals.BaseError as exc:
            message = f"cannot open {self.uri} with the AWS_ variables of the environment: {_summary(str(exc))}"
            raise ConfigError(message) from None

    @contextlib.contextmanager
    def _translated(self, action: str, key: str) -> Iterator[None]:
        """obstore's errors as ours. Without the cause: it holds the server's answer, access key and all."""
        try:
            yield
        except (refusals.BaseError, FileNotFoundError) as exc:
            raise self._translation(action, key, str(exc)) from None

    def _translation(self, action: str, key: str, answer: str) -> NexaError:
        status = _found(_STATUS, answer)
        if _found(_CODE, answer) == _NO_BUCKET:
            return NotFoundError(f"bucket {self.bucket} is not on {self._host}; make it, with versioning")
        if action == "read" and (status == "404" or "Invalid version id" in answer):
            return NotFoundError(f"{key} is not in {self.uri} on {self._host}")
        what = f"cannot {action} {key} in bucket {self.bucket} on {self._host}: {_summary(answer)}"
        if status in ("401", "403"):
            return RefusedError(
                f"{what}; check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what that account may do there"
            )
        if status:
            return RefusedError(f"{what}; check that AWS_ENDPOINT_URL is an S3 server, and the state of it")
        return RefusedError(
            f"{what}; no answer: check AWS_ENDPOINT_URL and the network, and where credentials come from if "
            "AWS_ACCESS_KEY_ID is not set"
        )


class _Again(Exception):
    """This create may be tried once more."""


class _Taken(Exception):
    """The key holds another writer's bytes."""


@dataclass
class _Creation:
    """One create with its retries: what is unknown after a lost reply is settled by reading back."""

    store: obstore.store.S3Store
    key: str
    body: bytes | memoryview
    reply_lost: bool = field(default=False, init=False)

    def run(self) -> Stored:
        """Try until the store has given a clear answer; the last unclear one is raised as it came."""
        try:
            for attempt in stamina.retry_context(
                on=_Again, attempts=_CREATE_ATTEMPTS, timeout=300, wait_initial=0.2, wait_max=5
            ):
                with attempt:
                    return self._try()
        except _Again as exc:
            raise exc.__cause__ or exc from None
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _try(self) -> Stored:
        try:
            result = obstore.put(self.store, self.key, self.body, mode="create", use_multipart=False)
        except refusals.AlreadyExistsError as exc:
            return self._settle(exc)
        except refusals.GenericError as exc:
            if _is_final(str(exc)):
                raise
            self.reply_lost = True
            raise _Again(_summary(str(exc))) from exc
        return Stored(key=self.key, size=len(self.body), version_id=_version(result["version"]))

    def _settle(self, exc: refusals.AlreadyExistsError) -> Stored:
        """obstore says "exists" for 412, which is final, and for 409, after which nothing may be there."""
        try:
            answer = obstore.get(self.store, self.key)
        except FileNotFoundError:
            raise _Again("the store was busy with another write to the key") from exc
        except refusals.GenericError as unread:
            raise _Again(_summary(str(unread))) from unread
        if not self.reply_lost or answer.meta["size"] != len(self.body):
            raise _Taken from exc
        if not _same(answer.stream(min_chunk_size=_CHUNK_BYTES), self.body):
            raise _Taken from exc
        _log.info("the reply to creating %s was lost; read back, it holds our bytes", self.key)
        return Stored(key=self.key, size=len(self.body), version_id=_version(answer.meta["version"]))


class _Body(io.RawIOBase):
    """The body of a response as a raw stream; a connection that breaks half-way raises RefusedError."""

    def __init__(self, chunks: BytesStream, *, store: S3Store, key: str) -> None:
        self._chunks = chunks
        self._store = store
        self._key = key
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        """Always: this is what the stream is for."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer` with what has come, at most one chunk."""
        if not self._rest:
            with self._store._translated("read", self._key):
                self._rest = memoryview(next(self._chunks, b""))
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _refuses_to_overwrite(client: obstore.store.S3Store, key: str) -> bool:
    try:
        # An "exists" to the first is proof too: its reply was lost, and obstore asked again.
        obstore.put(client, key, b"first", mode="create", use_multipart=False)
        obstore.put(client, key, b"second", mode="create", use_multipart=False)
    except refusals.AlreadyExistsError:
        return True
    return False


def _same(chunks: Iterator[bytes], expected: bytes | memoryview) -> bool:
    offset = 0
    for chunk in chunks:
        if expected[offset : offset + len(chunk)] != chunk:
            return False
        offset += len(chunk)
    return offset == len(expected)


def _body(source: bytes | Path, *, key: str) -> bytes | memoryview:
    """The bytes to send; those of a file as a map of it, which the kernel pages in and out as they go."""
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size > _MAX_PUT_BYTES:
        raise RefusedError(
            f"{key} has {size / 1024**3:.2f} GiB; S3 takes at most 5 GiB in one conditional write: save smaller shards"
        )
    if not isinstance(source, Path):
        return source
    if size == 0:
        return b""  # an empty file cannot be mapped
    with source.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def _version(version: str | None) -> str | None:
    return None if version is None or version in _UNVERSIONED else version


def _is_final(answer: str) -> bool:
    """Whether asking again could not help: the request itself was judged, not the moment."""
    status = _found(_STATUS, answer)
    if status in ("408", "429") or _found(_CODE, answer) == "RequestTimeout":
        return False
    return status.startswith("4") or status == "501"


def _summary(answer: str) -> str:
    """Status, code and message of an S3 error, or the first line: the rest of the answer has the access key."""
    parts = [_found(pattern, answer) for pattern in (_STATUS, _CODE, _DETAIL)]
    if not parts[0]:
        return answer.splitlines()[0].rpartition(" - ")[2][:200]
    return " ".join(part for part in parts if part)


def _found(pattern: re.Pattern[str], answer: str) -> str:
    match = pattern.search(answer)
    return match.group(1) if match else ""

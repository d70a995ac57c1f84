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

from nexa_train.errors import AlreadyExistsError, NexaError, NotFoundError, RefusedError
from nexa_train.store.base import RESERVED, Opened, Stored, check_key, check_prefix

if TYPE_CHECKING:
    from obstore import BytesStream, GetOptions

_MAX_PUT_BYTES = 5 * 1024**3  # AWS' limit for one PUT; obstore sets no condition on a multipart upload
_CHUNK_BYTES = 4 * 1024**2
_CREATE_ATTEMPTS = 5
_NOT_RETRIED = re.compile(r"status code: (?:4\d\d|501)\b")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([\w.]+)</Code>")
_DETAIL = re.compile(r"<Message>([^<]{1,200})</Message>")
_UNVERSIONED = ("", "null")  # what a bucket without versioning, or with it suspended, answers

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Patience:
    """How long one client waits: for a connection, for a whole request, and over how many tries."""

    connect_seconds: float
    request_seconds: float
    retries: int
    retry_seconds: float


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
        with self._translated("delete", check_key(key)), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._reader, key)

    def probe(self) -> None:
        """See `Store.probe`; answers within ten seconds."""
        client = self._client(_PROBING)
        key = f"{RESERVED}/probe/{secrets.token_hex(8)}"
        with self._translated("write", key):
            obstore.put(client, key, b"first", mode="create", use_multipart=False)
            try:
                obstore.put(client, key, b"second", mode="create", use_multipart=False)
            except refusals.AlreadyExistsError:
                return
            finally:
                obstore.delete(client, key)
        raise RefusedError(
            f"bucket {self.bucket} on {self._host} overwrites what exists: it ignores 'If-None-Match: *', so "
            "checkpoints there would not be safe; use a store with conditional writes (AWS S3, MinIO)"
        )

    def _create(self, key: str, source: bytes | Path, *, client: obstore.store.S3Store) -> Stored:
        creation = _Creation(store=client, key=key, body=_body(source, key=key))
        with self._translated("write", key):
            try:
                return creation.run()
            except refusals.AlreadyExistsError:
                raise AlreadyExistsError(f"{key} already exists in {self.uri}; nothing was overwritten") from None

    @property
    def _host(self) -> str:
        return urlsplit(self._endpoint).netloc.rpartition("@")[2] if self._endpoint else "AWS S3"

    def _client(self, patience: _Patience) -> obstore.store.S3Store:
        config: obstore.store.S3Config = {"region": _region(), "disable_bulk_delete": True}
        if self._endpoint:
            config["endpoint"] = self._endpoint
            config["virtual_hosted_style_request"] = False
        return obstore.store.S3Store(
            self.bucket,
            prefix=self.prefix or None,
            config=config,
            client_options={
                "allow_http": self._endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=patience.connect_seconds),
                "timeout": timedelta(seconds=patience.request_seconds),
                "read_timeout": timedelta(seconds=min(60, patience.request_seconds)),
            },
            retry_config={
                "max_retries": patience.retries,
                "retry_timeout": timedelta(seconds=patience.retry_seconds),
            },
        )

    @contextlib.contextmanager
    def _translated(self, action: str, key: str) -> Iterator[None]:
        """obstore's errors as ours. Without the cause: it holds the server's answer, access key and all."""
        try:
            yield
        except FileNotFoundError as exc:
            raise self._not_found(key, str(exc)) from None
        except (refusals.PermissionDeniedError, refusals.UnauthenticatedError) as exc:
            raise self._forbidden(action, key, str(exc)) from None
        except refusals.BaseError as exc:
            raise self._failed(action, key, str(exc)) from None

    def _not_found(self, key: str, answer: str) -> NexaError:
        if "NoSuchBucket" in answer:
            return NotFoundError(f"bucket {self.bucket} does not exist on {self._host}; make it, with versioning")
        return NotFoundError(f"{key} is not in {self.uri} on {self._host}")

    def _forbidden(self, action: str, key: str, answer: str) -> NexaError:
        return RefusedError(
            f"{self._host} refuses to {action} {key} in bucket {self.bucket} ({_summary(answer)}); check "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what that account may do in this bucket"
        )

    def _failed(self, action: str, key: str, answer: str) -> NexaError:
        if _STATUS.search(answer):
            return RefusedError(
                f"{self._host} could not {action} {key} in bucket {self.bucket} ({_summary(answer)}); "
                "check the bucket and the state of the server"
            )
        return RefusedError(
            f"cannot {action} {key} in bucket {self.bucket}: no answer from {self._host} "
            f"({_summary(answer)}); check AWS_ENDPOINT_URL and the network; without AWS_ACCESS_KEY_ID in the "
            "environment, also where credentials are to come from"
        )


class _Again(Exception):
    """This create may be tried once more."""


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
            if _NOT_RETRIED.search(str(exc)):
                raise
            self.reply_lost = True
            raise _Again from exc
        return Stored(key=self.key, size=len(self.body), version_id=_version(result["version"]))

    def _settle(self, taken: refusals.AlreadyExistsError) -> Stored:
        """obstore says "exists" for 412, which is final, and for 409, after which nothing may be there."""
        try:
            answer = obstore.get(self.store, self.key)
        except FileNotFoundError:
            raise _Again from taken
        if not self.reply_lost or answer.meta["size"] != len(self.body):
            raise taken
        if not _same(answer.stream(min_chunk_size=_CHUNK_BYTES), self.body):
            raise taken
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


def _summary(answer: str) -> str:
    """Status, code and message of an S3 error, or the first line: the body has the access key."""
    status, code, detail = (pattern.search(answer) for pattern in (_STATUS, _CODE, _DETAIL))
    if not status:
        return answer.splitlines()[0].rpartition(" - ")[2][:200]
    found = [match.group(1) for match in (status, code, detail) if match]
    return " ".join(found)

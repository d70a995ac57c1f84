"""A store in a bucket of S3, MinIO or anything that speaks S3 with conditional writes.

Before: `open_store("s3://BUCKET/PREFIX")`. After: nothing. Creating is one `PUT` with `If-None-Match: *`.
Endpoint and credentials come from the environment alone (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, or a web identity); no message shows them.

One layer retries, and it is here: obstore's own retries are off. They would hide a lost reply to a create, after which
"exists" may mean our own bytes (`_Creation` remembers and compares), and they end where the body of an answer begins.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import obstore
import obstore.exceptions as refusals
import obstore.store
import stamina
from stamina.instrumentation import RetryDetails, set_on_retry_hooks

from nexa_train.errors import AlreadyExistsError, ConfigError, NexaError, NotFoundError, RefusedError
from nexa_train.store.base import RESERVED, Opened, Stored, check_key, check_prefix

if TYPE_CHECKING:
    from obstore import BytesStream, GetOptions, GetResult
    from obstore.store import ClientConfig, RetryConfig

_MAX_PUT_BYTES = 5 * 1024**3  # AWS' limit for one PUT; obstore sets no condition on a multipart upload
_CHUNK_BYTES = 4 * 1024**2
_SMALL_BYTES = 1024**2
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([\w.]+)</Code>")
_DETAIL = re.compile(r"<Message>([^<]{1,200})</Message>")
_NO_BUCKET = "NoSuchBucket"
# Of an S3 server's own words. A 404 without them is a proxy's before it, which has no route there at the moment, and
# says nothing about an object: taken at its word, it would have a run give up a checkpoint that is whole.
_GONE = ("NoSuchKey", "NoSuchVersion")
_NEVER: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(0)}
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_UNSENDABLE = re.compile(r"[^!-~]")
_UNVERSIONED = ("", "null")  # what a bucket without versioning, or with it suspended, answers

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Patience:
    """How long to wait: for a connection, in silence, for a whole request, and over how many tries.

    Silence is counted from the first byte of a request, not from the last: until an answer begins nothing is read, so
    a body must be sent whole within that time. None: no limit.
    """

    connect_seconds: float
    silence_seconds: float | None
    request_seconds: float
    tries: int

    @property
    def client_options(self) -> ClientConfig:
        options: ClientConfig = {
            "connect_timeout": timedelta(seconds=self.connect_seconds),
            "timeout": timedelta(seconds=self.request_seconds),
        }
        if self.silence_seconds is not None:
            options["read_timeout"] = timedelta(seconds=self.silence_seconds)
        return options

    def ask(self, call: Callable[[], _T]) -> _T:
        """Try until there is a clear answer; the last unclear one is raised as it came."""
        try:
            for attempt in stamina.retry_context(
                on=_Again, attempts=self.tries, timeout=None, wait_initial=0.2, wait_max=10, wait_jitter=0.5
            ):
                with attempt:
                    return _unclear_as_again(call)
        except _Again as exc:
            raise exc.__cause__ or exc from None
        raise AssertionError("unreachable: the last attempt returns or raises")


# Ten tries are some forty seconds: a server that restarts, not one that is gone.
_WORKING = _Patience(connect_seconds=5, silence_seconds=60, request_seconds=3600, tries=10)
# For a body of more than `_SMALL_BYTES`. A connection that goes dead meanwhile is noticed by the kernel: by bytes that
# are not acknowledged, or not taken, for 30 s (TCP_USER_TIMEOUT, which the client sets on each socket; Linux only), and
# once all are sent by keepalives, after 60 s. A server that takes all bytes and does not answer, while its host is
# well, is left to the limit of the request; training's watchdog, which counts 600 s without progress, may come first.
_SENDING = replace(_WORKING, silence_seconds=None)
# A probe answers a person who waits.
_PROBING = _Patience(connect_seconds=3, silence_seconds=4, request_seconds=4, tries=2)


class S3Store:
    """A bucket, or a prefix in one, with the contract of `Store`."""

    def __init__(self, bucket: str, *, prefix: str = "") -> None:
        self.bucket = bucket
        self.prefix = check_prefix(prefix)
        self.uri = f"s3://{bucket}/{self.prefix}".rstrip("/")
        _check_variables()
        self._endpoint = _endpoint()
        self._working, self._sending = self._client(_WORKING), self._client(_SENDING)

    def __repr__(self) -> str:
        return f"S3Store({self.uri!r})"

    def create(self, key: str, source: bytes | Path) -> Stored:
        """See `Store.create`. A file is mapped, not read into memory.

        Raises:
            RefusedError: also for more than 5 GiB, the most that one conditional write may hold.
        """
        return self._create(check_key(key), source, self._working, _WORKING)

    def open(self, key: str, *, version_id: str | None = None) -> Opened:
        """See `Store.open`. A connection that breaks half-way is taken up again where it broke."""
        body = _Body(self, check_key(key), {"version": version_id} if version_id else {})
        return Opened(body, stored=body.stored, buffer_size=_CHUNK_BYTES)

    def list(self, prefix: str = "") -> builtins.list[Stored]:
        """See `Store.list`."""
        folder = check_prefix(prefix)
        with self._translated("list", folder or "."):
            pages = _WORKING.ask(lambda: list(obstore.list(self._working, folder or None)))
        kept = [meta for page in pages for meta in page if not meta["path"].startswith(f"{RESERVED}/")]
        return sorted((Stored(key=meta["path"], size=meta["size"]) for meta in kept), key=lambda stored: stored.key)

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        self._delete(check_key(key), self._working, _WORKING)

    def probe(self) -> None:
        """See `Store.probe`; answers within ten seconds. Where nothing may be deleted, five bytes stay."""
        client, key = self._client(_PROBING), f"{RESERVED}/probe/{secrets.token_hex(8)}"
        self._create(key, b"first", client, _PROBING)
        try:
            self._create(key, b"second", client, _PROBING)
        except AlreadyExistsError:
            return
        finally:
            with contextlib.suppress(RefusedError):  # training needs no deletion: retention says so where it fails
                self._delete(key, client, _PROBING)
        raise RefusedError(
            f"bucket {self.bucket} on {self._host} overwrites what exists: it ignores 'If-None-Match: *', so "
            "checkpoints there would not be safe; use a store with conditional writes (AWS S3, MinIO)"
        )

    def _create(self, key: str, source: bytes | Path, client: obstore.store.S3Store, patience: _Patience) -> Stored:
        body = _body(source, key=key)
        sending = self._sending if len(body) > _SMALL_BYTES else client
        creation = _Creation(store=client, sending=sending, key=key, body=body)
        with self._translated("write", key):
            try:
                return patience.ask(creation.attempt)
            except _Taken:
                raise AlreadyExistsError(f"{key} already exists in {self.uri}; nothing was overwritten") from None

    def _delete(self, key: str, client: obstore.store.S3Store, patience: _Patience) -> None:
        with self._translated("delete", key):
            try:
                patience.ask(lambda: obstore.delete(client, key))
            except FileNotFoundError as exc:
                if _found(_CODE, str(exc)) not in _GONE:
                    raise

    def _get(self, key: str, options: GetOptions) -> GetResult:
        return obstore.get(self._working, key, options=options)

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
                client_options={"allow_http": urlsplit(self._endpoint).scheme == "http", **patience.client_options},
                retry_config=_NEVER,
            )
        except refusals.BaseError as exc:
            message = f"cannot open {self.uri} with the AWS_ variables of the environment: {_summary(str(exc))}"
            raise ConfigError(message) from None

    @contextlib.contextmanager
    def _translated(self, action: str, key: str) -> Iterator[None]:
        """obstore's errors as ours. Without the cause: it holds the server's answer, access key and all."""
        try:
            yield
        except refusals.InvalidPathError as exc:
            # The client's listing ends there, and cannot go past it.
            said = f"cannot {action} {key} in bucket {self.bucket} on {self._host}: {_summary(str(exc))}"
            raise RefusedError(f"{said}; remove that object") from None
        except (refusals.BaseError, FileNotFoundError) as exc:
            raise self._translation(action, key, str(exc)) from None
        except BaseException as exc:
            # Of no class that can be imported, and no Exception: it would end a thread, or a rank, without last words.
            if type(exc).__name__ != "PanicException":
                raise
            said = f"cannot {action} {key} in bucket {self.bucket} on {self._host}: the storage client broke down"
            raise RefusedError(f"{said}, as said above; check the AWS_ variables of the environment") from None

    def _translation(self, action: str, key: str, answer: str) -> NexaError:
        status = _found(_STATUS, answer)
        if _found(_CODE, answer) == _NO_BUCKET:
            return NotFoundError(f"bucket {self.bucket} is not on {self._host}; make it, with versioning")
        if action == "read" and (_found(_CODE, answer) in _GONE or "Invalid version id" in answer):
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
    """This may be tried once more."""


def _log_retry(details: RetryDetails) -> None:
    """stamina itself would tell structlog, which prints to stdout, where answers for programs are."""
    _log.info("%s; trying again in %.1f s", details.caused_by, details.wait_for)


set_on_retry_hooks([_log_retry])


class _Taken(Exception):
    """The key holds another writer's bytes."""


def _unclear_as_again(call: Callable[[], _T]) -> _T:
    try:
        return call()
    except (refusals.GenericError, FileNotFoundError) as exc:
        if _is_final(str(exc)):
            raise
        raise _Again(_summary(str(exc))) from exc


@dataclass
class _Creation:
    """One create over its tries: what is unknown after a lost reply is settled by reading back."""

    store: obstore.store.S3Store
    sending: obstore.store.S3Store
    key: str
    body: bytes | memoryview
    reply_lost: bool = field(default=False, init=False)

    def attempt(self) -> Stored:
        """Ask once.

        Raises:
            _Taken: by another writer's bytes.
            GenericError, FileNotFoundError: an answer that is none, or a refusal.
        """
        try:
            result = obstore.put(self.sending, self.key, self.body, mode="create", use_multipart=False)
        except refusals.AlreadyExistsError as exc:
            return self._settle(exc)
        except (refusals.GenericError, FileNotFoundError):
            self.reply_lost = True
            raise
        return Stored(key=self.key, size=len(self.body), version_id=_version(result["version"]))

    def _settle(self, exc: refusals.AlreadyExistsError) -> Stored:
        """obstore says "exists" for 412, which is final, and for 409, after which nothing may be there."""
        try:
            answer = obstore.get(self.store, self.key)
        except FileNotFoundError:
            raise _Again("the store was busy with another write to the key") from exc
        if not self.reply_lost or answer.meta["size"] != len(self.body):
            raise _Taken from exc
        if not _same(answer.stream(min_chunk_size=_CHUNK_BYTES), self.body):
            raise _Taken from exc
        _log.info("the reply to creating %s was lost; read back, it holds our bytes", self.key)
        return Stored(key=self.key, size=len(self.body), version_id=_version(answer.meta["version"]))


class _Body(io.RawIOBase):
    """The bytes of one object as a raw stream, of one version of it from the first to the last."""

    def __init__(self, store: S3Store, key: str, options: GetOptions) -> None:
        self._store, self._key = store, key
        self._rest, self._offset = memoryview(b""), 0
        with store._translated("read", key):
            answer = _WORKING.ask(lambda: store._get(key, options))
        self._chunks: BytesStream | None = answer.stream(min_chunk_size=_CHUNK_BYTES)
        self._same: GetOptions = {**options, "if_match": answer.meta["e_tag"]}
        self.stored = Stored(key=key, size=answer.meta["size"], version_id=_version(answer.meta["version"]))

    def readable(self) -> bool:
        """Always: this is what the stream is for."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill `buffer` with what has come, at most one chunk."""
        if not self._rest and self._offset < self.stored.size:
            with self._store._translated("read", self._key):
                self._rest = _WORKING.ask(self._next)
            self._offset += len(self._rest)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size

    def _next(self) -> memoryview:
        if self._chunks is None:
            options: GetOptions = {**self._same, "range": {"offset": self._offset}}
            self._chunks = self._store._get(self._key, options).stream(min_chunk_size=_CHUNK_BYTES)
        try:
            if chunk := memoryview(next(self._chunks, b"")):
                return chunk
            raise refusals.GenericError(f"the answer ended after {self._offset} of {self.stored.size} bytes")
        except refusals.BaseError:
            self._chunks = None
            raise


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


def _check_variables() -> None:
    """Refuse what no request can be made of: the client panics on it, or asks for ever.

    Raises:
        ConfigError: names the variable, and never shows its value.
    """
    used = [*map(_variable, (_ENDPOINTS, _REGIONS)), *_CREDENTIALS]
    for name in used:
        if _UNSENDABLE.search(os.environ.get(name, "")):
            raise ConfigError(
                f"{name} holds white space, a line's end or a character beyond ASCII, which no request can carry: set "
                "it without (a Secret that was made from a file keeps the end of its last line)"
            )
    if _endpoint() and not _is_server(_endpoint()):
        raise ConfigError(f"{used[0]} names no server; expected http://HOST:PORT or https://HOST:PORT")


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # half an address, or no port
        return False


def _variable(names: Sequence[str]) -> str:
    """The first of them that is set, else the last."""
    return next((name for name in names if os.environ.get(name)), names[-1])


def _endpoint() -> str:
    return os.environ.get(_variable(_ENDPOINTS), "")


def _region() -> str:
    return os.environ.get(_variable(_REGIONS)) or "us-east-1"


def _version(version: str | None) -> str | None:
    return None if version is None or version in _UNVERSIONED else version


def _is_final(answer: str) -> bool:
    """Whether asking again could not help: the request itself was judged, not the moment."""
    status = _found(_STATUS, answer)
    code = _found(_CODE, answer)
    if status in ("408", "429") or code == "RequestTimeout":
        return False
    if status == "404":
        return code in (*_GONE, _NO_BUCKET)
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

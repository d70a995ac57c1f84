"""What only a bucket does, tried on a real MinIO: versions, credentials, and stores that cannot be used."""

from __future__ import annotations

import io
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator

import pytest

from nexa_train.errors import ConfigError, NotFoundError, RefusedError
from nexa_train.store import Store, open_store
from tests.cluster.fault_proxy import Fault, FaultProxy
from tests.cluster.minio import MinioServer

pytestmark = pytest.mark.integration


@pytest.fixture
def minio(minio_server: MinioServer, monkeypatch: pytest.MonkeyPatch) -> MinioServer:
    for name, value in minio_server.env().items():
        monkeypatch.setenv(name, value)
    return minio_server


CALLS: dict[str, Callable[[Store], object]] = {
    "create": lambda store: store.create("k", b"x"),
    "open": lambda store: store.open("k").read(),
    "list": lambda store: store.list("k"),
    "delete": lambda store: store.delete("k"),
    "probe": lambda store: store.probe(),
}


def test_the_version_that_was_committed_is_read_although_the_object_was_overwritten(minio: MinioServer) -> None:
    bucket = minio.make_bucket()
    store = open_store(f"s3://{bucket}")
    stored = store.create("k", b"committed")
    minio.client.put_object(bucket, "k", io.BytesIO(b"overwritten"), 11)

    assert stored.version_id
    assert store.open("k").read() == b"overwritten"
    assert store.open("k", version_id=stored.version_id).read() == b"committed"


def test_the_version_that_was_committed_is_read_although_the_object_was_deleted(minio: MinioServer) -> None:
    store = open_store(f"s3://{minio.make_bucket()}")
    stored = store.create("k", b"committed")
    store.delete("k")

    assert store.open("k", version_id=stored.version_id).read() == b"committed"


@pytest.mark.parametrize("version_id", ["00000000-0000-0000-0000-000000000000", "nonsense"])
def test_a_version_that_never_was_is_not_found(minio: MinioServer, version_id: str) -> None:
    store = open_store(f"s3://{minio.make_bucket()}")
    store.create("k", b"x")

    with pytest.raises(NotFoundError, match="k is not in"):
        store.open("k", version_id=version_id)


@pytest.mark.parametrize("call", CALLS)
def test_a_missing_bucket_is_named(minio: MinioServer, call: str) -> None:
    with pytest.raises(NotFoundError, match=r"bucket no-such-bucket is not on 127.0.0.1"):
        CALLS[call](open_store("s3://no-such-bucket/team"))


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_secret_is_refused_and_never_shown(
    minio: MinioServer, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    bucket = minio.make_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
    store = open_store(f"s3://{bucket}")

    with pytest.raises(RefusedError, match=f"bucket {bucket} on 127.0.0.1.*403.*AWS_SECRET_ACCESS_KEY") as caught:
        CALLS[call](store)

    shown = repr(store) + "".join(traceback.format_exception(caught.value))
    assert "wrong-and-secret" not in shown
    assert minio.access_key not in shown


def test_a_secret_without_its_key_is_a_wrong_configuration(minio: MinioServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")

    with pytest.raises(ConfigError, match="Missing AccessKeyId") as caught:
        open_store("s3://bucket")

    assert minio.secret_key not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_is_down_is_reported_within_ten_seconds(
    minio: MinioServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = minio.make_bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    started = time.monotonic()

    with pytest.raises(RefusedError, match=f"bucket {bucket} on 127.0.0.1:1: .*AWS_ENDPOINT_URL"):
        open_store(f"s3://{bucket}").probe()

    assert time.monotonic() - started < 10


@pytest.fixture
def between(minio: MinioServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FaultProxy]]:
    """Puts a proxy before the server."""
    started: list[FaultProxy] = []

    def start(*, faults: dict[int, Fault] | None = None, every: Fault | None = None) -> FaultProxy:
        started.append(FaultProxy(upstream=(minio.address, minio.port), faults=faults or {}, every=every))
        monkeypatch.setenv("AWS_ENDPOINT_URL", started[-1].endpoint)
        return started[-1]

    yield start
    for proxy in started:
        proxy.close()


def test_a_bucket_where_nothing_may_be_deleted_can_be_trained_to(
    minio: MinioServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = minio.make_bucket()
    allowed = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:PutObject", "s3:ListBucket"]}
    places = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    policy = {"Version": "2012-10-17", "Statement": [allowed | {"Resource": places}]}
    minio.client.set_bucket_policy(bucket, json.dumps(policy))
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    store = open_store(f"s3://{bucket}")

    with pytest.raises(RefusedError, match="cannot delete k in bucket"):
        store.delete("k")
    store.probe()


def test_a_server_that_ignores_the_condition_is_refused_by_name(
    minio: MinioServer, between: Callable[..., FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = minio.make_bucket()
    # A proxy that takes a header away breaks the signature, so the bucket is open to all.
    everything = {"Effect": "Allow", "Principal": "*", "Action": "s3:*"}
    places = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    minio.client.set_bucket_policy(
        bucket, json.dumps({"Version": "2012-10-17", "Statement": [everything | {"Resource": places}]})
    )
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    open_store(f"s3://{bucket}").probe()
    between(every="unconditional")

    with pytest.raises(RefusedError, match=f"bucket {bucket} on 127.0.0.1.* overwrites what exists"):
        open_store(f"s3://{bucket}").probe()

    assert not list(minio.client.list_objects(bucket, recursive=True))


@pytest.mark.parametrize("call", CALLS)
def test_what_is_forbidden_is_asked_for_once(
    minio: MinioServer, between: Callable[..., FaultProxy], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    bucket = minio.make_bucket()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    proxy = between()

    with pytest.raises(RefusedError, match="403"):
        CALLS[call](open_store(f"s3://{bucket}"))

    assert len(proxy.seen) == 1


@pytest.mark.parametrize("fault", ["reset before", "lost reply", "cut answer", "500", "503", "500 after"])
@pytest.mark.parametrize("call", CALLS)
def test_every_call_outlives_a_fault(
    minio: MinioServer, between: Callable[..., FaultProxy], call: str, fault: Fault
) -> None:
    store = open_store(f"s3://{minio.make_bucket()}")
    if call != "create":
        store.create("k", b"x")
    proxy = between(faults={1: fault})

    CALLS[call](open_store(store.uri))

    assert len(proxy.seen) > 1


def test_a_body_that_breaks_off_is_taken_up_where_it_broke(
    minio: MinioServer, between: Callable[..., FaultProxy]
) -> None:
    content = os.urandom(30_000_000)
    bucket = minio.make_bucket()
    open_store(f"s3://{bucket}").create("k", content)
    proxy = between(faults={1: "cut answer", 2: "cut answer", 3: "cut answer"})

    with open_store(f"s3://{bucket}").open("k") as stream:
        assert stream.read() == content

    assert len(proxy.seen) == 4


def test_a_body_that_breaks_off_is_never_continued_with_another_objects_bytes(
    minio: MinioServer, between: Callable[..., FaultProxy]
) -> None:
    bucket = minio.make_bucket(versioning=False)
    open_store(f"s3://{bucket}").create("k", b"a" * 30_000_000)
    between(faults={1: "cut answer"})

    with open_store(f"s3://{bucket}").open("k") as stream:
        stream.read(1)
        minio.client.put_object(bucket, "k", io.BytesIO(b"b" * 30_000_000), 30_000_000)
        with pytest.raises(RefusedError, match="412"):
            stream.read()

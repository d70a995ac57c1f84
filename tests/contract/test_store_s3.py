"""What only a bucket does, tried on a real MinIO: versions, credentials, and stores that cannot be used."""

from __future__ import annotations

import io
import time
import traceback
from collections.abc import Callable

import pytest

from nexa_train.errors import ConfigError, NotFoundError, RefusedError
from nexa_train.store import Store, open_store
from tests.cluster.minio import MinioServer

pytestmark = pytest.mark.integration


@pytest.fixture
def minio(minio_server: MinioServer, monkeypatch: pytest.MonkeyPatch) -> MinioServer:
    for name, value in minio_server.env().items():
        monkeypatch.setenv(name, value)
    return minio_server


CALLS: dict[str, Callable[[Store], object]] = {
    "create": lambda store: store.create("k", b"x"),
    "open": lambda store: store.open("k"),
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

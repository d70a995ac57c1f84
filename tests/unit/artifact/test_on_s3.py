"""Checkpoints in a real bucket: the versions that were committed are the ones that count."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from nexa_train.artifact.publish import Publisher, claim_run, fetch, newest_valid
from nexa_train.artifact.retention import apply_retention
from nexa_train.artifact.verify import verify
from nexa_train.errors import SupersededError
from nexa_train.store import open_store
from tests.cluster.minio import MinioServer
from tests.unit.artifact.builders import RUN, draft, files_in, publish_chain

pytestmark = pytest.mark.integration


@pytest.fixture
def minio(minio_server: MinioServer, monkeypatch: pytest.MonkeyPatch) -> MinioServer:
    for name, value in minio_server.env().items():
        monkeypatch.setenv(name, value)
    return minio_server


@pytest.mark.parametrize("versioning", [True, False])
def test_a_run_is_claimed_published_verified_fetched_and_thinned_out(
    minio: MinioServer, tmp_path: Path, versioning: bool
) -> None:
    uri = f"s3://{minio.make_bucket(versioning=versioning)}/team"
    store = open_store(uri)
    claim_run(store, RUN, {"seed": 7})
    chain = publish_chain(store, tmp_path, 50, 100, 150)

    assert newest_valid(store, RUN).committed == chain[-1]
    assert verify(uri).ok
    assert (fetch(store, chain[-1], tmp_path / "into") / "model.safetensors").read_bytes() == b"00000150"
    assert apply_retention(store, RUN, 2) == [50]
    assert len(verify(f"{uri}/checkpoints/{RUN}").manifests) == 2
    with pytest.raises(SupersededError):
        Publisher(store, RUN, "late").publish(150, files_in(tmp_path / "late"), draft())


def overwrite(minio: MinioServer, uri: str, key: str) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    minio.client.put_object(bucket, f"{prefix}/{key}", io.BytesIO(b"00000666"), 8)


def test_an_overwritten_file_is_still_read_in_the_version_that_was_committed(
    minio: MinioServer, tmp_path: Path
) -> None:
    uri = f"s3://{minio.make_bucket()}/team"
    store = open_store(uri)
    [committed] = publish_chain(store, tmp_path, 50)
    overwrite(minio, uri, f"{committed.folder}/{committed.manifest.files[0].object}")

    assert verify(uri).ok
    assert newest_valid(store, RUN).committed == committed
    assert (fetch(store, committed, tmp_path / "into") / "model.safetensors").read_bytes() == b"00000050"


def test_without_versioning_an_overwritten_file_is_damage(minio: MinioServer, tmp_path: Path) -> None:
    uri = f"s3://{minio.make_bucket(versioning=False)}/team"
    store = open_store(uri)
    chain = publish_chain(store, tmp_path, 50, 100)
    overwrite(minio, uri, f"{chain[1].folder}/{chain[1].manifest.files[0].object}")

    assert newest_valid(store, RUN).committed == chain[0]
    assert not verify(uri).ok


def copied(minio: MinioServer, bucket: str) -> str:
    """Another versioned bucket with the newest bytes of each key, as a mirror or a restored backup has them."""
    copy = minio.make_bucket()
    for each in minio.client.list_objects(bucket, recursive=True):
        content = minio.client.get_object(bucket, each.object_name).read()
        minio.client.put_object(copy, each.object_name, io.BytesIO(content), len(content))
    return copy


def test_a_copy_of_a_versioned_bucket_is_whole_though_its_versions_have_other_names(
    minio: MinioServer, tmp_path: Path
) -> None:
    bucket = minio.make_bucket()
    chain = publish_chain(open_store(f"s3://{bucket}/team"), tmp_path, 50, 100)
    assert all(entry.version_id for entry in chain[1].manifest.files)
    uri = f"s3://{copied(minio, bucket)}/team"
    store = open_store(uri)

    assert verify(uri).ok
    assert newest_valid(store, RUN).committed == chain[1]
    assert (fetch(store, chain[1], tmp_path / "into") / "model.safetensors").read_bytes() == b"00000100"


def test_in_a_copy_of_a_versioned_bucket_other_bytes_are_damage(minio: MinioServer, tmp_path: Path) -> None:
    bucket = minio.make_bucket()
    chain = publish_chain(open_store(f"s3://{bucket}/team"), tmp_path, 50, 100)
    uri = f"s3://{copied(minio, bucket)}/team"
    overwrite(minio, uri, f"{chain[1].folder}/{chain[1].manifest.files[0].object}")

    assert newest_valid(open_store(uri), RUN).committed == chain[0]
    assert not verify(uri).ok

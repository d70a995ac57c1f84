"""What every store promises, tried on each of them: memory, a real folder, and a real MinIO."""

from __future__ import annotations

import os
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nexa_train.errors import AlreadyExistsError, ConfigError, NotFoundError
from nexa_train.store import Store, open_store

S3_KINDS = [
    pytest.param("s3-versioned", marks=pytest.mark.integration),
    pytest.param("s3-unversioned", marks=pytest.mark.integration),
]


@pytest.fixture(params=["memory", "local", *S3_KINDS])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    kind: str = request.param
    if kind == "memory":
        return open_store(f"memory://{uuid.uuid4()}")
    if kind == "local":
        return open_store(tmp_path / "artifacts")
    minio = request.getfixturevalue("minio_server")
    for name, value in minio.env().items():
        monkeypatch.setenv(name, value)
    return open_store(f"s3://{minio.make_bucket(versioning=kind == 's3-versioned')}/team/models")


def test_what_was_created_is_read_back(store: Store) -> None:
    stored = store.create("a/b.txt", b"content")

    with store.open("a/b.txt") as stream:
        assert stream.read() == b"content"
        assert stream.stored == stored
    assert (stored.key, stored.size) == ("a/b.txt", 7)


@pytest.mark.parametrize("size", [0, 1, 9 * 1024 * 1024 + 1])
def test_a_file_is_stored_as_it_is(store: Store, tmp_path: Path, size: int) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(size))

    assert store.create("big", source).size == size

    with store.open("big") as stream:
        assert stream.read() == source.read_bytes()


def test_a_stream_is_read_in_pieces(store: Store) -> None:
    store.create("k", bytes(range(256)) * 40_000)

    with store.open("k") as stream:
        pieces = iter(lambda: stream.read(100_000), b"")
        assert [len(piece) for piece in pieces] == [100_000] * 102 + [40_000]


def test_a_second_create_is_refused_and_changes_nothing(store: Store) -> None:
    store.create("k", b"first")

    with pytest.raises(AlreadyExistsError, match="k already exists"):
        store.create("k", b"second")

    assert store.open("k").read() == b"first"


def test_the_same_bytes_again_are_refused_too(store: Store) -> None:
    store.create("k", b"same")

    with pytest.raises(AlreadyExistsError):
        store.create("k", b"same")


def test_of_fifty_writers_in_a_race_exactly_one_wins(store: Store) -> None:
    def write(number: int) -> int | None:
        try:
            store.create("race/key", b"%03d" % number * 1000)
        except AlreadyExistsError:
            return None
        return number

    with ThreadPoolExecutor(50) as pool:
        outcomes = list(pool.map(write, range(50)))

    assert Counter(outcome is None for outcome in outcomes) == {True: 49, False: 1}
    winner = next(outcome for outcome in outcomes if outcome is not None)
    assert store.open("race/key").read() == b"%03d" % winner * 1000


def test_what_is_not_there_cannot_be_opened(store: Store) -> None:
    store.create("folder/file", b"")

    for key in ("nothing", "folder", "folder/file/deeper"):
        with pytest.raises(NotFoundError, match=key):
            store.open(key)


def test_a_listing_is_sorted_and_sees_whole_folders_only(store: Store) -> None:
    for key in ("run-1/b", "run-1/a/c", "run-10/a", "run-1.json", "run-1/a-b"):
        store.create(key, key.encode())

    assert [stored.key for stored in store.list("run-1")] == ["run-1/a-b", "run-1/a/c", "run-1/b"]
    assert store.list("run-1/") == store.list("run-1")
    assert [stored.key for stored in store.list()] == [
        "run-1.json",
        "run-1/a-b",
        "run-1/a/c",
        "run-1/b",
        "run-10/a",
    ]
    assert [stored.size for stored in store.list("run-10")] == [8]


def test_a_folder_that_is_not_there_is_empty(store: Store) -> None:
    assert store.list("nothing/here") == []
    assert store.list() == []


def test_more_than_a_page_of_objects_is_listed(store: Store) -> None:
    keys = [f"many/{number:04}" for number in range(1100)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: store.create(key, b"x"), keys))

    assert [stored.key for stored in store.list("many")] == keys


def test_what_is_deleted_is_gone_and_its_name_free(store: Store) -> None:
    store.create("a/k", b"old")
    store.create("a/other", b"stays")

    store.delete("a/k")

    assert [stored.key for stored in store.list()] == ["a/other"]
    with pytest.raises(NotFoundError):
        store.open("a/k")
    store.create("a/k", b"new")
    assert store.open("a/k").read() == b"new"


def test_deleting_what_is_not_there_is_no_error(store: Store) -> None:
    store.delete("nothing")
    store.create("file", b"")
    store.delete("file/below")


@pytest.mark.parametrize(
    "key", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/.", "a/", "a\\b", "a\n", ".nexa/x", "é"]
)
def test_keys_that_are_no_plain_relative_path_are_refused(store: Store, key: str) -> None:
    for call in (lambda: store.create(key, b""), lambda: store.open(key), lambda: store.delete(key)):
        with pytest.raises(ConfigError, match="store key"):
            call()


def test_a_key_may_hold_every_character_that_is_allowed(store: Store) -> None:
    key = "Az09 ._=+@,-/model-00001-of-00002.safetensors"
    store.create(key, b"x")

    assert [stored.key for stored in store.list("Az09 ._=+@,-")] == [key]
    assert store.open(key).read() == b"x"


def test_a_probe_leaves_nothing_behind(store: Store) -> None:
    store.probe()
    store.probe()

    assert store.list() == []


def test_the_uri_opens_the_same_store(store: Store) -> None:
    store.create("k", b"x")

    assert [stored.key for stored in open_store(store.uri).list()] == ["k"]

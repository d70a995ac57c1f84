"""A create under answers that leave open what happened."""

from __future__ import annotations

import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import stamina

from nexa_train.errors import AlreadyExistsError, ConfigError, RefusedError
from nexa_train.store import Store, open_store, s3
from tests.unit.store.small_s3 import SmallS3

OBJECT = "/bucket/team/k"


@pytest.fixture
def server() -> Iterator[SmallS3]:
    server = SmallS3()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def retry_at_once() -> Iterator[None]:
    with stamina.set_testing(True, attempts=10, cap=True):
        yield


@pytest.fixture
def store(server: SmallS3, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    return open_store("s3://bucket/team")


def test_a_write_whose_reply_was_lost_is_found_to_be_ours(server: SmallS3, store: Store) -> None:
    server.faults = ["lost reply"]

    assert store.create("k", b"ours").size == 4
    assert server.writes == 2


def test_a_file_whose_reply_was_lost_is_compared_byte_by_byte(server: SmallS3, store: Store, tmp_path: Path) -> None:
    source = tmp_path / "shard"
    source.write_bytes(b"weights" * 2_000_000)
    server.faults = ["lost reply"]

    assert store.create("k", source).size == 14_000_000


def test_after_a_lost_reply_other_bytes_are_not_taken_for_ours(server: SmallS3, store: Store) -> None:
    server.faults = ["not ours"]

    with pytest.raises(AlreadyExistsError):
        store.create("k", b"fifteen bytes!!")

    assert server.objects[OBJECT] == b"somebody else's"


def test_equal_bytes_of_another_writer_are_no_success_while_every_reply_came(server: SmallS3, store: Store) -> None:
    server.objects[OBJECT] = b"equal"

    with pytest.raises(AlreadyExistsError):
        store.create("k", b"equal")


def test_a_conflict_after_which_nothing_is_there_is_tried_again(server: SmallS3, store: Store) -> None:
    server.faults = ["conflict", "conflict"]

    store.create("k", b"ours")

    assert server.objects[OBJECT] == b"ours"


def test_a_conflict_after_which_something_is_there_was_lost(server: SmallS3, store: Store) -> None:
    server.objects[OBJECT] = b"theirs"
    server.faults = ["conflict"]

    with pytest.raises(AlreadyExistsError):
        store.create("k", b"ours!!")


def test_a_busy_server_is_asked_ten_times(server: SmallS3, store: Store) -> None:
    server.faults = ["busy"] * 9
    store.create("k", b"ours")
    server.faults = ["busy"] * 10

    with pytest.raises(RefusedError, match="503 SlowDown"):
        store.create("other", b"ours")

    assert server.writes == 20


def test_a_conflict_without_end_is_reported_as_such(server: SmallS3, store: Store) -> None:
    server.faults = ["conflict"] * 10

    with pytest.raises(RefusedError, match="409 ConditionalRequestConflict"):
        store.create("k", b"ours")


def test_a_request_that_was_judged_wrong_is_not_repeated(server: SmallS3, store: Store) -> None:
    server.faults = ["invalid"]

    with pytest.raises(RefusedError, match="400 InvalidRequest"):
        store.create("k", b"x")

    assert server.writes == 1


def test_an_object_that_ends_every_listing_is_named(server: SmallS3, store: Store) -> None:
    server.objects["/bucket/team/run//notes"] = b""

    with pytest.raises(RefusedError, match=r'cannot list run .*"team/run//notes".*; remove that object$'):
        store.list("run")


def test_a_store_that_overwrites_is_refused_by_name(server: SmallS3, store: Store) -> None:
    server.conditional = False

    with pytest.raises(RefusedError, match=r"bucket bucket on 127.0.0.1.* overwrites what exists"):
        store.probe()

    assert not server.objects


def test_a_store_with_conditional_writes_passes_and_is_left_clean(server: SmallS3, store: Store) -> None:
    store.probe()

    assert not server.objects


def test_a_server_that_never_answers_is_reported_after_two_tries_and_within_ten_seconds(
    server: SmallS3, store: Store
) -> None:
    server.faults = ["hang"] * 10
    started = time.monotonic()

    with pytest.raises(RefusedError, match="no answer"):
        store.probe()

    assert len(server.faults) == 8, "two were tried"
    # By the clock of a machine that does something else, too, it may be more. A second: for the pause between them.
    assert s3._PROBING.tries * s3._PROBING.request_seconds + 1 < 10
    assert time.monotonic() - started < 30


def test_more_than_one_conditional_write_can_hold_is_refused_before_a_byte_is_sent(
    server: SmallS3, store: Store, tmp_path: Path
) -> None:
    source = tmp_path / "huge"
    with source.open("wb") as file:
        file.truncate(5 * 1024**3 + 1)

    with pytest.raises(RefusedError, match="save smaller shards"):
        store.create("k", source)

    assert server.writes == 0


MALFORMED = {
    "no scheme": ("AWS_ENDPOINT_URL", "minio.secret.example:9000"),
    "another scheme": ("AWS_ENDPOINT_URL", "s3://secret"),
    "no host": ("AWS_ENDPOINT_URL", "http:///secret"),
    "no such port": ("AWS_ENDPOINT_URL", "http://secret:99999"),
    "half an address": ("AWS_ENDPOINT_URL", "http://[::1/secret"),
    "a line's end": ("AWS_ENDPOINT_URL", "http://secret:9000\n"),
    "its own variable": ("AWS_ENDPOINT_URL_S3", "secret"),
    "a key's line's end": ("AWS_ACCESS_KEY_ID", "secret\n"),
    "a secret's line's end": ("AWS_SECRET_ACCESS_KEY", "secret\r\n"),
    "a token in two lines": ("AWS_SESSION_TOKEN", "secret\nsecret"),
    "a space": ("AWS_REGION", " secret"),
    "its other name": ("AWS_DEFAULT_REGION", "secret\t"),
    "a letter that no header takes": ("AWS_ACCESS_KEY_ID", "secret\xe9"),
}


@pytest.mark.parametrize(("name", "value"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_variable_is_named_and_its_value_is_not(
    store: Store, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    if name == "AWS_DEFAULT_REGION":
        monkeypatch.delenv("AWS_REGION", raising=False)
    monkeypatch.setenv(name, value)

    with pytest.raises(ConfigError, match=rf"^{name} ") as caught:
        open_store("s3://bucket/team")

    assert "secret" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("endpoint", ["http://[::1]:9000", "https://minio", "http://minio:9000/", "http://u:p@h:1"])
def test_an_endpoint_may_be_any_server(store: Store, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)

    assert open_store("s3://bucket").uri == "s3://bucket"


CALLS: dict[str, Callable[[Store], object]] = {
    "create": lambda store: store.create("k", b"x"),
    "open": lambda store: store.open("k"),
    "list": lambda store: store.list("k"),
    "delete": lambda store: store.delete("k"),
    "probe": lambda store: store.probe(),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_client_that_breaks_down_is_a_refusal(store: Store, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "a\n")  # which it makes a request of unseen

    with pytest.raises(RefusedError, match=r"bucket bucket on 127.0.0.1.* the storage client broke down"):
        CALLS[call](open_store("s3://bucket"))


@pytest.mark.parametrize("call", CALLS)
def test_a_proxy_that_knows_no_way_says_nothing_about_an_object(server: SmallS3, store: Store, call: str) -> None:
    if call == "open":
        store.create("k", b"x")
    server.unrouted = 1
    CALLS[call](store)
    server.unrouted = 100

    with pytest.raises(RefusedError, match=r"bucket bucket on 127.0.0.1.*: 404; check that AWS_ENDPOINT_URL is an S3"):
        CALLS[call](store)

    assert server.unrouted == (98 if call == "probe" else 90)


@pytest.fixture
def impatient(server: SmallS3, store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """`store`, with every limit on silence a second."""
    for name in ("_WORKING", "_SENDING"):
        patience = getattr(s3, name)
        silence = None if patience.silence_seconds is None else 1.0
        monkeypatch.setattr(s3, name, replace(patience, silence_seconds=silence))
    return open_store(store.uri)


def test_a_body_that_takes_longer_to_send_than_silence_may_last_arrives(server: SmallS3, impatient: Store) -> None:
    server.body_seconds = 2.5

    assert impatient.create("k", b"weights" * 2_000_000).size == 14_000_000

    assert server.writes == 1


def test_a_server_that_falls_silent_in_its_answer_is_asked_for_the_rest(server: SmallS3, impatient: Store) -> None:
    server.objects[OBJECT] = b"weights" * 2_000_000
    server.silent_after = 5_000_000
    started = time.monotonic()

    with impatient.open("k") as stream:
        assert stream.read() == b"weights" * 2_000_000

    assert server.reads == 2
    assert 1 < time.monotonic() - started < 20


def test_a_small_write_that_is_not_answered_is_tried_again(server: SmallS3, impatient: Store) -> None:
    server.faults = ["hang"]
    started = time.monotonic()

    impatient.create("k", b"manifest")

    assert server.writes == 2
    assert time.monotonic() - started < 20


def test_the_kernel_watches_a_connection_that_sends(server: SmallS3, store: Store) -> None:
    """As silence is not counted there; the client library's defaults, which a later one may change."""
    server.faults = ["lost reply"]
    store.create("k", b"weights" * 200_000)

    limits = {
        (
            connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
            connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
            + connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
            * connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
        )
        for connection in _connections_to(server)
    }

    assert limits == {(30_000, 1, 60)}


def _connections_to(server: SmallS3) -> Iterator[socket.socket]:
    """Of this process."""
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(descriptor))) as found:
            if found.type == socket.SOCK_STREAM and found.getpeername() == server.server_address:
                yield found

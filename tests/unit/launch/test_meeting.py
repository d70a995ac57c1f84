"""How nodes without names find node 0 through the artifact store."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nexa_train.errors import DamagedError, NotFoundError, RefusedError
from nexa_train.launch.meeting import MEET, Meeting, endpoint, hear, met, say
from nexa_train.store.memory import MemoryStore

KEY = "checkpoints/r/meetings/gang"


class Clock:
    """Time that passes in sleep alone; something may happen at a moment."""

    def __init__(self, *, at: float = 0.0, happens: Callable[[], object] = lambda: None) -> None:
        self.now, self.at, self.happens = 0.0, at, happens

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        before, self.now = self.now, self.now + seconds
        if before < self.at <= self.now:
            self.happens()


def test_whoever_comes_first_waits_for_node_0():
    store = MemoryStore()
    clock = Clock(at=30.0, happens=lambda: say(store, KEY, "10.0.0.7"))
    assert hear(store, KEY, clock=clock, sleep=clock.sleep) == "10.0.0.7"
    assert 30.0 <= clock.now <= 31.0
    assert hear(store, KEY, clock=clock, sleep=pytest.fail) == "10.0.0.7", "who comes late need not wait"


def test_a_node_0_that_never_comes_is_named_with_where_it_was_expected():
    clock = Clock()
    with pytest.raises(NotFoundError, match=rf"/{KEY}: node 0 did not say within 600 s where it is; its pod may wait"):
        hear(MemoryStore(), KEY, clock=clock, sleep=clock.sleep)
    assert 600 <= clock.now <= 602


def test_node_0_says_the_same_again_where_its_first_answer_was_lost_and_another_one_is_refused():
    store = MemoryStore()
    say(store, KEY, "10.0.0.7")
    say(store, KEY, "10.0.0.7")
    with pytest.raises(RefusedError, match=r"says that node 0 is at 10\.0\.0\.7, and this is node 0 at 10\.0\.0\.8"):
        say(store, KEY, "10.0.0.8")
    assert hear(store, KEY) == "10.0.0.7"


@pytest.mark.parametrize("content", [b"", b"evil.example", b"10.0.0.7 ", b"\xff", b"1" * 100])
def test_what_is_no_address_is_not_used(content: bytes):
    store = MemoryStore()
    store.create(KEY, content)
    with pytest.raises(DamagedError, match=r"holds b'.*', expected the IP address of node 0"):
        hear(store, KEY)


@pytest.mark.parametrize(
    ("address", "expected"), [("10.0.0.7", "10.0.0.7:29500"), ("fd00::7", "[fd00::7]:29500")], ids=["4", "6"]
)
def test_torchrun_understands_where_both_kinds_of_address_are(address: str, expected: str):
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    assert endpoint(address) == expected
    assert parse_rendezvous_endpoint(endpoint(address), -1) == (address, 29500)


def test_node_0_tells_and_the_others_are_told():
    store, told = MemoryStore(), []
    first, second = (Meeting("gang", f"10.0.0.{7 + index}").arguments("memory://m", "r", index) for index in (0, 1))
    assert first == [MEET, "memory://m", KEY, "0", "10.0.0.7"]
    assert second == [MEET, "memory://m", KEY, "1", "10.0.0.8"]
    clock = Clock(at=590.0, happens=lambda: told.extend(met(store, KEY, 0, "10.0.0.7")))
    # Late as it is, node 0 may not listen yet; but no node waits much longer than the ten minutes in all.
    waited = met(store, KEY, 1, "10.0.0.8", clock=clock, sleep=clock.sleep)
    assert waited == ["--rdzv-endpoint=10.0.0.7:29500", "--rdzv-conf=timeout=60"]
    assert told == ["--rdzv-endpoint=10.0.0.7:29500", "--rdzv-conf=timeout=600"]

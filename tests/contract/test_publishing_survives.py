"""Publishing survives resets, truncation, lost replies, a store that is ill, SIGKILL, and rivals, at a real MinIO.

At every moment of every round: no checkpoint is visible that lacks a byte, no byte that was committed changes, and
nothing that was reported as committed is gone unless retention may take it.
"""

from __future__ import annotations

import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.fault_proxy import Fault
from tests.cluster.minio import MinioServer
from tests.contract.publishing.attempt import Nursery
from tests.contract.publishing.rounds import KILLS, WEATHER, Phase, Plan, Round, draw

ROUNDS = 200
AT_ONCE = 4
WRITES = 26
"""Of an attempt that saves three steps and keeps one."""
# Other seeds are other rounds: a soak may be repeated, or go on where one ended.
SOAK_SEED = int(os.environ.get("NEXA_SOAK_SEED", "1000"))
SOAK_ROUNDS = int(os.environ.get("NEXA_SOAK_ROUNDS", "5000"))
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def minio(minio_server: MinioServer) -> Iterator[MinioServer]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in minio_server.env().items():
            patch.setenv(name, value)
        yield minio_server


@dataclass(frozen=True)
class Place:
    """Where rounds write: buckets by whether they keep versions, and a folder."""

    buckets: dict[bool, str]
    scratch: Path


@pytest.fixture
def place(minio: MinioServer, tmp_path: Path) -> Place:
    return Place({versioning: minio.make_bucket(versioning=versioning) for versioning in (True, False)}, tmp_path)


def carry_out(plans: Mapping[str, Plan], minio: MinioServer, nursery: Nursery, place: Place) -> list[Round]:
    """Rounds by name, a few at a time: each mostly waits."""

    def one(name: str) -> Round:
        plan = plans[name]
        prefix = f"{name}-{secrets.token_hex(3)}"
        done = Round(plan, minio, nursery, place.buckets[plan.versioning], prefix, place.scratch / prefix)
        if wrong := done.carry_out():
            raise AssertionError("\n".join([f"{name}: {plan}", *done.log, *wrong]))
        return done

    with ThreadPoolExecutor(AT_ONCE) as pool:
        started = [pool.submit(one, name) for name in plans]
        try:
            return [future.result() for future in started]
        finally:
            pool.shutdown(cancel_futures=True)


def test_random_rounds(minio: MinioServer, nursery: Nursery, place: Place) -> None:
    done = carry_out({f"seed-{seed}": draw(seed) for seed in range(ROUNDS)}, minio, nursery, place)

    struck = Counter(line.rpartition(" <- ")[2] for one in done for line in one.log if " <- " in line)
    ended = Counter(line.split("'")[1] for one in done for line in one.log if " ended " in line)
    assert set(struck) == {*WEATHER, *KILLS, "hold"}, struck
    assert min(ended["SupersededError"], ended["RefusedError"], ended[""]) > 10, ended


@pytest.mark.parametrize("fault", [*KILLS, "hold"])
def test_struck_at_every_write(minio: MinioServer, nursery: Nursery, place: Place, fault: Fault) -> None:
    """What is held arrives when a rival has committed all, thinned out, and ended: the writer was thought dead."""

    def plan(number: int) -> Plan:
        rivals: tuple[dict[int, Fault], ...] = ({},) if fault == "hold" else ()
        phase = Phase(attempts=({number: fault}, *rivals), one_by_one=True)
        return Plan(phases=(phase,), keep_last=1, versioning=False, count_writes=True)

    done = carry_out({f"write-{number}": plan(number) for number in range(1, WRITES + 2)}, minio, nursery, place)

    assert [any("<-" in line for line in one.log) for one in done] == [True] * WRITES + [False]


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_random_rounds_for_long(minio: MinioServer, nursery: Nursery, place: Place) -> None:
    began = time.monotonic()
    for first in range(SOAK_SEED, SOAK_SEED + SOAK_ROUNDS, ROUNDS):
        seeds = range(first, min(first + ROUNDS, SOAK_SEED + SOAK_ROUNDS))
        carry_out({f"seed-{seed}": draw(seed) for seed in seeds}, minio, nursery, place)
        print(f"{seeds.stop - SOAK_SEED} rounds in {time.monotonic() - began:.0f} s", flush=True)

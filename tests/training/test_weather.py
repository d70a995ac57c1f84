"""Two ranks save and go on through a store that misbehaves, and are killed: each to the bits of an undisturbed run.

How publishing alone survives is in tests/contract; here it is the saver, where every rank uploads its own pieces and
the first one commits, with real training around it, at a real MinIO.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from nexa_train.artifact.publish import newest_valid
from nexa_train.artifact.verify import verify
from nexa_train.config.load import load_job
from nexa_train.errors import NotFoundError
from nexa_train.store import open_store
from tests.cluster.fault_proxy import Fault, FaultProxy
from tests.cluster.minio import MinioServer
from tests.cluster.run import wait_until
from tests.contract.publishing.rounds import WEATHER
from tests.training.harness import Runs
from tests.training.nursery import Attempts, Nursery

pytestmark = [pytest.mark.training, pytest.mark.integration]

TRAINED = {"training": {"max_steps": 30, "save_every_steps": 2}, "optimizer": {"lr": 0.003}}
RUNS = 4
KILLS = 2
"""Of each run."""
MOST_ATTEMPTS = 40
STRUCK = 0.08
"""Of all requests; an attempt that is left in peace makes some hundreds."""


@pytest.fixture(scope="module")
def proxy(minio_server: MinioServer) -> Iterator[FaultProxy]:
    """Before the store; the variables of this process and of all that it starts lead to it."""
    standing = FaultProxy(upstream=(minio_server.address, minio_server.port))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**minio_server.env(), "AWS_ENDPOINT_URL": standing.endpoint}.items():
            patch.setenv(name, value)
        yield standing
    standing.close()


@pytest.fixture(scope="module")
def nursery(proxy: FaultProxy, cache: Path) -> Iterator[Nursery]:
    started = Nursery(cache)
    yield started
    started.close()


def weather(chance: random.Random, since: int) -> dict[int, Fault]:
    """What befalls the requests that come next."""
    return {number: chance.choice(WEATHER) for number in range(since, since + 5_000) if chance.random() < STRUCK}


def wait_for_requests(proxy: FaultProxy, count: int, pids: list[int]) -> None:
    """So many in all, or as many as there are."""

    def made() -> bool:
        return len(proxy.seen) >= count or not all(map(psutil.pid_exists, pids))

    wait_until(made, timeout_seconds=120, what="requests", interval_seconds=0.005)


def problems_of(uri: str) -> list[str]:
    """Of every checkpoint that can be seen."""
    try:
        return list(verify(uri).problems)
    except NotFoundError:
        return []


def test_two_ranks_end_with_the_same_bits_whatever_the_store_does_and_whoever_is_killed(
    nursery: Nursery, proxy: FaultProxy, minio_server: MinioServer, runs: Runs, tmp_path: Path, cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("NEXA_CACHE", str(cache))
    undisturbed = Attempts(nursery, runs.make(**TRAINED), tmp_path / "undisturbed").finish(2)
    digest = undisturbed["checkpoint"]["weights_digest"]
    bucket, attempts_made, kills = minio_server.make_bucket(), 0, Counter[int]()
    for number in range(RUNS):
        chance, run = random.Random(number), runs.make(**TRAINED)
        uri = f"s3://{bucket}/run-{number}"
        run.job.write_text(json.dumps({**json.loads(run.job.read_text()), "artifacts": {"uri": uri}}))
        attempts = Attempts(nursery, run, tmp_path / f"run-{number}")
        for _ in range(MOST_ATTEMPTS):
            pids = attempts.start(2)  # in peace: whoever starts a launcher starts it again
            if not pids:
                break  # all was committed, and then a rank was killed
            begun, chosen = len(proxy.seen), chance.randrange(2)
            proxy.faults = weather(chance, begun + 1)
            if kills[number] < KILLS:
                wait_for_requests(proxy, begun + chance.randrange(20, 160), pids)
                with suppress(ProcessLookupError):
                    os.kill(pids[chosen], signal.SIGKILL)
            codes = attempts.wait()
            proxy.faults = {}
            attempts_made += 1
            kills[number] += codes[chosen] == -signal.SIGKILL
            assert problems_of(uri) == [], "what is visible is whole at any time"
            if codes == [0, 0]:
                break
        newest = newest_valid(open_store(uri), load_job(run.job).run_id).committed
        assert newest is not None
        assert (newest.manifest.step, newest.manifest.weights_digest) == (30, digest), f"run {number}"
    asked, struck = len(proxy.seen), sum(" <- " in line for line in proxy.seen)
    print(f"{RUNS} runs, {attempts_made} attempts, {kills.total()} killed, {struck} of {asked} requests struck")
    assert struck > 50
    assert all(kills[number] for number in range(RUNS)), kills

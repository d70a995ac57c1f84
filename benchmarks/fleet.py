"""A fleet of small jobs before a control plane of its own: submitted, watched until each has ended, and accounted for.

Nothing is left between two turns: each has its own API server, etcd, controllers and fake nodes, all with their
client limits raised, so that what is compared is work and not somebody's default of twenty requests a second.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.machine import peak_bytes, resident_bytes
from tests.cluster.control_plane import ControlPlane, start_control_plane
from tests.cluster.process import Process

Object = dict[str, Any]

NAMESPACE = "fleet"
NUM_NODES = 12
"""Each takes 256 pods: enough for a thousand jobs of two that do not end."""
CREATES_AT_ONCE = 16
STALLED_SECONDS = 120


@dataclass(frozen=True)
class Side:
    """Who carries out jobs, and how one looks to them.

    Attributes:
        path: where jobs are created and watched, `{}` for the namespace.
        job: the job of that name.
        ended: whether it got where it is measured to.
        begin: starts what a bare control plane lacks; None: nothing is lacking.
    """

    name: str
    path: str
    job: Callable[[str], Object]
    ended: Callable[[Object], bool]
    begin: Callable[[ControlPlane], Process] | None = None


@dataclass
class Turn:
    """What one side did with its jobs; times are of one clock, processor seconds and bytes by program."""

    load_average: float
    created: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    processor_seconds: dict[str, float] = field(default_factory=dict)
    resident: int = 0
    peak: int = 0
    audit: list[Object] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the first creation to the last end."""
        return max(self.ended.values()) - min(self.created.values())

    @property
    def rate(self) -> float:
        """Jobs per second."""
        return len(self.ended) / self.seconds

    def rates(self, every: int) -> list[float]:
        """Jobs per second, each for so many ends in a row."""
        ends = [min(self.created.values()), *sorted(self.ended.values())[every - 1 :: every]]
        return [every / (later - earlier) for earlier, later in itertools.pairwise(ends)]

    def processor_ms(self, *programs: str) -> float:
        """Milliseconds of processor time a job; of all programs if none is named."""
        chosen = [seconds for name, seconds in self.processor_seconds.items() if not programs or name in programs]
        return 1000 * sum(chosen) / len(self.ended)


@dataclass(frozen=True)
class Load:
    """So many jobs: as fast as they can be created, at a steady rate, or never more unfinished ones than that."""

    num_jobs: int
    per_second: float = float("inf")
    unfinished: int = sys.maxsize


def take_turn(side: Side, load: Load, *, audit: bool = False) -> Turn:
    """Give a load to one side, on a control plane of its own; `audit`: keep what was asked of it."""
    with _control_plane(audit=audit) as plane:
        controller = side.begin(plane) if side.begin else None
        turn, before = Turn(os.getloadavg()[0]), _processor_seconds(plane)
        asyncio.run(_submit_and_watch(plane, side, load, turn))
        after = _processor_seconds(plane)
        turn.processor_seconds = {name: after[name] - before[name] for name in before}
        if controller:
            turn.resident, turn.peak = resident_bytes(controller.id.pid), peak_bytes(controller.id.pid)
        if plane.audit_log:
            turn.audit = list(read_audit(plane.audit_log))
    return turn


@contextmanager
def _control_plane(*, audit: bool) -> Iterator[ControlPlane]:
    plane = start_control_plane(audit=audit)
    try:
        plane.kubectl("create", "namespace", NAMESPACE)
        plane.fake_nodes(NUM_NODES, tainted=False)
        yield plane
    finally:
        plane.stop()


def _processor_seconds(plane: ControlPlane) -> dict[str, float]:
    """User and system time so far of each program (proc(5))."""
    names = [str(entry["name"]) for entry in plane.ledger.entries("process")]
    seconds: dict[str, float] = {}
    for name, process in zip(names, plane.ledger.processes(), strict=True):
        with suppress(FileNotFoundError):  # the training-operator is started once only to make its certificate
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            seconds[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


async def _submit_and_watch(plane: ControlPlane, side: Side, load: Load, turn: Turn) -> None:
    free, slots = asyncio.Semaphore(load.unfinished), asyncio.Semaphore(CREATES_AT_ONCE)
    # Made before the clock starts: both sides share their processors with this program.
    requests = {
        name: json.dumps(side.job(name)).encode() for name in (f"job-{number:05}" for number in range(load.num_jobs))
    }
    async with _session(plane) as api:

        async def create(name: str) -> None:
            turn.created[name] = time.monotonic()
            await _create(api, side.path.format(NAMESPACE), requests[name])
            slots.release()

        async def submit() -> None:
            started = time.monotonic()
            async with asyncio.TaskGroup() as creating:
                for number, name in enumerate(requests):
                    await free.acquire()
                    await asyncio.sleep(started + number / load.per_second - time.monotonic())
                    await slots.acquire()
                    creating.create_task(create(name))

        async def watch() -> None:
            async with asyncio.timeout(STALLED_SECONDS) as patience:
                async for body in _changes(api, side.path.format(NAMESPACE)):
                    name = body["metadata"]["name"]
                    if name not in turn.ended and side.ended(body):
                        turn.ended[name] = time.monotonic()
                        patience.reschedule(asyncio.get_running_loop().time() + STALLED_SECONDS)
                        free.release()
                    if len(turn.ended) == load.num_jobs:
                        return

        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(submit())
                both.create_task(watch())
        except* TimeoutError:
            message = f"{side.name}: no job ended for {STALLED_SECONDS} s; {len(turn.ended)} of {load.num_jobs} had"
            raise SystemExit(message) from None


@asynccontextmanager
async def _session(plane: ControlPlane) -> AsyncIterator[aiohttp.ClientSession]:
    trusted = ssl.create_default_context(cafile=str(plane.pki.ca))
    connector = aiohttp.TCPConnector(ssl=trusted, limit=CREATES_AT_ONCE + 1)
    headers = {"Authorization": f"Bearer {plane.token}"}
    timeout = aiohttp.ClientTimeout(total=None, connect=30)
    async with aiohttp.ClientSession(
        plane.server, connector=connector, headers=headers, timeout=timeout, read_bufsize=2**24
    ) as session:
        yield session


async def _create(api: aiohttp.ClientSession, path: str, body: bytes) -> None:
    async with api.post(path, data=body, headers={"Content-Type": "application/json"}) as answer:
        if answer.status != 201:
            raise SystemExit(f"POST {path}: {answer.status}: {(await answer.text())[:500]}")
        await answer.read()


async def _changes(api: aiohttp.ClientSession, path: str) -> AsyncIterator[Object]:
    """Every state of every object, from now on; begun anew where the server ends it."""
    version = "0"
    while True:
        async with api.get(path, params={"watch": "true", "resourceVersion": version}) as answer:
            if answer.status == 429:
                # A kind that was defined a moment ago is not served at once.
                await asyncio.sleep(0.1)
                continue
            answer.raise_for_status()
            async for line in answer.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise SystemExit(f"watch {path}: {event['object'].get('message')}")
                version = event["object"]["metadata"]["resourceVersion"]
                yield event["object"]


def read_audit(log: Path) -> Iterator[Object]:
    """Requests that were answered, from a log and what was rotated away from it."""
    for file in sorted(log.parent.glob(f"{log.stem}*{log.suffix}")):
        with file.open() as lines:
            for line in lines:
                if '"stage":"ResponseComplete"' in line:
                    yield json.loads(line)


def condition_is_true(body: Object, kind: str) -> bool:
    """Whether a condition in its status says so."""
    conditions = body.get("status", {}).get("conditions") or []
    return any(each["type"] == kind and each["status"] == "True" for each in conditions)

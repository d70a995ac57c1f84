"""What the operator counts, and the server that says so: /metrics for Prometheus, /healthz for the kubelet.

/healthz is answered by the loop that does the work, so an answer means that the loop turns. It asks nothing of the
API server: an outage there is no reason to restart the operator. No label has more values than this module knows:
what a trainer, a job or the API server says is looked up here first.
"""

from __future__ import annotations

import datetime
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from nexa_operator import goodput
from nexa_operator.observe import NODE_GONE, NODE_NOT_READY
from nexa_operator.reading import created_at
from nexa_train.config.protocol import KILLED_FOR_MEMORY, NOT_MET, OUT_OF_MEMORY
from nexa_train.errors import NexaError

OTHER = "other"
PHASES = ("Pending", "Queued", "Running", "Restarting", "Suspending", "Suspended", "Succeeded", "Failed")


def _names(error: type[NexaError]) -> Iterator[str]:
    yield error.__name__
    for kind in error.__subclasses__():
        yield from _names(kind)


CAUSES = frozenset(
    (
        *_names(NexaError),
        *(OUT_OF_MEMORY, NOT_MET, "Killed", "Stalled", "Stopped"),
        *("DeadlineExceeded", "Disrupted", NODE_GONE, NODE_NOT_READY, "PodDeleted"),
        *("ContainerCannotRun", "Evicted", "NodeShutdown", KILLED_FOR_MEMORY, "StartError"),
        *("MemoryError", "OSError", "OutOfMemoryError", "RuntimeError", "ValueError"),
    )
)
"""Causes with a series of their own: Nexa's errors, the entrypoint's words, the operator's, the kubelet's, Python's. A
trainer's last words may name any other; it is counted as `other`."""

_QUICK = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SLOW = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)


@dataclass(kw_only=True)
class Metrics:
    """One set an operator, in a registry of its own."""

    clock: Callable[[], float] = time.monotonic
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    _heard_at: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        registry = self.registry
        self.reconcile_seconds = Histogram(
            "nexa_reconcile_seconds", "Time of one look at one job.", buckets=_QUICK, registry=registry
        )
        self.reconcile_errors = Counter(
            "nexa_reconcile_errors", "Looks that ended with an error, by its class.", ["error"], registry=registry
        )
        self.queue_depth = Gauge("nexa_queue_depth", "Jobs waiting for a look.", registry=registry)
        self._api_calls = Counter(
            "nexa_api_calls", "Calls to the API server, watches aside.", ["verb", "code"], registry=registry
        )
        self._restarts = Counter(
            "nexa_restarts", "Attempts that were lost and followed by another.", ["cause"], registry=registry
        )
        self._first_step = Histogram(
            "nexa_time_to_first_step_seconds",
            "From a job's first gang to its first step.",
            buckets=_SLOW,
            registry=registry,
        )
        self._watch_age = Gauge(
            "nexa_watch_age_seconds", "Since a watch last told anything, or began.", ["kind"], registry=registry
        )
        self._resync_age = Gauge("nexa_resync_age_seconds", "Since all jobs were last listed.", registry=registry)
        self._jobs = Gauge("nexa_jobs", "Jobs when last listed, by phase.", ["phase"], registry=registry)
        self._goodput = Gauge(
            "nexa_goodput_seconds", "Time of these jobs, by what it went to.", ["state"], registry=registry
        )
        self._resynced_at = self.clock()
        self._resync_age.set_function(lambda: self.clock() - self._resynced_at)

    def called(self, verb: str, status: int) -> None:
        """An answer of the API server; status 0: none came."""
        self._api_calls.labels(verb, f"{status // 100}xx" if status else "none").inc()

    def failed(self, error: Exception) -> None:
        """A look that ended with an error."""
        self.reconcile_errors.labels(type(error).__name__).inc()

    def restarted(self, cause: str) -> None:
        """An attempt was lost and is followed by another."""
        self._restarts.labels(cause if cause in CAUSES else OTHER).inc()

    def heard(self, kind: str) -> None:
        """The watch of that kind told something, or began."""
        if kind not in self._heard_at:
            self._watch_age.labels(kind).set_function(lambda: self.clock() - self._heard_at[kind])
        self._heard_at[kind] = self.clock()

    def listed(self, jobs: Iterable[Mapping[str, Any]], now: datetime.datetime) -> None:
        """All jobs were listed; of each, when it was created and its status count."""
        self._resynced_at = self.clock()
        all_status = [(job.get("status") or {}, created_at(job)) for job in jobs]
        phases = Tally(status.get("phase", "Pending") for status, _ in all_status)
        for phase in PHASES:
            self._jobs.labels(phase).set(phases.pop(phase, 0))
        self._jobs.labels(OTHER).set(phases.total())
        # A job that runs quietly writes nothing: what has passed since is added.
        spent = [goodput.read(*each).until(now) for each in all_status]
        for state in goodput.STATES:
            self._goodput.labels(state).set(sum(seconds.get(state, 0.0) for seconds in spent))

    def told(self, old: Mapping[str, Any], new: Mapping[str, Any], now: datetime.datetime) -> None:
        """A job's status was written. Counted once a job, for status remembers: no attempt takes it back to none."""
        if not old.get("step") and new.get("step") and "startTime" in new:
            started = datetime.datetime.fromisoformat(new["startTime"])
            self._first_step.observe(max(0.0, (now - started).total_seconds()))


@asynccontextmanager
async def serving(metrics: Metrics, *, port: int) -> AsyncIterator[int]:
    """Serve until the end of the block; port 0 takes a free one on loopback. Gives the port."""

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def exposition(_: web.Request) -> web.Response:
        body = generate_latest(metrics.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/metrics", exposition)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        # On all addresses of both families; a free port is chosen for each family, so then for one only.
        site = web.TCPSite(runner, host=None if port else "127.0.0.1", port=port)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()

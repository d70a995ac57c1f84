"""What the operator counts, and the server that says so: /metrics for Prometheus, /healthz for the kubelet.

/healthz is answered by the loop that does the work, so an answer means that the loop turns. It asks nothing of the
API server: an outage there is no reason to restart the operator.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """One set an operator, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.reconcile_seconds = Histogram(
            "nexa_reconcile_seconds", "Time of one look at one job.", registry=self.registry
        )
        self.reconcile_errors = Counter(
            "nexa_reconcile_errors", "Looks that ended with an error, by its class.", ["error"], registry=self.registry
        )
        self.queue_depth = Gauge("nexa_queue_depth", "Jobs waiting for a look.", registry=self.registry)
        self.restarts = Counter(
            "nexa_restarts", "Attempts that were lost and followed by another.", ["cause"], registry=self.registry
        )


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

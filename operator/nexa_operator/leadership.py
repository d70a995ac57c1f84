"""A Lease that only one operator holds. Beside the reconciler: it opens and closes the gate before its workers.

A lost Lease pauses; the process goes on, keeps its watches and acts again once it holds the Lease.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import aiohttp
import structlog
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from nexa_operator.naming import FIELD_MANAGER

log = structlog.get_logger(__name__)

LEASE_SECONDS = 15
_RENEW_SECONDS = 10
_RETRY_SECONDS = 2


async def lead_forever(api: Any, *, namespace: str, gate: asyncio.Event) -> None:
    """Keep `gate` set exactly while this operator holds the Lease; without a namespace, always."""
    if not namespace:
        gate.set()
        await asyncio.Event().wait()
    while True:
        try:
            await LeaderElection(_election(api, namespace, gate)).run()
        except (aiohttp.ClientError, TimeoutError, OSError) as exc:
            log.warning("lease out of reach", error=repr(exc))
        gate.clear()
        await asyncio.sleep(_RETRY_SECONDS)


def _election(api: Any, namespace: str, gate: asyncio.Event) -> Config:
    async def open_gate() -> None:
        gate.set()
        log.info("lease held", namespace=namespace)

    async def close_gate() -> None:
        gate.clear()
        log.warning("lease lost", namespace=namespace)

    # The pod's name: a container that was restarted in its pod goes on with the Lease that it had.
    lock = LeaseLock(FIELD_MANAGER, namespace, socket.gethostname(), api)
    return Config(
        lock,
        lease_duration=LEASE_SECONDS,
        renew_deadline=_RENEW_SECONDS,
        retry_period=_RETRY_SECONDS,
        onstarted_leading=open_gate,
        onstopped_leading=close_gate,
    )

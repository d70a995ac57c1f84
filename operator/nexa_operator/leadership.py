"""A Lease that only one operator holds. Beside the reconciler: it opens and closes the gate before its workers.

A lost Lease pauses; the process goes on, keeps its watches and acts again once it holds the Lease. The election of
`kubernetes.aio` 37.0 is not used: it cannot create a Lease (its own models refuse the request that it makes), and
it ends when the API server does not answer.
"""

from __future__ import annotations

import asyncio
import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from nexa_operator.cluster import Cluster, Object
from nexa_operator.errors import ApiError, ConflictError
from nexa_operator.kinds import LEASES

log = structlog.get_logger(__name__)

LEASE_SECONDS = 15
"""Another operator takes over when the Lease was not renewed for so long."""
GIVE_UP_SECONDS = 8
"""This one stops acting before that."""
RETRY_SECONDS = 2
ASK_SECONDS = 4
"""A server that hangs must not keep this one from giving up: asking and waiting once more still ends before that."""


@dataclass(kw_only=True)
class Lease:
    """The Lease as one candidate sees it. Clocks of other machines are not trusted: only change counts."""

    cluster: Cluster
    namespace: str
    name: str
    identity: str
    clock: Callable[[], float] = time.monotonic
    _seen: object = None
    _seen_at: float = 0.0

    async def hold(self) -> bool:
        """Take or renew it; False if another holds it. Raises ApiError."""
        lease = await self.cluster.read(LEASES, self.namespace, self.name)
        if lease is None:
            return await self.cluster.create(LEASES, self._document(""))
        if not self._may_take(lease):
            return False
        try:
            await self.cluster.patch(LEASES, self._document(lease["metadata"]["resourceVersion"]))
        except ConflictError:
            return False
        return True

    async def release(self) -> None:
        """Let it go if it is held here, so that the next one need not wait. Raises ApiError."""
        lease = await self.cluster.read(LEASES, self.namespace, self.name) if self.namespace else None
        if lease is not None and (lease.get("spec") or {}).get("holderIdentity") == self.identity:
            await self.cluster.patch(LEASES, self._document(lease["metadata"]["resourceVersion"], holder=""))

    def _may_take(self, lease: Object) -> bool:
        spec = lease.get("spec") or {}
        if spec.get("holderIdentity") in (None, "", self.identity):
            return True
        seen = (spec["holderIdentity"], spec.get("renewTime"))
        if seen != self._seen:
            self._seen, self._seen_at = seen, self.clock()
        return self.clock() - self._seen_at > float(spec.get("leaseDurationSeconds", LEASE_SECONDS))

    def _document(self, version: str, holder: str | None = None) -> Object:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        # With its version, so that of two candidates only one succeeds.
        known = {"resourceVersion": version} if version else {}
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self.name, "namespace": self.namespace, **known},
            "spec": {
                "holderIdentity": self.identity if holder is None else holder,
                "leaseDurationSeconds": LEASE_SECONDS,
                "renewTime": now,
            },
        }


async def lead_forever(lease: Lease, *, gate: asyncio.Event) -> None:
    """Keep `gate` set exactly while the Lease is held; without a namespace for it, always."""
    if not lease.namespace:
        gate.set()
        await asyncio.Event().wait()
    renewed_at = -float("inf")
    while True:
        # For others it begins to run out when the server has it, which is before its answer is here.
        asked_at = lease.clock()
        held = await _try_to_hold(lease, timeout_seconds=ASK_SECONDS)
        renewed_at = asked_at if held else renewed_at
        lost = held is False or lease.clock() - renewed_at > GIVE_UP_SECONDS
        if gate.is_set() == lost:
            log.info("lease", held=not lost, identity=lease.identity)
        if lost:
            gate.clear()
        else:
            gate.set()
        await asyncio.sleep(RETRY_SECONDS)


async def _try_to_hold(lease: Lease, *, timeout_seconds: float) -> bool | None:
    """None: the API server did not say."""
    try:
        # Not wait_for: that of Python 3.11 may swallow the end of this task, which would then never end.
        async with asyncio.timeout(timeout_seconds):
            return await lease.hold()
    except (ApiError, TimeoutError) as exc:
        log.warning("lease out of reach", error=repr(exc))
        return None

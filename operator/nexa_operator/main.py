"""`python -m nexa_operator.main`: settings, the real adapters, and kopf around them. Ends on SIGTERM and SIGINT."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator
from typing import Any

import httpx
import kopf
import structlog

from nexa_operator.cluster import Cluster, KubernetesCluster, connected
from nexa_operator.errors import ApiError, WatchError
from nexa_operator.handlers import CHILDREN, registry_of
from nexa_operator.kinds import TRAINING_JOBS
from nexa_operator.leadership import Lease, lead_forever
from nexa_operator.metrics import Metrics, serving
from nexa_operator.naming import LABEL_JOB_UID
from nexa_operator.plan import Defaults
from nexa_operator.progress import ProgressReader
from nexa_operator.reconcile import Key, Reconciler
from nexa_operator.settings import Settings
from nexa_operator.stateless import NoEssence, NoProgress
from nexa_operator.workqueue import WorkQueue
from nexa_train.errors import NexaError

log = structlog.get_logger(__name__)

_CRD_WAIT_SECONDS = 2.0
_LIST_SECONDS = 60
_IDLE_SECONDS = 0.5
_END_SECONDS = 20
_WIND_DOWN_SECONDS = 12
"""Half of it kopf waits for what goes on; well before its own end, at which it kills the process."""
_RELEASE_SECONDS = 4
_BEGIN_AGAIN_SECONDS = 2.0
_COLLECTIONS = (3_000, 5, 5)
"""Python's 700 are what a few events of a watch leave at once, none of it in cycles. With (10_000, 10, 10) a thousand
jobs at once take 153 MiB instead of 115."""


class _Forever:
    """Delays between retries that never end: an API server that is down is waited for, not given up."""

    def __iter__(self) -> Iterator[float]:
        yield from (0.5, 1, 2, 4)
        while True:
            yield 8


def main() -> None:
    """Run until told to stop."""
    try:
        settings = Settings.from_environment(os.environ)
    except NexaError as exc:
        print(exc, file=sys.stderr)
        raise SystemExit(exc.exit_code) from exc
    configure_logging(settings.log_level)
    collect_seldom()
    while not _ended_in_order(settings):
        time.sleep(_BEGIN_AGAIN_SECONDS)


def _ended_in_order(settings: Settings) -> bool:
    """False if the watches gave up. All that counts is in the cluster: to begin again is as good as a new process."""
    try:
        asyncio.run(run(settings))
    except WatchError as exc:
        log.error("begins again", error=repr(exc.__cause__), in_seconds=_BEGIN_AGAIN_SECONDS)
        return False
    return True


async def run(settings: Settings) -> None:
    """Everything that runs, in one event loop."""
    told_to_stop = asyncio.Event()
    # Until kopf hears it: a signal that nobody hears does not end the first process of a container.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_stop.set)
    queue: WorkQueue[Key] = WorkQueue()
    metrics = Metrics()
    metrics.queue_depth.set_function(lambda: len(queue))
    async with (
        connected() as api,
        httpx.AsyncHTTPTransport() as http,
        serving(metrics, port=settings.metrics_port) as port,
    ):
        log.info("started", metrics_port=port, namespace=settings.watch_namespace or "all")
        cluster = KubernetesCluster(api, on_call=metrics.called)
        reader = ProgressReader(on_news=queue.add, transport=http, interval_seconds=settings.progress_interval_seconds)
        defaults = Defaults(
            image=settings.trainer_image,
            heavy_image=settings.trainer_heavy_image,
            storage=settings.default_storage,
            nvidia_devices=settings.nvidia_devices,
        )
        reconciler = Reconciler(
            cluster=cluster,
            queue=queue,
            progress=reader,
            metrics=metrics,
            defaults=defaults,
            reads_nodes=not settings.watch_namespace,
        )
        lease = Lease(
            cluster=cluster,
            namespace=settings.lease_namespace,
            name=settings.lease_name,
            identity=settings.identity,
        )
        gate = asyncio.Event()
        namespace = settings.watch_namespace
        beside: list[Coroutine[Any, Any, object]] = [
            told_to_stop.wait(),
            lead_forever(lease, gate=gate),
            reconciler.resync_forever(
                namespace=namespace, interval_seconds=settings.resync_interval_seconds, may_act=gate
            ),
            reader.read_forever(),
            *(reconciler.work_forever(may_act=gate) for _ in range(settings.num_workers)),
        ]
        await _until_first_ends([*beside, _watch(settings, cluster, reconciler, may_act=gate)])
        # Nothing is done any more. Left to expire, the Lease would hold up the next operator for 15 seconds.
        with contextlib.suppress(ApiError, TimeoutError):
            await asyncio.wait_for(lease.release(), _RELEASE_SECONDS)


async def _until_first_ends(coroutines: list[Coroutine[Any, Any, object]]) -> None:
    """A signal ends kopf or, before that has begun, what waits for it; anything else that ends is a fault, and ends the
    operator too."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        ended = await _first_ended(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    ended.result()


async def _first_ended(tasks: Iterable[asyncio.Task[Any]]) -> asyncio.Task[Any]:
    """kopf, when it ends, cancels all that is new in its loop, parts of a look too; what counts is why it ends."""
    waiting = set(tasks)
    while True:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.cancelled():
                return task


async def _watch(settings: Settings, cluster: Cluster, reconciler: Reconciler, *, may_act: asyncio.Event) -> None:
    """kopf: watches, and nothing of its own on any object. Who waits for his turn would only gather what comes by."""
    await _wait_for_crd(cluster, settings.watch_namespace)
    await may_act.wait()
    registry = registry_of(
        reconciler.changed, reconciler.queue, is_over=reconciler.is_over, heard=reconciler.metrics.heard
    )
    ours = asyncio.all_tasks()
    tasks = await kopf.spawn_tasks(
        registry=registry,
        settings=kopf_settings(settings),
        standalone=True,
        clusterwide=not settings.watch_namespace,
        namespaces=[settings.watch_namespace] if settings.watch_namespace else [],
    )
    await run_until_wound_down(tasks, asyncio.create_task(kopf.run_tasks(tasks, ignored=ours)))


def _take_own_place() -> None:
    os.execv(sys.executable, [sys.executable, "-m", "nexa_operator.main"])  # noqa: S606 - nothing of it is from outside


async def run_until_wound_down(
    tasks: Collection[asyncio.Task[None]],
    running: asyncio.Task[None],
    *,
    limit_seconds: float = _WIND_DOWN_SECONDS,
    begin_anew: Callable[[], None] = _take_own_place,
) -> None:
    """Wait for kopf's end.

    Where one watch fails while another one reconnects, kopf 1.45 never ends: a task that it cancels from a callback is
    not cancelled. It would then kill the process; this one takes its own place before that, and needs no restart.

    Args:
        tasks: kopf's, of which none ends before it winds down. running: which winds them down.

    Raises:
        WatchError: kopf gave up.
    """
    try:
        done, _ = await asyncio.wait({*tasks, running}, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        running.cancel()
        await asyncio.wait({running})
        raise
    failed = next((task.exception() for task in done if not task.cancelled() and task.exception()), None)
    if failed:
        await asyncio.wait({running}, timeout=limit_seconds)
        if not running.done():
            log.error("begins anew", error=repr(failed), reason="kopf does not come to its end")
            begin_anew()
    try:
        await running
    except Exception as exc:
        raise WatchError from exc


async def _wait_for_crd(cluster: Cluster, namespace: str) -> None:
    """kopf looks for resources once: without rights on CRDs it does not hear of later ones."""
    while True:
        try:
            await anext(cluster.walk(TRAINING_JOBS, namespace), None)
            return
        except ApiError as exc:
            log.warning("waiting for NexaTrainingJobs to be served", error=str(exc))
            await asyncio.sleep(_CRD_WAIT_SECONDS)


def kopf_settings(ours: Settings) -> kopf.OperatorSettings:
    """What differs from kopf's defaults, each for a reason."""
    settings = kopf.OperatorSettings()
    # No rights on namespaces and CRDs are needed when neither is watched.
    settings.scanning.disabled = True
    # Events about jobs are ours to write, from status.
    settings.posting.enabled = False
    settings.persistence.diffbase_storage = NoEssence()
    settings.persistence.progress_storage = NoProgress()
    settings.networking.error_backoffs = _Forever()
    settings.networking.connect_timeout = 10
    # A list without an answer would hold up its watch for five minutes.
    settings.networking.request_timeout = _LIST_SECONDS
    # A connection can die without a word: then nothing comes, not even the bookmarks.
    settings.watching.inactivity_timeout = ours.watch_silence_seconds
    settings.process.ultimate_exiting_timeout = _END_SECONDS
    # Each object that spoke of late keeps its last event in memory for so long; 5 by default.
    settings.queueing.idle_timeout = _IDLE_SECONDS
    for child in CHILDREN:
        # By the server: the other pods of a big cluster never cross the wire.
        settings.watching.label_selectors[child] = LABEL_JOB_UID
    return settings


def collect_seldom() -> None:
    """Look for cycles less often, and never among what was imported: a tenth of the operator's processor time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTIONS)


def configure_logging(level: int) -> None:
    """One JSON object a line, for our records and those of libraries alike."""
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.JSONRenderer(sort_keys=True),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    # A line for every request and every event of a watch says nothing that a metric does not.
    for chatty in ("httpx", "kopf.objects"):
        logging.getLogger(chatty).setLevel(max(level, logging.WARNING))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


if __name__ == "__main__":
    main()

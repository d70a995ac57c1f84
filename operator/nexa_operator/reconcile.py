"""Observe -> decide -> write status -> apply -> tell: one look at one job. After the queue, before the cluster.

A look starts from the world as it is now and takes nothing from the event that caused it. Status is written
before the decision is carried out: facts that a deleted child showed are then on record, and a look that was cut
short is simply taken again.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import structlog

from nexa_operator import naming, parting, queueing
from nexa_operator.children import Children
from nexa_operator.cluster import Cluster, Object
from nexa_operator.decide import (
    Decision,
    Expire,
    Fail,
    Hold,
    Linger,
    Probe,
    Rest,
    Restart,
    Resume,
    Shrink,
    Starting,
    Succeed,
    Suspend,
    Wait,
    Watch,
    decide,
    next_look_seconds,
    rest,
)
from nexa_operator.errors import ApiError, ConflictError, InvalidError, RuntimeUnavailableError
from nexa_operator.kinds import EVENTS, JOBS, NODES, PODS, TRAINING_JOBS, WORKLOADS
from nexa_operator.metrics import Metrics
from nexa_operator.news import LATER_SECONDS
from nexa_operator.observe import (
    STOPPING,
    UNAVAILABLE,
    Gang,
    Observed,
    Rank,
    finished_of,
    ignored_seconds,
    nodes_of_lost_ranks,
    observe,
    observe_unavailable,
    pods_due_seconds,
    read_record,
    refusal_in,
    silence_of,
    with_nodes,
    with_order,
    with_remembered,
)
from nexa_operator.plan import Defaults, RunPlan, as_begun, image_of, make_plan, storage_of
from nexa_operator.progress import ProgressReader, Target
from nexa_operator.reading import Body, Ref, condition_of, created_at, is_deleting, label_of
from nexa_operator.runtimes import beside, runtime_of
from nexa_operator.spec import is_ours, parse
from nexa_operator.status import (
    WAITING_FOR_ADMISSION,
    Context,
    Happening,
    caught_up,
    happenings,
    next_status,
    timestamp,
)
from nexa_operator.workqueue import WorkQueue
from nexa_train.config import API_VERSION, KIND, Job
from nexa_train.errors import ConfigError

log = structlog.get_logger(__name__)

_GONE_SECONDS = 2.0
_SERVED_SECONDS = 10.0
_NEW_SECONDS = 60.0
_KUEUE_SECONDS = 3.0
_UNSEEN_SECONDS = 60.0
_REFUSAL_SECONDS = 30.0
"""Between two questions for what a gang's owner was refused: the server looks through all events of the namespace."""
_STANDS_SECONDS = 1.0
"""Until the pods of a gang that others keep room for stand in line for it."""
_RESYNC_AGAIN_SECONDS = 5.0
_ROOM_SECONDS = 60.0
_LATE_SECONDS = 0.05
"""Timers and the clock are not the same: a look that comes a moment too early would be for nothing."""


@dataclass(frozen=True, order=True)
class Key:
    """One NexaTrainingJob, for as long as it exists."""

    namespace: str
    name: str
    uid: str


def now_utc() -> datetime.datetime:
    """The operator's clock."""
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True)
class _Refusal:
    """Why pods of a gang could not be made, and when that was asked."""

    gang: str
    at: datetime.datetime
    said: str


@dataclass(frozen=True, kw_only=True)
class _Loss:
    """When this operator first saw that a gang cannot go on, and all ranks that it saw lost. One that is let go begins
    anew."""

    gang: str
    begun_at: datetime.datetime | None
    since: datetime.datetime
    ranks: tuple[Rank, ...] = ()


@dataclass(kw_only=True)
class Reconciler:
    """One look after the other; never two at the same job at once."""

    cluster: Cluster
    queue: WorkQueue[Key]
    progress: ProgressReader[Key]
    metrics: Metrics
    defaults: Defaults
    reads_nodes: bool = False
    """Nodes belong to no namespace: an operator for one namespace has no right to them."""
    clock: Callable[[], datetime.datetime] = now_utc
    _children: Children = field(init=False)
    _trouble: dict[Key, str] = field(default_factory=dict)
    _invalid: dict[Key, str] = field(default_factory=dict)
    _over: set[Key] = field(default_factory=set)
    _losses: dict[Key, _Loss] = field(default_factory=dict)
    _refusals: dict[Key, _Refusal] = field(default_factory=dict)
    _rooms_left: dict[Key, datetime.datetime] = field(default_factory=dict)
    """When this operator last removed pods that kept room free."""
    _rooms_useless: dict[Key, datetime.datetime] = field(default_factory=dict)
    """When it last did so because the job could make nothing of that room."""
    _attended: dict[Key, datetime.datetime] = field(default_factory=dict)
    """When this operator last counted itself at a job that parts."""
    _versions: dict[Key, str] = field(default_factory=dict)
    """The resourceVersion of what was just heard of a job, or written to it: the next look will do with that."""

    def __post_init__(self) -> None:
        self._children = Children(cluster=self.cluster)

    def changed(self, key: Key, version: str) -> None:
        """Look at it; `version`: its resourceVersion, as it was heard."""
        self._versions[key] = version
        self.queue.add(key)

    def is_over(self, key: Key) -> bool:
        """Whether the job has ended and nothing of it is left to remove."""
        return key in self._over

    async def work_forever(self, *, may_act: asyncio.Event) -> None:
        """Take jobs from the queue while this operator is the one that acts."""
        while True:
            await may_act.wait()
            key = await self.queue.take()
            # The Lease may have gone while there was nothing to take.
            await may_act.wait()
            try:
                await self._look(key)
            finally:
                self.queue.done(key)

    async def resync_forever(self, *, namespace: str, interval_seconds: float, may_act: asyncio.Event) -> None:
        """Look at every job now and then, whether or not anything was heard of it; metrics hear of all in any case."""
        while True:
            seconds = interval_seconds
            try:
                told: list[Body] = []
                async for body in self.cluster.walk(TRAINING_JOBS, namespace):
                    told.append(_summary(body))
                    if may_act.is_set() and not _rests_for_good(body):
                        self.queue.add(key_of(body))
                self.metrics.listed(told, self.clock())
            except ApiError as exc:
                log.warning("resync failed", error=str(exc))
                # Soon: after an outage, failed looks wait longer than this.
                seconds = min(interval_seconds, _RESYNC_AGAIN_SECONDS)
            except Exception as exc:
                # Whatever one job's status says: an operator that ends looks at none of the others either.
                log.warning("resync failed", error=str(exc), exc_info=True)
            await asyncio.sleep(seconds)

    async def _look(self, key: Key) -> None:
        try:
            with self.metrics.reconcile_seconds.time():
                await self.reconcile(key)
        except ConflictError:
            self.queue.add(key)
        except Exception as exc:
            self.metrics.failed(exc)
            delay = self.queue.add_again(key)
            known = isinstance(exc, ApiError)
            log.warning("look failed", job=key.name, namespace=key.namespace, error=str(exc), retry_seconds=delay,
                        exc_info=not known)  # fmt: skip
        else:
            self.queue.forget_failures(key)

    async def reconcile(self, key: Key) -> None:
        """One look. Raises ApiError; the look is then taken again."""
        self._over.discard(key)  # until this look has seen that it is
        # Taken away: after a look that fails or conflicts, and after one that wrote nothing, the latest is asked for.
        version = self._versions.pop(key, "")
        body = await self.cluster.read(TRAINING_JOBS, key.namespace, key.name, not_older=version)
        if body is None or body["metadata"]["uid"] != key.uid:
            self._forget(key)
            self.queue.cancel(key)
            self._attended.pop(key, None)
        elif not is_ours(body):
            return
        elif is_deleting(body):
            # Its children go with it by garbage collection.
            self._forget(key)
            if parting.holds(body):
                await self._part(key, body)
        elif parting.wants_hold(body):
            await self._set_finalizers(body, [*body["metadata"].get("finalizers", ()), naming.FINALIZER])
            self.queue.add(key)
        else:
            await self._reconcile(key, body)

    async def _reconcile(self, key: Key, body: Body) -> None:
        seen = await self._observe(key, body)
        # Of the first checkpoint the last words of a rank may be the first to tell.
        defaults = as_begun(self.defaults, body.get("status") or {}, committed=seen.checkpoint is not None)
        job, decision = judge(body, seen, defaults=defaults, now=self.clock(), invalid=self._invalid.get(key, ""))
        if isinstance(decision, Rest | Expire):
            self._forget(key)
            context = self._context(key, body, job, seen)
            status = caught_up(body.get("status") or {}, seen=seen, decision=decision, context=context)
            await self._write_status(key, body, status)
            await self._tell_all(key, body, status, decision)
            await self._clear(key, body, seen, decision)
            if seen.unavailable:
                # A gang may be there, and run, and nobody tells when it can be seen again.
                self.queue.add_after(key, _UNSEEN_SECONDS)
            elif not _is_left(seen, decision):
                self._over.add(key)
            await self._end(key, decision)
            return
        if isinstance(decision, Linger):
            self.queue.add_after(key, decision.seconds + _LATE_SECONDS)
            return
        if isinstance(decision, Starting | Hold):
            self._rooms_useless.pop(key, None)  # at another size it may be of use
        self._follow(key, job, seen, decision)
        self._look_again(key, body, job, seen, decision)
        context = self._context(key, body, job, seen)
        if job is not None and isinstance(decision, Starting):
            context = replace(context, image=image_of(job, defaults), storage=storage_of(job, defaults) or "")
        status = next_status(body.get("status") or {}, seen=seen, decision=decision, context=context)
        await self._write_status(key, body, status)
        self.metrics.told(body.get("status") or {}, status, context.now)
        if isinstance(decision, Restart):
            self.metrics.restarted(decision.loss.cause)
        await self._tell_all(key, body, status, decision)
        await self._carry_out(key, {**body, "status": status}, job, seen, decision)
        if isinstance(decision, Succeed) and not _is_left(seen, decision):
            self._forget(key)
            self._over.add(key)
            self.queue.cancel(key)
            await self._end(key, Rest(remaining_seconds=_ttl_seconds(body)))

    def _look_again(self, key: Key, body: Body, job: Job | None, seen: Observed, decision: Decision) -> None:
        """At what nobody will tell of."""
        due = list(_unwatched(body, seen, decision, now=self.clock()))
        clock = None if job is None else next_look_seconds(seen, decision, spec=job.spec, now=self.clock())
        for seconds in due if clock is None else [*due, clock]:
            self.queue.add_after(key, seconds + _LATE_SECONDS)

    async def _observe(self, key: Key, body: Body) -> Observed:
        runtime = runtime_of(body)
        if runtime.KIND == JOBS and self._is_new(body):
            return observe(body, children=(), pods=())
        besides = (JOBS,) if ((body.get("spec") or {}).get("cluster") or {}).get("minNodes") else ()
        children: list[Object] = []
        # Pods last: a gang that has failed is then never seen beside ranks that are said to run.
        for kind in dict.fromkeys((runtime.KIND, *runtime.PARTS, *besides)):
            listed = await _if_served(self._children.of(kind, key.namespace, key.uid))
            if listed is None and kind == runtime.KIND:
                return observe_unavailable(body)
            children += listed or []
        # Without a gang only a job that had one can have pods.
        has_pods = bool(children or body.get("status"))
        pods = await self._children.of(PODS, key.namespace, key.uid) if has_pods else []
        seen = observe(body, children=children, pods=pods, progress=self.progress.latest(key))
        left_at, useless_at = self._rooms_left.get(key), self._rooms_useless.get(key)
        if left_at or useless_at:
            seen = replace(seen, room_left_at=left_at, room_useless_at=useless_at)
        queue = _queue_of(body)
        if queue and seen.gang and seen.gang.suspended:
            return replace(seen, admission=await self._admission(key.namespace, queue, seen.gang))
        if self.reads_nodes and seen.gang and not seen.record.finished and not seen.gang.deleting:
            seen = replace(seen, gang=await self._with_nodes(seen.gang))
        seen = self._with_loss(key, seen)
        if seen.gang and pods_due_seconds(seen, self.clock()) == 0.0:
            said = await self._refusal(key, seen.gang)
            return replace(seen, refusal=said or silence_of(seen.gang, runtime.PROVIDER))
        return seen

    def _is_new(self, body: Body) -> bool:
        """Whether nothing can be there of it: a gang comes after a status, and nobody has lost the status yet."""
        created = created_at(body)
        is_young = created is not None and (self.clock() - created).total_seconds() < _NEW_SECONDS
        return is_young and not body.get("status")

    def _with_loss(self, key: Key, seen: Observed) -> Observed:
        """With what this operator saw before of a gang that cannot go on: since when, which ranks went first, and those
        that are gone since."""
        before, gang = self._losses.pop(key, None), seen.gang
        if gang is None:
            return replace(seen, lost_seconds=0.0)
        if before is None or (before.gang, before.begun_at) != (gang.uid, gang.begun_at):
            before = _Loss(gang=gang.uid, begun_at=gang.begun_at, since=self.clock())
        if not (gang.suspended or gang.deleting):  # else nobody asks why its ranks go
            gang = with_order(with_remembered(gang, before.ranks))
        if not (gang.failure or gang.lost_ranks):
            return replace(seen, lost_seconds=0.0)
        self._losses[key] = replace(before, ranks=gang.lost_ranks)
        return replace(seen, gang=gang, lost_seconds=(self.clock() - before.since).total_seconds())

    async def _with_nodes(self, gang: Gang) -> Gang:
        """What the nodes of lost ranks say of themselves, as far as one may ask."""
        names = nodes_of_lost_ranks(gang)
        if not names:
            return gang  # nearly every look: nothing is to be copied for it
        try:
            nodes = await asyncio.gather(*(self.cluster.read(NODES, "", name) for name in names))
        except ApiError as exc:
            # They explain a loss; without them another attempt is made all the same.
            log.warning("nodes not read", gang=gang.name, error=str(exc))
            return gang
        return with_nodes(gang, dict(zip(names, nodes, strict=True)))

    async def _admission(self, namespace: str, queue: str, gang: Gang) -> str:
        labels = f"{queueing.LABEL_GANG_UID}={gang.uid}"
        return queueing.waits_for(queue, await _if_served(self.cluster.list(WORKLOADS, namespace, labels)))

    async def _refusal(self, key: Key, gang: Gang) -> str:
        """As it was said last, or is said now where that is long ago."""
        now, before = self.clock(), self._refusals.get(key)
        if before and before.gang == gang.uid and (now - before.at).total_seconds() < _REFUSAL_SECONDS:
            return before.said
        said = await self._ask_for_refusal(key.namespace, gang)
        self._refusals[key] = _Refusal(gang.uid, now, said)
        return said

    async def _ask_for_refusal(self, namespace: str, gang: Gang) -> str:
        try:
            asked = [f"involvedObject.uid={uid},type=Warning" for uid in gang.owners]
            told = [event for each in asked for event in await self.cluster.list(EVENTS, namespace, fields=each)]
        except ApiError as exc:
            # It explains, and decides nothing.
            log.warning("events not read", gang=gang.name, namespace=namespace, error=str(exc))
            return ""
        return refusal_in(told, gang)

    def _context(self, key: Key, body: Body, job: Job | None, seen: Observed) -> Context:
        return Context(
            generation=body["metadata"].get("generation", 0),
            created=created_at(body),
            run_id=job.run_id if job else "",
            num_nodes=seen.record.num_nodes or (job.spec.cluster.num_nodes if job else 0),
            progress_deadline_seconds=job.spec.recovery.progress_deadline_seconds if job else 0,
            now=self.clock(),
            trouble=self._trouble.get(key, ""),
            progress_known=self.progress.is_known(key),
        )

    def _follow(self, key: Key, job: Job | None, seen: Observed, decision: Decision) -> None:
        """Tell the progress reader whom to ask, if there is anyone."""
        rank = seen.gang.rank_zero if seen.gang and isinstance(decision, Watch | Probe) else None
        if job is not None and rank is not None and rank.ip and rank.phase == "Running":
            target = Target(ip=rank.ip, run_id=job.run_id, attempt=seen.record.attempt)
            self.progress.watch(key, target)
        else:
            self.progress.forget(key)

    async def _write_status(self, key: Key, body: Body, status: Object) -> None:
        if status == (body.get("status") or {}):
            return
        metadata = {name: body["metadata"][name] for name in ("name", "namespace", "uid", "resourceVersion")}
        document = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "status": status}
        written = await self.cluster.patch(TRAINING_JOBS, document, subresource="status")
        # What was heard in the meantime may be later, and the look that it asks for must not see less.
        self._versions.setdefault(key, written["metadata"]["resourceVersion"])

    async def _carry_out(self, key: Key, body: Body, job: Job | None, seen: Observed, decision: Decision) -> None:
        kind = runtime_of(body).KIND
        try:
            for gang in _to_remove(seen, decision):
                # Of a job that is over: after its pods, so that their last words can still be read.
                over = isinstance(decision, Fail)
                await self.cluster.delete(kind, key.namespace, gang.name, uid=gang.uid, children_first=over)
            if isinstance(decision, Suspend) and seen.gang is not None:
                await self._suspend(key, body, seen.gang.ref, decision)
            if job is not None and isinstance(decision, Probe):
                await self._ask_for_room(key, body, job, seen, decision)
            # Before the gang: where that is refused nothing is to keep nodes from others.
            for room in _rooms_to_remove(key, seen, decision, now=self.clock()):
                self._rooms_left[key] = self.clock()
                if isinstance(decision, Probe) and decision.pauses:
                    self._rooms_useless[key] = self.clock()
                await self.cluster.delete(JOBS, key.namespace, room.name, uid=room.uid)
            if job is not None and _begins(decision):
                await self._create(key, body, self._plan(key, body, job))
        except ConflictError:
            # What this look saw is gone; the next one sees what has its name.
            raise
        except ApiError as exc:
            self._trouble[key] = str(exc)
            raise
        self._trouble.pop(key, None)

    async def _suspend(self, key: Key, body: Body, gang: Ref, decision: Suspend) -> None:
        runtime = runtime_of(body)
        if decision.withdraw:
            # After its pods, so that their last words can still be read.
            await self.cluster.delete(runtime.KIND, key.namespace, gang.name, uid=gang.uid, children_first=True)
        else:
            # By its UID, which the server compares: a namesake of a job that was deleted is not to stop.
            metadata = {"namespace": key.namespace, "name": gang.name, "uid": gang.uid}
            await self.cluster.patch(runtime.KIND, {"metadata": metadata, "spec": runtime.suspension()})

    async def _clear(self, key: Key, body: Body, seen: Observed, decision: Decision) -> None:
        """What a finished job has left to do, also where the look that finished it was cut short."""
        for gang in _to_remove(seen, decision):
            await self.cluster.delete(
                runtime_of(body).KIND, key.namespace, gang.name, uid=gang.uid, children_first=True
            )
        for room in seen.rooms:
            await self.cluster.delete(JOBS, key.namespace, room.name, uid=room.uid)

    def _plan(self, key: Key, body: Body, job: Job) -> RunPlan:
        """Of the attempt on record."""
        status = body["status"]
        record = read_record(status)
        return make_plan(
            job,
            owner_uid=key.uid,
            attempt=record.attempt,
            defaults=as_begun(self.defaults, status, committed=bool(status.get("checkpoint"))),
            num_nodes=record.num_nodes,
            excluded_nodes=record.excluded_nodes,
            out_of_memory_attempt=record.out_of_memory_attempt,
        )

    async def _ask_for_room(self, key: Key, body: Body, job: Job, seen: Observed, decision: Probe) -> None:
        if seen.rooms or decision.pauses:
            return
        try:
            await self.cluster.create(JOBS, beside.room(self._plan(key, body, job), num_pods=decision.num_pods))
        except ApiError as exc:
            # The gang runs, and goes on as it is.
            await self._tell(key, body, Happening(type="Warning", reason="RoomNotAskedFor", message=str(exc)))
            self.queue.add_after(key, _ROOM_SECONDS)

    async def _part(self, key: Key, body: Body) -> None:
        """One look at a job that takes its artifacts with it."""
        now = self.clock()
        if key not in self._attended or (now - self._attended[key]).total_seconds() >= parting.SPAN_SECONDS:
            # Before anything that may fail, or end this operator.
            await self._patch(body, {"annotations": {naming.ANNOTATION_SPANS: str(parting.spans_of(body) + 1)}})
            self._attended[key] = now
            return await self.reconcile(key)
        runtime = runtime_of(body)
        kinds = (runtime.KIND, JOBS, PODS)
        listed = [await _if_served(self._children.of(kind, key.namespace, key.uid)) or [] for kind in kinds]
        gangs = [each for each in listed[0] if not label_of(each, naming.LABEL_ROLE)]
        step = parting.next_step(body, gangs=gangs, jobs=listed[1], pods=listed[2], now=now)
        if isinstance(step, parting.Clear):
            for gang in step.gangs:
                await self.cluster.delete(runtime.KIND, key.namespace, gang.name, uid=gang.uid)
        elif isinstance(step, parting.Remove):
            step = await self._remove_artifacts(key, body)
        if isinstance(step, parting.LetGo):
            await self._let_go(key, body, step)
        else:
            self.queue.add_after(key, parting.LOOK_SECONDS)

    async def _remove_artifacts(self, key: Key, body: Body) -> parting.Step:
        status = body.get("status") or {}
        try:
            plan = self._plan(key, {**body, "status": status}, parse(body))
            if status.get("image"):
                # Nobody tells of what ranks commit as they go: it lies where they were told to put it.
                plan = replace(plan, storage=status.get("storage"))
            await self.cluster.create(JOBS, beside.removal(plan))
        except (ConfigError, RuntimeUnavailableError, InvalidError) as exc:
            return parting.LetGo(problem=str(exc))  # asking again would change nothing
        except ApiError as exc:
            if exc.status != 403 or "being terminated" not in str(exc):
                raise
            # In a namespace that is being deleted nothing can be created any more.
            return parting.LetGo(problem=str(exc))
        return parting.Await()

    async def _let_go(self, key: Key, body: Body, step: parting.LetGo) -> None:
        message = f"left where they are: {step.problem}" if step.problem else "all of the run"
        reason = "ArtifactsLeft" if step.problem else "ArtifactsRemoved"
        await self._tell(
            key, body, Happening(type="Warning" if step.problem else "Normal", reason=reason, message=message)
        )
        others = [name for name in body["metadata"]["finalizers"] if name != naming.FINALIZER]
        await self._set_finalizers(body, others)

    async def _set_finalizers(self, body: Body, finalizers: list[str]) -> None:
        await self._patch(body, {"finalizers": finalizers})

    async def _patch(self, body: Body, change: Body) -> None:
        """The job's metadata, if it is still as it was seen."""
        metadata = {name: body["metadata"][name] for name in ("name", "namespace", "resourceVersion")}
        await self.cluster.patch(TRAINING_JOBS, {"metadata": {**metadata, **change}})

    async def _create(self, key: Key, body: Body, plan: RunPlan) -> None:
        try:
            created = [await self.cluster.create(kind, document) for kind, document in runtime_of(body).objects(plan)]
        except InvalidError as exc:
            self._invalid[key] = str(exc)
            raise
        if created[-1]:
            said = f"attempt {plan.attempt} with {plan.cluster.num_nodes} pods"
            await self._tell(key, body, Happening(type="Normal", reason="Created", message=said))

    async def _end(self, key: Key, decision: Rest | Expire) -> None:
        if isinstance(decision, Expire):
            await self.cluster.delete(TRAINING_JOBS, key.namespace, key.name, uid=key.uid)
        elif decision.remaining_seconds is not None:
            self.queue.add_after(key, decision.remaining_seconds)

    async def _tell_all(self, key: Key, body: Body, status: Object, decision: Decision) -> None:
        """Of what the new status says and the one before did not."""
        for happening in happenings(body.get("status") or {}, status, decision):
            await self._tell(key, body, happening)

    async def _tell(self, key: Key, body: Body, happening: Happening) -> None:
        log.info("event", job=key.name, namespace=key.namespace, reason=happening.reason, message=happening.message)
        try:
            await self.cluster.create(EVENTS, _event(key, body, happening, now=self.clock()))
        except ApiError as exc:
            # An event is for people; what happened is in status.
            log.warning("event not written", job=key.name, namespace=key.namespace, error=str(exc))

    def _forget(self, key: Key) -> None:
        self.progress.forget(key)
        self._versions.pop(key, None)
        self._trouble.pop(key, None)
        self._invalid.pop(key, None)
        self._losses.pop(key, None)
        self._refusals.pop(key, None)
        self._rooms_left.pop(key, None)
        self._rooms_useless.pop(key, None)


def key_of(body: Body) -> Key:
    """The key of a NexaTrainingJob."""
    metadata = body["metadata"]
    return Key(namespace=metadata["namespace"], name=metadata["name"], uid=metadata["uid"])


async def _if_served(listing: Coroutine[Any, Any, list[Object]]) -> list[Object] | None:
    """None: the cluster does not serve that kind, now."""
    try:
        return await listing
    except ApiError as exc:
        if exc.status == 404:
            return None
        raise


def _summary(body: Body) -> Body:
    """What metrics ask of all jobs at once; whole bodies of a fleet would fill the memory."""
    status = body.get("status") or {}
    created = {"creationTimestamp": body["metadata"].get("creationTimestamp")}
    return {"metadata": created, "status": {key: status[key] for key in ("phase", "goodput") if key in status}}


def _rests_for_good(body: Body) -> bool:
    return _ttl_seconds(body) is None and bool(finished_of(body.get("status") or {}))


def _ttl_seconds(body: Body) -> int | None:
    """Also of a job that this operator does not understand."""
    ttl = ((body.get("spec") or {}).get("schedule") or {}).get("ttlSecondsAfterFinished")
    return ttl if type(ttl) is int and ttl >= 0 else None


def judge(
    body: Body, seen: Observed, *, defaults: Defaults, now: datetime.datetime, invalid: str = ""
) -> tuple[Job | None, Decision]:
    """The job and what to do about it; no job where this operator cannot carry it out. Pure.

    Pods that run have their image, and were understood: what was taken away since is missed only where others follow.
    `invalid`: what the server said to the last gang that was made of this job, if it can never take such a one.
    """
    try:
        job = parse(body)
        decision = decide(seen, spec=job.spec, now=now)
        if isinstance(decision, Starting):
            image_of(job, defaults)
            if invalid:
                raise ConfigError(invalid)
    except (ConfigError, RuntimeUnavailableError) as exc:
        if seen.record.finished:
            return None, rest(seen, ttl_seconds=_ttl_seconds(body), now=now)
        # Begun by an operator that understood it, of another version: it is not to die of this one's ignorance.
        if seen.gang is not None and seen.gang.succeeded:
            return None, Succeed()
        if seen.gang is not None and _is_enough(body, seen.gang):
            return None, Watch(problem=str(exc))
        if isinstance(exc, RuntimeUnavailableError):
            return None, Wait(reason=UNAVAILABLE, message=str(exc))  # for whoever runs this operator
        return None, Fail(reason="ConfigRejected", message=str(exc))
    return job, decision


def _is_enough(body: Body, gang: Gang) -> bool:
    """Whether no other attempt is needed: it runs, or waits for its pods or its turn. Ranks that go because their queue
    suspends them are not lost."""
    if gang.failure or gang.deleting:
        return False
    return bool(_queue_of(body)) if gang.suspended else not gang.lost_ranks


def _queue_of(body: Body) -> str:
    """Also of a job that this operator does not understand; empty: it names none."""
    return ((body.get("spec") or {}).get("schedule") or {}).get("queueName") or ""


def _unwatched(body: Body, seen: Observed, decision: Decision, *, now: datetime.datetime) -> Iterator[float]:
    """How soon to look again at what nobody tells of; pods and Jobs alone are watched, so that no CRD need be there."""
    if _begins(decision) or isinstance(decision, Fail) or (isinstance(decision, Succeed) and _is_left(seen, decision)):
        yield LATER_SECONDS  # what becomes of the new gang; what is left of a job that is over, and its time to live
    if isinstance(decision, Wait) and decision.seconds is None:
        yield _SERVED_SECONDS
    if seen.gang is not None and seen.gang.deleting:
        yield _GONE_SECONDS
    # Kueue takes a moment to say what is missing; later changes of its mind are for the resync.
    first_seen = condition_of(body.get("status") or {}, "Queued").get("reason") != WAITING_FOR_ADMISSION
    if seen.admission and first_seen:
        yield _KUEUE_SECONDS
    due = pods_due_seconds(seen, now)
    if due is not None and not seen.refusal:
        yield due or _REFUSAL_SECONDS
    if seen.rooms and (_begins(decision) or due):
        yield _STANDS_SECONDS
    if ignored := ignored_seconds(seen.gang, now):
        yield ignored


def _to_remove(seen: Observed, decision: Decision) -> tuple[Ref, ...]:
    """Gangs that have no future. The failed gang of a failed job stays: its pods' logs say why."""
    gang = seen.gang
    if gang is None or gang.deleting:
        return seen.leftovers
    if isinstance(decision, Restart | Resume | Shrink):
        return (*seen.leftovers, gang.ref)
    # Over time, refused by an operator that was upgraded, or one whose runtime makes pods anew: nothing else ends it.
    ended = gang.complete or gang.failure or any(rank.phase == "Failed" for rank in gang.ranks)
    runs_on = isinstance(decision, Fail | Rest | Expire) and not ended
    return (*seen.leftovers, gang.ref) if runs_on else seen.leftovers


def _is_left(seen: Observed, decision: Decision) -> bool:
    """Whether a job that is over has something to be removed, or ranks that may still commit."""
    ending = seen.gang is not None and seen.gang.deleting
    return bool(_to_remove(seen, decision) or seen.rooms or ending)


def _rooms_to_remove(key: Key, seen: Observed, decision: Decision, *, now: datetime.datetime) -> list[Ref]:
    """All but what is asked for, or kept free until the gang that it is for stands in line for it."""
    if isinstance(decision, Watch) and pods_due_seconds(seen, now):
        return []  # no longer than until its pods are late: a quota may have no place for both
    resizes = isinstance(decision, Suspend) and decision.resizes
    forgives = isinstance(decision, Probe | Resume) and decision.forgives  # those asked for room elsewhere
    pauses = isinstance(decision, Probe) and decision.pauses
    stops = isinstance(decision, Wait) and decision.reason == STOPPING  # other waits last as long as somebody likes
    keeps = resizes or stops or (isinstance(decision, Probe | Resume) and not pauses)
    kept = naming.room_name(key.name, seen.record.attempt) if keeps and not forgives else ""
    return [room for room in seen.rooms if room.name != kept]


def _begins(decision: Decision) -> bool:
    """Whether the attempt on record is to be made now."""
    return isinstance(decision, Starting) and not (isinstance(decision, Restart) and decision.wait_seconds > 0)


def _event(key: Key, body: Body, happening: Happening, *, now: datetime.datetime) -> Object:
    name = naming.event_name(key.name, key.uid, happening.reason, happening.message)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": key.namespace},
        "type": happening.type,
        "reason": happening.reason,
        "message": happening.message,
        "count": 1,
        "firstTimestamp": timestamp(now),
        "lastTimestamp": timestamp(now),
        "source": {"component": naming.FIELD_MANAGER},
        "reportingComponent": naming.FIELD_MANAGER,
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": key.name,
            "namespace": key.namespace,
            "uid": key.uid,
            "resourceVersion": body["metadata"]["resourceVersion"],
        },
    }

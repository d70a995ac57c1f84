"""Raw children and earlier status -> Observed: frozen facts. Comes after listing, before `decide.py`; pure.

Children are bucketed once, here; nothing after this module sees a Kubernetes object.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import ValidationError

from nexa_operator import goodput, naming
from nexa_operator.reading import (
    Body,
    Ref,
    as_time,
    condition_of,
    created_at,
    first_true,
    is_deleting,
    is_true,
    label_of,
    owner_uid,
    ref_of,
)
from nexa_operator.runtimes import Runtime, runtime_of
from nexa_operator.runtimes.base import resumed_at
from nexa_train.config.protocol import KILLED_FOR_MEMORY, CheckpointRef, Progress, Termination

_READY = "Ready"
NODE_NOT_READY = "NodeNotReady"
NODE_GONE = "NodeGone"
_IN_ORDER = ("EvictionByEvictionAPI", "PreemptionByScheduler")
"""Disruptions whose pods are asked to go, by a drain for example, and given the time that they ask for."""
RESIZING, STOPPING = "Resizing", "Stopping"
"""Reasons in status while a gang is ended by this operator's will, besides schedule.suspend."""
UNAVAILABLE = "RuntimeUnavailable"
"""Reason in status while this operator can begin no attempt, which may leave a gang suspended that is to go on."""
_MOST_NODES = 8
_MOST_DIGITS = 9
_NO_INDEX = -1
_LATE_SECONDS = 10.0
"""A controller with nothing in its way has made a gang's pods long before, also where it makes those of a thousand."""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One pod of a gang."""

    index: int
    phase: str = "Pending"
    ip: str = ""
    exit_code: int | None = None
    reason: str = ""
    """Why its container ended or waits, in the kubelet's words: OOMKilled, ImagePullBackOff."""
    message: str = ""
    finished_at: str = ""
    termination: Termination | None = None
    output: str = ""
    """What is left of one that ended without last words: the end of its log, or why its container did not start."""
    disruption: str = ""
    """Reason of its DisruptionTarget: evicted, preempted, its node lost or shut down."""
    deleting: bool = False
    replaced: bool = False
    """Its pod ran and is gone. The runtime makes another, with which the others will not go on."""
    gone_by: datetime.datetime | None = None
    """When it is deleted: until then the kubelet lets its containers end by themselves."""
    node: str = ""
    node_conditions: frozenset[str] = frozenset()
    """What is true of that node: its conditions, where one that ends in Ready and is false counts as one that ends in
    NotReady; or NodeGone. Known of lost ranks, where nodes may be read."""
    unplaced_since: datetime.datetime | None = None
    """Since when the scheduler has found no node for it; None: it has one, or was not tried yet."""
    untried_since: datetime.datetime | None = None
    """Since when no scheduler has tried to find a node for it; None: one has."""
    scheduler: str = ""
    """Which of them should."""
    began: bool = True
    """Whether its kubelet has made anything of its containers."""
    uid: str = ""
    """Of its pod."""
    went_first: bool = False
    """Whether it was seen to go before any had failed: it did not go of that, and others may have failed of it."""

    @property
    def disrupted(self) -> bool:
        return self.disruption != ""

    @property
    def never_began(self) -> bool:
        """Whether its kubelet refused it: after a reboot for want of devices, or as the node shuts down."""
        return self.phase == "Failed" and not self.began

    @property
    def commits(self) -> bool:
        """Whether it was asked to go and is given time, on a node that is there: it commits what it has trained."""
        in_order = self.deleting and self.disruption in _IN_ORDER
        return in_order and not self.ended and self.node_conditions.isdisjoint((NODE_GONE, NODE_NOT_READY))

    @property
    def ended(self) -> bool:
        return self.phase in ("Succeeded", "Failed")

    @property
    def ending_order(self) -> tuple[bool, str, int]:
        """Sorts those that ended first before the others, and before those that have not."""
        return self.finished_at == "", self.finished_at, self.index

    @property
    def lost(self) -> bool:
        """Whether the gang cannot go on with it."""
        return self.phase == "Failed" or self.replaced or (self.deleting and self.phase != "Succeeded")


@dataclass(frozen=True, kw_only=True)
class Gang:
    """What carries one attempt, with its pods in the order of their indices."""

    name: str
    attempt: int
    uid: str = ""
    suspended: bool = False
    deleting: bool = False
    complete: bool = False
    failure: str = ""
    """Why it failed, in one word."""
    failure_message: str = ""
    ranks: tuple[Rank, ...] = ()
    forerunners: tuple[Rank, ...] = ()
    """Of before its queue suspended it and let it go again: while they are there it may lack pods in their place."""
    owners: tuple[str, ...] = ()
    """UIDs of what should make its pods."""
    begun_at: datetime.datetime | None = None
    """When it was made or, later, let go by its queue."""
    was_suspended: bool = False
    """Whether it was, and goes on since."""
    lacks_parts: bool = False
    """Whether nothing is there of what stands between it and its pods, on a runtime where something does."""

    @property
    def ref(self) -> Ref:
        return Ref(self.name, self.uid)

    @property
    def leaving(self) -> tuple[Rank, ...]:
        """Forerunners that have not ended."""
        return tuple(rank for rank in self.forerunners if not rank.ended)

    @property
    def lost_ranks(self) -> tuple[Rank, ...]:
        return tuple(rank for rank in self.ranks if rank.lost)

    @property
    def succeeded(self) -> bool:
        """Whether it is complete and no rank that cannot have ended well stands against that: controllers adopt pods
        that carry their labels, whoever made them, count those as theirs, and delete the ranks that are left over."""
        ended_well = {rank.index for rank in self.ranks if rank.phase == "Succeeded"}
        return self.complete and all(rank.index in ended_well for rank in self.lost_ranks if not rank.replaced)

    @property
    def goes_on(self) -> bool:
        """Whether its ranks are there, and nothing ends them."""
        return bool(self.ranks) and not (self.failure or self.lost_ranks or self.suspended or self.deleting)

    @property
    def num_up(self) -> int:
        """Pods that run or have ended well."""
        return sum(rank.phase in ("Running", "Succeeded") and not rank.deleting for rank in self.ranks)

    @property
    def num_placed(self) -> int:
        """Pods that have a node."""
        return sum(rank.node != "" and not rank.deleting for rank in self.ranks)

    @property
    def rank_zero(self) -> Rank | None:
        return next((rank for rank in self.ranks if rank.index == 0 and not rank.deleting), None)

    @property
    def last_words(self) -> Termination | None:
        """Of rank 0 or, where it left none, of another rank that has trained: they are at the same step."""
        zeros = (rank.termination for rank in self.ranks if rank.index == 0)
        others = (rank.termination for rank in self.ranks if rank.termination and rank.termination.trained_seconds)
        return next(filter(None, (*zeros, *others)), None)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What earlier reconciles wrote to status: facts that the children may no longer show."""

    attempt: int = 0
    num_nodes: int | None = None
    """Pods of that attempt; None: not begun."""
    ran: bool = False
    """Whether all pods of that attempt have run at once."""
    restarts: int = 0
    charged: int = 0
    losses: int = 0
    adapted: int = 0
    not_before: datetime.datetime | None = None
    """The attempt on record may not begin before."""
    excluded_nodes: tuple[str, ...] = ()
    step_at_last_failure: int = -1
    out_of_memory_attempt: int | None = None
    """The last one that failed, if a pod of it was killed for memory as a whole."""
    checkpoint: CheckpointRef | None = None
    finished: str = ""
    """Succeeded or Failed, once one of them is true: it never changes again."""
    completed_at: datetime.datetime | None = None
    account: goodput.Account = field(default_factory=goodput.Account)
    suspends: bool = True
    """Whether a gang that is suspended may be so by this operator's will; False: it asked for nothing of the kind."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Everything that a decision needs to know of the world."""

    record: Record = field(default_factory=Record)
    gang: Gang | None = None
    """Of the attempt on record."""
    leftovers: tuple[Ref, ...] = ()
    """Gangs of other attempts."""
    unavailable: str = ""
    """What is missing for the job's runtime to be seen at all, and what to do; empty: nothing."""
    admission: str = ""
    """What a suspended gang waits for in its queue."""
    refusal: str = ""
    """Why pods of this gang cannot be made, in the words of what should make them."""
    rooms: tuple[Ref, ...] = ()
    """Jobs whose pods ask for nothing but room."""
    room: int = 0
    """How many pods of the one beside this gang have found a node."""
    room_since: datetime.datetime | None = None
    """When the last of these found it."""
    room_left_at: datetime.datetime | None = None
    """When this operator last gave up what kept room free; None: it never did."""
    room_useless_at: datetime.datetime | None = None
    """When this operator last gave up room of which the job could make nothing; None: it never did."""
    strays: tuple[Rank, ...] = ()
    """Pods of the attempt on record that outlive its gang: somebody deleted that, and they end by and by."""
    others: tuple[Rank, ...] = ()
    """Pods of the job's other gangs: of attempts that were lost, and that may still commit."""
    room_wanted_since: datetime.datetime | None = None
    """Since when pods that ask for room have found none, all of them; None: none asks in vain."""
    progress: Progress | None = None
    """What pod 0 of the gang said last; None: nothing that is of this run and attempt."""
    lost_seconds: float = math.inf
    """Since this gang was first seen to have failed, or to have lost a rank."""

    @property
    def ranks(self) -> tuple[Rank, ...]:
        """All of the attempt on record, those of before a preemption first; or what outlives its gang."""
        return (*self.gang.forerunners, *self.gang.ranks) if self.gang else self.strays

    @property
    def checkpoint(self) -> CheckpointRef | None:
        """The newest one known, from status, progress or the last words of any rank.

        Rank 0 commits, and what it says of this attempt counts against the record: it may have found the newest one
        damaged. The others may not have heard of its last one yet. Of equal steps the one told of last counts: after a
        damaged checkpoint its step is committed once more.
        """
        told = [(rank.index, rank.termination.checkpoint) for rank in self.ranks if rank.termination]
        first = [checkpoint for index, checkpoint in told if index == 0]
        committed = newest(self.progress.checkpoint if self.progress else None, *first) or self.record.checkpoint
        return newest(committed, *(checkpoint for _, checkpoint in told))


def newest(*checkpoints: CheckpointRef | None) -> CheckpointRef | None:
    """The one of the highest step; the last of equals."""
    known = [checkpoint for checkpoint in reversed(checkpoints) if checkpoint is not None]
    return max(known, key=lambda checkpoint: checkpoint.step, default=None)


def observe(
    body: Body, *, children: Sequence[Body], pods: Sequence[Body], progress: Progress | None = None
) -> Observed:
    """Sort what was listed into the attempt on record and leftovers.

    Args:
        children: of the runtime's kind, and its parts, and Jobs beside the gang.
    """
    uid, record = body["metadata"]["uid"], read_record(body.get("status") or {}, created_at(body))
    own = [child for child in children if owner_uid(child) == uid]
    rooms = [
        child for child in own if label_of(child, naming.LABEL_ROLE) == naming.ROLE_ROOM and not is_deleting(child)
    ]
    ours = {_attempt(child): child for child in own if not label_of(child, naming.LABEL_ROLE)}
    # A later gang than on record: an old view of the job, or its status was lost. That gang is the one that lives.
    record = replace(record, attempt=max((record.attempt, *ours)))
    current = ours.get(record.attempt)
    if current is not None:
        record = replace(record, num_nodes=_size(current) or record.num_nodes)
    asking = [pod for pod in pods if _asks_for_room(pod, rooms, record.attempt)]
    placed = [at for pod in asking if (at := _scheduled_at(pod, "True"))]
    refused = [at for pod in asking if (at := _scheduled_at(pod, "False"))]
    leftovers = (child for attempt, child in sorted(ours.items()) if attempt != record.attempt)
    gang = _gang(body, current, children, pods) if current else None
    apart = [pod for pod in pods if gang is None or owner_uid(pod) not in gang.owners]
    return Observed(
        record=record,
        gang=gang,
        leftovers=tuple(ref_of(child) for child in leftovers if not is_deleting(child)),
        rooms=tuple(ref_of(child) for child in rooms),
        room=len(placed),
        room_since=max(placed, default=None),
        room_wanted_since=max(refused, default=None),
        strays=() if gang else _ranks(body, (pod for pod in apart if _attempt(pod) == record.attempt)),
        others=_ranks(body, (pod for pod in apart if gang or _attempt(pod) != record.attempt)),
        progress=progress if progress is not None and progress.attempt == record.attempt else None,
    )


def _asks_for_room(pod: Body, rooms: Sequence[Body], attempt: int) -> bool:
    """Whether a pod asks for a node, or holds one, for the rest of the gang."""
    asks = owner_uid(pod) in {room["metadata"]["uid"] for room in rooms} and _attempt(pod) == attempt
    phase = (pod.get("status") or {}).get("phase", "Pending")
    return asks and not is_deleting(pod) and phase in ("Pending", "Running")


def _scheduled_at(pod: Body, answer: str) -> datetime.datetime | None:
    """Since when that has been the scheduler's answer; None: it is not."""
    scheduled = condition_of(pod.get("status") or {}, "PodScheduled")
    return as_time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == answer else None


def _ranks(body: Body, pods: Iterable[Body]) -> tuple[Rank, ...]:
    """Those among the pods, but for those that ask for room or remove artifacts."""
    runtime = runtime_of(body)
    own = (pod for pod in pods if not label_of(pod, naming.LABEL_ROLE) and _index(runtime, pod) is not None)
    return tuple(_rank(runtime, pod, replaces=False) for pod in own)


def _size(gang: Body) -> int | None:
    return _number(label_of(gang, naming.LABEL_NODES))


def observe_unavailable(body: Body) -> Observed:
    """What is known where nothing serves the runtime's kind, so that nothing can be there of it."""
    runtime = runtime_of(body)
    kind = f"{runtime.KIND.plural}.{runtime.KIND.group}"
    message = f"the cluster does not serve {kind}: install {runtime.PROVIDER}, or use schedule.runtime job"
    return Observed(record=read_record(body.get("status") or {}, created_at(body)), unavailable=message)


def finished_of(status: Body) -> str:
    """Succeeded or Failed; empty: neither is true yet."""
    return next((kind for kind in ("Succeeded", "Failed") if is_true(status, kind)), "")


def read_record(status: Body, created: datetime.datetime | None = None) -> Record:
    """Lenient: status is written by this operator, maybe by an older one. Only the account asks since when the job is
    there."""
    failure, account = status.get("lastFailure") or {}, goodput.read(status, created)
    why_queued = condition_of(status, "Queued").get("reason")
    return Record(
        attempt=status.get("attempt", 0),
        num_nodes=status.get("numNodes"),
        ran=is_true(status, "Running"),
        restarts=status.get("restarts", 0),
        charged=status.get("chargedRestarts", 0),
        losses=status.get("lossesWithoutCheckpoint", 0),
        adapted=status.get("adaptedRestarts", 0),
        not_before=as_time(status.get("nextAttemptTime")),
        excluded_nodes=tuple(status.get("excludedNodes") or ()),
        step_at_last_failure=failure.get("checkpointStep", -1),
        out_of_memory_attempt=failure.get("attempt") if failure.get("cause") == KILLED_FOR_MEMORY else None,
        checkpoint=_read_checkpoint(status.get("checkpoint")),
        finished=finished_of(status),
        completed_at=as_time(status.get("completionTime")),
        account=account,
        suspends=account.state in ("", goodput.SUSPENDED) or why_queued in (RESIZING, STOPPING, UNAVAILABLE),
    )


def _read_checkpoint(seen: Body | None) -> CheckpointRef | None:
    try:
        return (
            None
            if not seen
            else CheckpointRef(
                step=seen["step"],
                uri=seen.get("uri", ""),
                digest=seen.get("digest", ""),
                weights_digest=seen.get("weightsDigest", ""),
            )
        )
    except (KeyError, ValidationError):
        return None


def _gang(body: Body, child: Body, parts: Sequence[Body], pods: Iterable[Body]) -> Gang:
    runtime, resumed = runtime_of(body), resumed_at(child)
    owners = runtime.owners(child, parts)
    theirs = [pod for pod in pods if owner_uid(pod) in owners and _index(runtime, pod) is not None]
    own = [pod for pod in theirs if not _is_of_before(pod, resumed)]
    before = [pod for pod in theirs if _is_of_before(pod, resumed)]
    state = runtime.state(child, parts, own)
    replaces = state.num_replaced > 0 and _ran_since(body, resumed)
    ranks = [_rank(runtime, pod, replaces=replaces) for pod in own]
    if replaces:
        ranks += [Rank(index=_NO_INDEX, replaced=True)] * (state.num_replaced - len(own))
    return Gang(
        name=child["metadata"]["name"],
        attempt=_attempt(child),
        uid=child["metadata"]["uid"],
        suspended=state.suspended,
        deleting=is_deleting(child),
        complete=state.complete,
        failure=state.failure,
        failure_message=state.failure_message,
        ranks=tuple(sorted(ranks, key=_rank_order)),
        forerunners=tuple(_rank(runtime, pod, replaces=False) for pod in before),
        owners=tuple(sorted(owners)) or (child["metadata"]["uid"],),
        begun_at=as_time(resumed) or created_at(child),
        was_suspended=bool(resumed),
        lacks_parts=not owners,
    )


def with_remembered(gang: Gang, remembered: Sequence[Rank]) -> Gang:
    """The gang with what was seen before of ranks that it lost. Those whose pods are gone since may tell the most; what
    is gone commits nothing any more."""
    if not remembered:
        return gang  # nearly every look
    before, there = {rank.uid: rank for rank in remembered}, {rank.uid for rank in gang.ranks}
    ranks = [_as_before(rank, before.get(rank.uid)) for rank in gang.ranks]
    vanished = [rank for rank in remembered if rank.uid not in there and not (gang.complete and _may_have_done(rank))]
    ranks += [replace(rank, gone_by=None) for rank in vanished]
    return replace(gang, ranks=tuple(sorted(ranks, key=_rank_order)))


def _as_before(rank: Rank, before: Rank | None) -> Rank:
    """One that follows another does so when it runs, too."""
    if before is None:
        return rank
    return replace(rank, went_first=before.went_first, replaced=rank.replaced or before.replaced)


def _may_have_done(rank: Rank) -> bool:
    """Whether one that was last seen to run may have ended well since: it was asked to go for the sake of its node, not
    driven out by another pod in its place."""
    return rank.disrupted and not rank.ended


def with_order(gang: Gang) -> Gang:
    """The gang with who went first: controllers remove the others once a rank has failed, and no sooner."""
    if not gang.lost_ranks or gang.failure or any(rank.phase == "Failed" for rank in gang.ranks):
        return gang
    return replace(gang, ranks=tuple(replace(rank, went_first=rank.lost) for rank in gang.ranks))


def nodes_of_lost_ranks(gang: Gang | None) -> tuple[str, ...]:
    """Whose conditions may explain a loss: of ranks that could say nothing, then of the first to end; a few of them."""
    lost = [rank for rank in gang.lost_ranks if rank.node and not rank.replaced] if gang else []
    lost.sort(key=lambda rank: (rank.termination is not None, rank.ending_order))
    return tuple(dict.fromkeys(rank.node for rank in lost))[:_MOST_NODES]


def with_nodes(gang: Gang, nodes: Mapping[str, Body | None]) -> Gang:
    """The gang with what its nodes say of themselves; None: the node is gone."""
    known = {name: _node_conditions(node) for name, node in nodes.items()}
    # What follows a pod that is gone may be on another node than that was.
    ranks = (
        replace(rank, node_conditions=known[rank.node]) if rank.node in known and not rank.replaced else rank
        for rank in gang.ranks
    )
    return replace(gang, ranks=tuple(ranks))


def _node_conditions(node: Body | None) -> frozenset[str]:
    if node is None:
        return frozenset({NODE_GONE})
    told = {each["type"]: each["status"] for each in (node.get("status") or {}).get("conditions") or ()}
    silent = {NODE_NOT_READY} if told.pop(_READY, "Unknown") != "True" else set[str]()
    bad = {
        f"{kind.removesuffix(_READY)}Not{_READY}" for kind in told if kind.endswith(_READY) and told[kind] == "False"
    }
    return frozenset(silent | bad | {kind for kind in told if told[kind] == "True"})


def pods_due_seconds(seen: Observed, now: datetime.datetime) -> float | None:
    """Until pods that the gang lacks should have been made; 0: they are late; None: it lacks none."""
    gang = seen.gang
    if gang is None or gang.suspended or gang.deleting or gang.complete or gang.failure or gang.begun_at is None:
        return None
    if gang.leaving or len(gang.ranks) >= (seen.record.num_nodes or 0):
        return None
    return max(0.0, _LATE_SECONDS - (now - gang.begun_at).total_seconds())


def ignored_seconds(gang: Gang | None, now: datetime.datetime) -> float | None:
    """Until a scheduler should have tried a pod of the gang; 0: none answers to that name; None: all were tried."""
    since = [rank.untried_since for rank in gang.ranks if rank.untried_since and not rank.deleting] if gang else []
    return max(0.0, _LATE_SECONDS - (now - min(since)).total_seconds()) if since else None


def refusal_in(events: Iterable[Body], gang: Gang) -> str:
    """The last warning of what should make a gang's pods; empty: it gave none."""
    said = max(events, key=_told_at, default={}).get("message", "")
    # Every try is for a pod of another name, and is none the less the same.
    return re.sub(rf'pods "{re.escape(gang.name)}[^"]*"', "pods", said)


def silence_of(gang: Gang, provider: str) -> str:
    """What is to be said of a gang that is late where nobody gave a reason; empty: nothing.

    JobSet's controller gives none where it may not make its Job.
    """
    maker = provider.partition(" ")[0]
    said = f"{maker}'s controller has made no Job of {gang.name} and gives no reason: look at its log"
    return said if gang.lacks_parts else ""


def _told_at(event: Body) -> str:
    """As the API server writes times, which compare as texts."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp", ""))


def _is_of_before(pod: Body, resumed: str) -> bool:
    """Whether the gang's suspension is what this pod goes for. Times of the API server compare as texts."""
    return is_deleting(pod) and pod["metadata"].get("creationTimestamp", "") < resumed


def _ran_since(body: Body, resumed: str) -> bool:
    """Whether all ranks of the attempt on record are known to have run, since it was last let go."""
    running = condition_of(body.get("status") or {}, "Running")
    return running.get("status") == "True" and running["lastTransitionTime"] > resumed


def _rank_order(rank: Rank) -> tuple[int, bool, str]:
    return rank.index, rank.deleting, rank.finished_at


def _index(runtime: Runtime, pod: Body) -> int | None:
    """None where its label is no index: such a pod is none of the gang's, and must not keep the others from sight."""
    label = runtime.index(pod)
    return _number(label) if label else _NO_INDEX


def _rank(runtime: Runtime, pod: Body, *, replaces: bool) -> Rank:
    status, index = pod.get("status") or {}, _index(runtime, pod)
    ended, waiting = _container_states(status, runtime.CONTAINER)
    scheduled = condition_of(status, "PodScheduled")
    phase = status.get("phase", "Pending")
    waits = phase == "Pending" and scheduled.get("status") == "False"
    node = (pod.get("spec") or {}).get("nodeName", "")
    said = ended.get("message", "")
    words = _last_words(said)
    return Rank(
        index=_NO_INDEX if index is None else index,
        phase=phase,
        ip=status.get("podIP", ""),
        exit_code=ended.get("exitCode"),
        reason=ended.get("reason") or waiting.get("reason") or status.get("reason", ""),
        message=waiting.get("message") or _unscheduled(status) or status.get("message", ""),
        finished_at=ended.get("finishedAt") or "",
        termination=words,
        output="" if words else said,
        disruption=first_true(pod, "DisruptionTarget").get("reason", ""),
        deleting=is_deleting(pod),
        replaced=replaces and phase == "Pending",
        gone_by=as_time(pod["metadata"].get("deletionTimestamp")),
        node=node,
        unplaced_since=as_time(scheduled.get("lastTransitionTime")) if waits else None,
        untried_since=None if scheduled or node or phase != "Pending" else created_at(pod),
        scheduler=(pod.get("spec") or {}).get("schedulerName", ""),
        began="containerStatuses" in status,
        uid=pod["metadata"].get("uid", ""),
    )


def _container_states(status: Body, name: str) -> tuple[Body, Body]:
    containers = status.get("containerStatuses") or []
    state = next((entry.get("state") or {} for entry in containers if entry.get("name") == name), {})
    return state.get("terminated") or {}, state.get("waiting") or {}


def _unscheduled(status: Body) -> str:
    scheduled = condition_of(status, "PodScheduled")
    return str(scheduled.get("message", "")) if scheduled.get("status") == "False" else ""


def _last_words(message: str) -> Termination | None:
    """None where the trainer was killed before it could write, or something else wrote."""
    try:
        return Termination.model_validate_json(message) if message else None
    except ValidationError:
        return None


def _attempt(child: Body) -> int:
    attempt = _number(label_of(child, naming.LABEL_ATTEMPT))
    return -1 if attempt is None else attempt


def _number(label: str) -> int | None:
    """None where it is not one that a status can hold: whoever may change children may write anything."""
    return int(label) if label.isascii() and label.isdecimal() and len(label) <= _MOST_DIGITS else None

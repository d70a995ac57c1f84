"""Raw children and earlier status -> Observed: frozen facts. Comes after listing, before `decide.py`; pure.

Children are bucketed once, here; nothing after this module sees a Kubernetes object.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from nexa_operator import naming
from nexa_operator.runtimes.job import CONTAINER
from nexa_train.config.protocol import CheckpointRef, Progress, Termination

Body = Mapping[str, Any]

LABEL_INDEX = "batch.kubernetes.io/job-completion-index"


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
    disrupted: bool = False
    """DisruptionTarget: evicted, preempted, its node lost or shut down."""
    deleting: bool = False

    @property
    def lost(self) -> bool:
        """Whether the gang cannot go on with it."""
        return self.phase == "Failed" or (self.deleting and self.phase != "Succeeded")


@dataclass(frozen=True, kw_only=True)
class Gang:
    """The Job of one attempt, with its pods in the order of their indices."""

    name: str
    attempt: int
    suspended: bool = False
    deleting: bool = False
    complete: bool = False
    failure: str = ""
    """Reason of FailureTarget or Failed. Failed waits for terminating pods, FailureTarget does not."""
    failure_message: str = ""
    ranks: tuple[Rank, ...] = ()

    @property
    def lost_ranks(self) -> tuple[Rank, ...]:
        return tuple(rank for rank in self.ranks if rank.lost)

    @property
    def rank_zero(self) -> Rank | None:
        return next((rank for rank in self.ranks if rank.index == 0 and not rank.deleting), None)


@dataclass(frozen=True, kw_only=True)
class Record:
    """What earlier reconciles wrote to status: facts that the children may no longer show."""

    attempt: int = 0
    restarts: int = 0
    charged: int = 0
    step_at_last_failure: int = -1
    checkpoint: CheckpointRef | None = None
    finished: str = ""
    """Succeeded or Failed, once one of them is true: it never changes again."""
    completed_at: datetime.datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Everything that a decision needs to know of the world."""

    record: Record = field(default_factory=Record)
    gang: Gang | None = None
    """Of the attempt on record."""
    leftovers: tuple[str, ...] = ()
    """Names of Jobs of other attempts."""
    progress: Progress | None = None
    """What pod 0 of the gang said last; None: nothing that is of this run and attempt."""

    @property
    def checkpoint(self) -> CheckpointRef | None:
        """The newest one known, from status, progress or the last words of any rank."""
        ranks = self.gang.ranks if self.gang else ()
        told = [rank.termination.checkpoint for rank in ranks if rank.termination]
        return newest(self.record.checkpoint, *told, self.progress.checkpoint if self.progress else None)


def newest(*checkpoints: CheckpointRef | None) -> CheckpointRef | None:
    """The one of the highest step; the first of equals."""
    known = [checkpoint for checkpoint in checkpoints if checkpoint is not None]
    return max(known, key=lambda checkpoint: checkpoint.step, default=None)


def observe(body: Body, *, jobs: Iterable[Body], pods: Iterable[Body], progress: Progress | None = None) -> Observed:
    """Sort what was listed into the attempt on record and leftovers."""
    uid, record = body["metadata"]["uid"], read_record(body.get("status") or {})
    ours = {_attempt(job): job for job in jobs if _owner_uid(job) == uid}
    current = ours.get(record.attempt)
    others = (job for attempt, job in sorted(ours.items()) if attempt != record.attempt)
    return Observed(
        record=record,
        gang=_gang(current, pods) if current else None,
        leftovers=tuple(job["metadata"]["name"] for job in others if not _deleting(job)),
        progress=progress if progress is not None and progress.attempt == record.attempt else None,
    )


def read_record(status: Body) -> Record:
    """Lenient: status is written by this operator, maybe by an older one."""
    return Record(
        attempt=status.get("attempt", 0),
        restarts=status.get("restarts", 0),
        charged=status.get("chargedRestarts", 0),
        step_at_last_failure=(status.get("lastFailure") or {}).get("checkpointStep", -1),
        checkpoint=_read_checkpoint(status.get("checkpoint")),
        finished=next((kind for kind in ("Succeeded", "Failed") if is_true(status, kind)), ""),
        completed_at=_time(status.get("completionTime")),
    )


def is_true(status: Body, kind: str) -> bool:
    """Whether the condition of that type is there and true."""
    return condition_of(status, kind).get("status") == "True"


def condition_of(status: Body, kind: str) -> Body:
    """The condition of that type; empty if there is none."""
    conditions: list[Body] = status.get("conditions") or []
    return next((condition for condition in conditions if condition.get("type") == kind), {})


def _time(text: str | None) -> datetime.datetime | None:
    return datetime.datetime.fromisoformat(text) if text else None


def _read_checkpoint(seen: Body | None) -> CheckpointRef | None:
    if not seen:
        return None
    return CheckpointRef(
        step=seen["step"],
        uri=seen.get("uri", ""),
        digest=seen.get("digest", ""),
        weights_digest=seen.get("weightsDigest", ""),
    )


def _gang(job: Body, pods: Iterable[Body]) -> Gang:
    uid = job["metadata"]["uid"]
    ranks = sorted((_rank(pod) for pod in pods if _owner_uid(pod) == uid), key=_rank_order)
    failure = _first_true(job, "FailureTarget", "Failed")
    return Gang(
        name=job["metadata"]["name"],
        attempt=_attempt(job),
        suspended=bool(job["spec"].get("suspend")),
        deleting=_deleting(job),
        complete=bool(_first_true(job, "SuccessCriteriaMet", "Complete")),
        failure=failure.get("reason", "") or ("Failed" if failure else ""),
        failure_message=failure.get("message", ""),
        ranks=tuple(ranks),
    )


def _rank_order(rank: Rank) -> tuple[int, bool, str]:
    return rank.index, rank.deleting, rank.finished_at


def _rank(pod: Body) -> Rank:
    metadata, status = pod["metadata"], pod.get("status") or {}
    ended, waiting = _container_states(status)
    return Rank(
        index=int((metadata.get("labels") or {}).get(LABEL_INDEX, -1)),
        phase=status.get("phase", "Pending"),
        ip=status.get("podIP", ""),
        exit_code=ended.get("exitCode"),
        reason=ended.get("reason") or waiting.get("reason") or status.get("reason", ""),
        message=waiting.get("message") or _unscheduled(status) or status.get("message", ""),
        finished_at=ended.get("finishedAt") or "",
        termination=_last_words(ended.get("message", "")),
        disrupted=bool(_first_true(pod, "DisruptionTarget")),
        deleting=_deleting(pod),
    )


def _container_states(status: Body) -> tuple[Body, Body]:
    containers = status.get("containerStatuses") or []
    state = next((entry.get("state") or {} for entry in containers if entry.get("name") == CONTAINER), {})
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


def _first_true(body: Body, *kinds: str) -> Body:
    status = body.get("status") or {}
    return next((condition_of(status, kind) for kind in kinds if is_true(status, kind)), {})


def _attempt(job: Body) -> int:
    label = (job["metadata"].get("labels") or {}).get(naming.LABEL_ATTEMPT, "")
    return int(label) if label.isdecimal() else -1


def _owner_uid(body: Body) -> str:
    references = body["metadata"].get("ownerReferences") or []
    return next((reference["uid"] for reference in references if reference.get("controller")), "")


def _deleting(body: Body) -> bool:
    return "deletionTimestamp" in body["metadata"]

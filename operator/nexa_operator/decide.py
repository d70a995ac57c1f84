"""Observed -> Decision. Comes after `observe.py`, before anything is written; pure, the clock is passed in.

One attempt is one gang. Any lost rank ends the attempt; another follows while the budget lasts, and a checkpoint
committed since the last failure refills the budget.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from nexa_operator import elastic, goodput
from nexa_operator.classify import Loss, classify
from nexa_operator.observe import STOPPING, UNAVAILABLE, Gang, Observed, Rank
from nexa_train.config.spec import JobSpec, RecoverySpec

DEADLINE = "DeadlineExceeded"
FORGIVE_SECONDS = 300.0
"""A pod that finds no node for so long while nodes are excluded may find one among those."""
LAST_WORDS_SECONDS = 3.0
"""After the first loss that was seen, for ranks that are still ending: one of them may know why, and say that later."""
HANGS_SECONDS = 30.0
"""After a pod should have been gone, for its kubelet to say that it is."""
LOOK_SECONDS = 2.0
"""Until the controller of a gang that is to stop has asked its pods to."""
MOST_ADAPTED = 17
"""Losses for want of memory since the last new checkpoint after which no attempt is believed to differ from the one
before: of 65,536 sequences at once one is left."""
BACKING_OFF = "BackingOff"
"""Why a job waits for a time to come."""


@dataclass(frozen=True, kw_only=True)
class Create:
    """There is no gang for the attempt on record."""

    attempt: int
    num_nodes: int


@dataclass(frozen=True, kw_only=True)
class Restart:
    """The attempt on record was lost: another one, once the wait is over."""

    attempt: int
    num_nodes: int
    loss: Loss
    charged: int
    """Charged restarts on record afterwards."""
    losses: int
    """Lost attempts since the last new checkpoint, but for those that the next one adapts to."""
    adapted: int = 0
    """Those."""
    wait_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Resume:
    """The attempt on record was ended from outside: another one, for templates of pods cannot change once started."""

    attempt: int
    num_nodes: int
    why: str = "no longer suspended"
    forgives: bool = False
    """Nodes that were excluded may be taken again: there are no others."""


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """There has been room for fewer pods only, for a while: another attempt with so many."""

    attempt: int
    num_nodes: int


@dataclass(frozen=True, kw_only=True)
class Watch:
    """The gang does its work, or waits in its queue for it."""

    problem: str = ""
    """Why this operator could begin no such attempt; empty: it could."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """It runs with fewer pods than were asked for: see whether there is room for the others."""

    num_pods: int
    """For which room is kept free as it is found; 0: for none, for a while."""
    forgives: bool = False
    """Nodes that were excluded may be taken again: there is no room on others."""

    @property
    def pauses(self) -> bool:
        """Whether no room is asked for, and what is kept free is given up."""
        return self.num_pods == 0


@dataclass(frozen=True, kw_only=True)
class Linger:
    """A rank was lost, and others are ending: what they say may explain it, what they commit is gone on from."""

    seconds: float


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Nothing can be done until a time has come or, without one, until something outside changes."""

    reason: str
    message: str
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Suspend:
    """The gang runs and should not: its ranks commit a checkpoint and stop. `resizes`: to go on with other ones."""

    gang: str
    withdraw: bool = False
    """Take it out of its queue: while it is there, the queue's owner alone suspends it and lets it go."""
    resizes: bool = False


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Suspended. Nothing runs but ranks, of any attempt, that commit a last checkpoint, for so many seconds at most."""

    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Succeed:
    """Every rank ended well."""


@dataclass(frozen=True, kw_only=True)
class Fail:
    """Not to be tried again."""

    reason: str
    message: str
    loss: Loss | None = None


@dataclass(frozen=True, kw_only=True)
class Rest:
    """Over, for good; look again when the time to live ends."""

    remaining_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Expire:
    """Over, and its time to live too: delete the job."""


Decision: TypeAlias = (
    Create | Restart | Resume | Shrink | Watch | Probe | Linger | Wait | Suspend | Hold | Succeed | Fail | Rest | Expire
)
Starting = Create | Restart | Resume | Shrink
"""Decisions that begin an attempt."""


def decide(seen: Observed, *, spec: JobSpec, now: datetime.datetime) -> Decision:
    """What to do about what was seen. Success counts even when a suspension came too late to prevent it."""
    gang, record, schedule = seen.gang, seen.record, spec.schedule
    if record.finished:
        return rest(seen, ttl_seconds=schedule.ttl_seconds_after_finished, now=now)
    if gang is not None and gang.succeeded:
        return Succeed()
    if deadline_seconds(seen, spec, now) == 0.0:
        return Fail(
            reason=DEADLINE, message=f"schedule.activeDeadlineSeconds {schedule.active_deadline_seconds} is over"
        )
    queued = schedule.queue_name is not None
    unseen = seen.unavailable and record.num_nodes is not None  # what has begun may run on
    if schedule.suspend and not unseen:
        running = gang is not None and not gang.deleting and (queued or not gang.suspended)
        if gang is not None and running:
            return Suspend(gang=gang.name, withdraw=queued)
        return Hold(seconds=_stopping_seconds((*seen.ranks, *seen.others), now))
    if seen.unavailable:
        return Wait(reason=UNAVAILABLE, message=seen.unavailable)
    if gang is None:
        return _create(seen, spec, now)
    if gang.suspended and not (queued or gang.deleting or record.suspends):
        said = f"{gang.name} was suspended by somebody else, who is to let it go; Kueue does with a schedule.queueName"
        return Wait(reason="SuspendedByAnother", message=said)
    if gang.deleting or (gang.suspended and not queued):
        return _resume(seen, gang, spec, now)
    # Ranks of a gang that its queue suspended go because of that: it goes on when it is let go again.
    if gang.failure or (gang.lost_ranks and not gang.suspended):
        return _after_loss(seen, gang, spec, now)
    return _run(seen, gang, spec, now)


def _create(seen: Observed, spec: JobSpec, now: datetime.datetime) -> Create | Wait:
    record, stopping = seen.record, _stopping_seconds(seen.ranks, now)
    if stopping > 0:
        return _stopping(stopping)
    remaining = _seconds_until(record.not_before, now)
    if remaining > 0:
        return Wait(reason=BACKING_OFF, message="the next attempt begins", seconds=remaining)
    # Pods that should be gone hang on a silent node, under the names that this attempt's would have.
    hang = any(not rank.ended for rank in seen.strays)
    # Without minNodes a record of another size is of before numNodes was changed, while the job was suspended.
    shrunk = record.num_nodes if spec.cluster.min_nodes is not None else None
    return Create(attempt=record.attempt + hang, num_nodes=shrunk or spec.cluster.num_nodes)


def _resume(seen: Observed, gang: Gang, spec: JobSpec, now: datetime.datetime) -> Resume | Wait:
    """Ranks that still commit their last checkpoint are waited for, as long as the kubelet gives them."""
    stopping = _stopping_seconds(seen.ranks, now)
    if stopping > 0:
        return _stopping(stopping)
    num_nodes = (elastic.larger(seen, spec, now) if seen.rooms else None) or spec.cluster.num_nodes
    why = Resume.why
    if num_nodes != (seen.record.num_nodes or num_nodes):
        why = f"with {num_nodes} pods"
    elif gang.deleting and seen.record.account.state != goodput.SUSPENDED:
        why = "in place of one that somebody deleted"
    return Resume(attempt=gang.attempt + 1, num_nodes=num_nodes, why=why)


def _stopping(seconds: float) -> Wait:
    return Wait(reason=STOPPING, message="ranks commit their last checkpoint", seconds=seconds)


def _stopping_seconds(ranks: Iterable[Rank], now: datetime.datetime) -> float:
    """Until they are gone, or should be: then they hang on a silent node."""
    alive = [rank for rank in ranks if not rank.ended and not rank.replaced]
    return max(
        (LOOK_SECONDS if rank.gone_by is None else _seconds_until(rank.gone_by, now) for rank in alive), default=0.0
    )


def _run(seen: Observed, gang: Gang, spec: JobSpec, now: datetime.datetime) -> Decision:
    fewer, current = elastic.smaller(seen, gang, spec, now), elastic.size(seen, spec)
    if fewer is not None:
        return Shrink(attempt=gang.attempt + 1, num_nodes=fewer)
    if seen.record.excluded_nodes and elastic.unplaced_seconds(gang, now) >= FORGIVE_SECONDS:
        why = "on excluded nodes too: there is room on no other"
        return Resume(attempt=gang.attempt + 1, num_nodes=current, why=why, forgives=True)
    if _hanging_seconds(gang, current, now) == 0.0:
        return Resume(attempt=gang.attempt + 1, num_nodes=current, why="beside pods that should be gone")
    missing = spec.cluster.num_nodes - current
    if _is_outdated(spec, current):
        return Suspend(gang=gang.name, withdraw=spec.schedule.queue_name is not None, resizes=True)
    if spec.cluster.min_nodes is None or missing <= 0 or gang.num_up < current:
        return Watch()
    if elastic.larger(seen, spec, now) is not None:
        return Suspend(gang=gang.name, resizes=True)
    if elastic.pause_seconds(seen, spec, now) > 0:
        return Probe(num_pods=0)
    return Probe(num_pods=missing, forgives=_asks_in_vain(seen, now))


def _hanging_seconds(gang: Gang, size: int, now: datetime.datetime) -> float | None:
    """Until pods of before a preemption hang, in whose place the gang's would be made; None: it lacks none for that."""
    gone_by = [rank.gone_by for rank in gang.leaving if rank.gone_by is not None]
    if gang.suspended or len(gang.ranks) >= size or not gone_by:
        return None
    return _seconds_until(max(gone_by) + datetime.timedelta(seconds=HANGS_SECONDS), now)


def _asks_in_vain(seen: Observed, now: datetime.datetime) -> bool:
    """Whether there may be room on excluded nodes alone."""
    since = seen.room_wanted_since
    return bool(seen.record.excluded_nodes) and since is not None and _seconds_until(now, since) >= FORGIVE_SECONDS


def _is_outdated(spec: JobSpec, current: int) -> bool:
    """Whether numNodes was changed and nobody saw the suspension in between."""
    return current > spec.cluster.num_nodes or (spec.cluster.min_nodes is None and current < spec.cluster.num_nodes)


def deadline_seconds(seen: Observed, spec: JobSpec, now: datetime.datetime) -> float | None:
    """What is left of schedule.activeDeadlineSeconds; None: there is none."""
    limit = spec.schedule.active_deadline_seconds
    return None if limit is None else max(0.0, limit - seen.record.account.active_seconds(now))


def rest(seen: Observed, *, ttl_seconds: int | None, now: datetime.datetime) -> Rest | Expire:
    """What is left to do for a finished job."""
    if ttl_seconds is None or seen.record.completed_at is None:
        return Rest()
    remaining = ttl_seconds - (now - seen.record.completed_at).total_seconds()
    return Rest(remaining_seconds=remaining) if remaining > 0 else Expire()


def _after_loss(seen: Observed, gang: Gang, spec: JobSpec, now: datetime.datetime) -> Restart | Fail | Linger:
    recovery, record = spec.recovery, seen.record
    # Whoever suspended it and let it go took their meeting place from its pods: it holds the address of before.
    ran = record.ran and not (gang.was_suspended and spec.schedule.queue_name is None)
    loss = classify(gang, rules=recovery.rules, ran=ran)
    if loss.action == "fail":
        return Fail(reason=loss.cause, message=loss.message or f"{loss.cause} is not retried", loss=loss)
    if seen.lost_seconds < LAST_WORDS_SECONDS and any(rank.phase == "Running" for rank in gang.ranks):
        return Linger(seconds=LAST_WORDS_SECONDS - seen.lost_seconds)
    # training-operator takes those of before a preemption for lost ones, if it is let go before they have ended.
    leaving = (*(rank for rank in gang.ranks if rank.commits), *gang.leaving)
    committing = max((_seconds_until(rank.gone_by, now) for rank in leaving), default=0.0)
    if committing > 0 and not loss.charged:
        return Linger(seconds=committing)  # the next attempt would begin with what is there now, and repeat the rest
    refilled = _refilled(seen)
    losses, adapted = (0, 0) if refilled else (record.losses, record.adapted)
    if loss.adapts and adapted >= MOST_ADAPTED:
        loss = replace(loss, adapts=False, charged=True)
    charged = (0 if refilled else record.charged) + loss.charged
    if charged > recovery.max_restarts:
        message = f"{loss.cause} after {recovery.max_restarts} restarts without a new checkpoint"
        return Fail(reason="RestartsExhausted", message=f"{message}: {loss.message}".rstrip(": "), loss=loss)
    return Restart(
        attempt=gang.attempt + 1,
        num_nodes=elastic.size(seen, spec),
        loss=loss,
        charged=charged,
        losses=losses + (not loss.adapts),
        adapted=adapted + loss.adapts,
        wait_seconds=0.0 if loss.adapts else _backoff(losses + 1, recovery),
    )


def _backoff(losses: int, recovery: RecoverySpec) -> float:
    """Nothing before the first restart since there was progress, then twice as long each time."""
    if losses <= 1:
        return 0.0
    return float(min(recovery.backoff_seconds * 2 ** min(losses - 2, 32), recovery.max_backoff_seconds))


def _refilled(seen: Observed) -> bool:
    """Whether a checkpoint was committed since the last failure."""
    return seen.checkpoint is not None and seen.checkpoint.step > seen.record.step_at_last_failure


def _seconds_until(when: datetime.datetime | None, now: datetime.datetime) -> float:
    return 0.0 if when is None else max(0.0, (when - now).total_seconds())


def next_look_seconds(seen: Observed, decision: Decision, *, spec: JobSpec, now: datetime.datetime) -> float | None:
    """When to look again though nothing was heard; None: no clock of this job runs."""
    account, due = seen.record.account, list[float | None]()
    if account.state not in goodput.IDLE:
        due.append(deadline_seconds(seen, spec, now))
    if isinstance(decision, Wait):
        due.append(decision.seconds)
    elif isinstance(decision, Hold):
        due.append(decision.seconds or None)
    elif isinstance(decision, Suspend):
        due.append(LOOK_SECONDS)
    elif isinstance(decision, Restart):
        due.append(decision.wait_seconds or None)
    elif isinstance(decision, Watch) and seen.gang is not None:
        # Once over, only the scheduler can tell anything new.
        due.append(elastic.patience_seconds(seen, seen.gang, spec, now) or None)
        due.append(_hanging_seconds(seen.gang, elastic.size(seen, spec), now))
        if seen.record.excluded_nodes and elastic.unplaced_seconds(seen.gang, now):
            due.append(FORGIVE_SECONDS)
    elif isinstance(decision, Probe):
        if decision.pauses:
            due.append(elastic.pause_seconds(seen, spec, now))
        elif seen.room:
            due.append(float(spec.cluster.shrink_after_seconds))
    return min((seconds for seconds in due if seconds is not None), default=None)

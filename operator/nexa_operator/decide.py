"""Observed -> Decision. Comes after `observe.py`, before anything is written; pure, the clock is passed in.

One attempt is one gang. Any lost rank ends the attempt; another follows while the budget lasts, and a checkpoint
committed since the last failure refills the budget.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from nexa_operator.observe import Gang, Observed, Rank
from nexa_train.config.protocol import OUT_OF_MEMORY
from nexa_train.config.spec import RecoveryRule, RecoverySpec, ScheduleSpec

FATAL_EXIT_CODES = {2: "ConfigError", 3: "NotFoundError", 5: "DataError"}
"""Exit codes of `nexa` that another attempt would only repeat, for ranks that left no last words."""

_DEADLINE = "DeadlineExceeded"
_DELETED = "PodDeleted"
_STOPPED = "Stopped"
_SUPERSEDED = "SupersededError"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Why an attempt ended: the rank that tells the most."""

    cause: str
    message: str = ""
    exit_code: int | None = None
    retryable: bool = True
    charged: bool = True


@dataclass(frozen=True, kw_only=True)
class Create:
    """There is no gang for the attempt on record."""

    attempt: int


@dataclass(frozen=True, kw_only=True)
class Restart:
    """The attempt on record was lost: another one."""

    attempt: int
    loss: Loss
    charged: int
    """Charged restarts on record afterwards."""


@dataclass(frozen=True, kw_only=True)
class Resume:
    """The attempt on record was suspended: another one, for templates of pods cannot change once started."""

    attempt: int


@dataclass(frozen=True, kw_only=True)
class Watch:
    """The gang does its work, or waits in its queue for it."""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Nothing can be done until something outside changes."""

    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Suspend:
    """The gang runs and should not: its ranks commit a checkpoint and stop."""

    gang: str
    withdraw: bool = False
    """Take it out of its queue: while it is there, the queue's owner alone suspends it and lets it go."""


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Suspended, and nothing runs."""


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


Decision: TypeAlias = Create | Restart | Resume | Watch | Wait | Suspend | Hold | Succeed | Fail | Rest | Expire


def decide(seen: Observed, *, recovery: RecoverySpec, schedule: ScheduleSpec, now: datetime.datetime) -> Decision:
    """What to do about what was seen. Success counts even when a suspension came too late to prevent it."""
    gang, attempt = seen.gang, seen.record.attempt
    if seen.record.finished:
        return rest(seen, ttl_seconds=schedule.ttl_seconds_after_finished, now=now)
    if gang is not None and gang.complete:
        return Succeed()
    queued = schedule.queue_name is not None
    if schedule.suspend:
        running = gang is not None and not gang.deleting and (queued or not gang.suspended)
        return Suspend(gang=gang.name, withdraw=queued) if gang is not None and running else Hold()
    if seen.unavailable:
        return Wait(reason="RuntimeUnavailable", message=seen.unavailable)
    if gang is None:
        return Create(attempt=attempt)
    if gang.deleting:
        # Someone deletes it; once it is gone the same attempt is created again.
        return Watch()
    if gang.suspended and not queued:
        return Resume(attempt=attempt + 1)
    # Ranks of a gang that its queue suspended go because of that: it goes on when it is let go again.
    if gang.failure or (gang.lost_ranks and not gang.suspended):
        return _after_loss(seen, gang, recovery)
    return Watch()


def rest(seen: Observed, *, ttl_seconds: int | None, now: datetime.datetime) -> Rest | Expire:
    """What is left to do for a finished job."""
    if ttl_seconds is None or seen.record.completed_at is None:
        return Rest()
    remaining = ttl_seconds - (now - seen.record.completed_at).total_seconds()
    return Rest(remaining_seconds=remaining) if remaining > 0 else Expire()


def _after_loss(seen: Observed, gang: Gang, recovery: RecoverySpec) -> Restart | Fail:
    loss = classify(gang, rules=recovery.rules)
    if not loss.retryable:
        return Fail(reason=loss.cause, message=loss.message or f"{loss.cause} is not retried", loss=loss)
    charged = (0 if _refilled(seen) else seen.record.charged) + loss.charged
    if charged > recovery.max_restarts:
        message = f"{loss.cause} after {recovery.max_restarts} restarts without a new checkpoint"
        return Fail(reason="RestartsExhausted", message=f"{message}: {loss.message}".rstrip(": "), loss=loss)
    return Restart(attempt=gang.attempt + 1, loss=loss, charged=charged)


def _refilled(seen: Observed) -> bool:
    """Whether a checkpoint was committed since the last failure."""
    return seen.checkpoint is not None and seen.checkpoint.step > seen.record.step_at_last_failure


def classify(gang: Gang, *, rules: Iterable[RecoveryRule] = ()) -> Loss:
    """The one loss that explains the others: ranks left alone fail with connection errors of their own."""
    if gang.failure == _DEADLINE:
        message = gang.failure_message or "schedule.activeDeadlineSeconds is over"
        return Loss(cause=_DEADLINE, message=message, retryable=False)
    told = [_loss(rank, rules) for rank in sorted(gang.lost_ranks, key=_first_to_end)]
    if not told:
        # The pod itself is gone: something outside removed it, the trainer cannot.
        return Loss(cause=_DELETED, message=gang.failure_message, charged=False)
    return min(told, key=_telling)


def _first_to_end(rank: Rank) -> tuple[bool, str, int]:
    return rank.finished_at == "", rank.finished_at, rank.index


def _telling(loss: Loss) -> int:
    """Final beats disruption beats failure; what stopped as asked or was removed explains nothing."""
    if not loss.retryable:
        return 0
    if loss.cause in (_STOPPED, _DELETED):
        # The Job's controller removes the other pods as soon as one has failed.
        return 3
    return 2 if loss.charged else 1


def _loss(rank: Rank, rules: Iterable[RecoveryRule]) -> Loss:
    words = rank.termination
    code = rank.exit_code if rank.exit_code is not None else words.exit_code if words else None
    cause = words.cause if words else _cause_without_words(rank, code)
    message = words.message if words else rank.message
    action = next((rule.action for rule in rules if code in rule.exit_codes), None)
    retryable = _is_retryable(rank, code) if action is None else action == "retry"
    # All ranks stop when one is asked to: whoever asked, it was not this job's fault.
    gone = rank.disrupted or rank.replaced or cause == _STOPPED or (rank.deleting and rank.exit_code is None)
    # The next attempt takes fewer sequences at once; with one there is no next, so this ends by itself.
    gives_way = words is not None and words.cause == OUT_OF_MEMORY and words.retryable
    charged = not (gone or gives_way)
    return Loss(cause=cause, message=message, exit_code=code, retryable=retryable, charged=charged)


def _is_retryable(rank: Rank, code: int | None) -> bool:
    words = rank.termination
    if words is None:
        return code not in FATAL_EXIT_CODES
    # The next attempt starts from the checkpoint that was committed first.
    return words.retryable or words.cause == _SUPERSEDED


def _cause_without_words(rank: Rank, code: int | None) -> str:
    if rank.disrupted:
        return "Disrupted"
    if code in FATAL_EXIT_CODES:
        return FATAL_EXIT_CODES[code]
    if rank.reason and rank.reason != "Error":
        return rank.reason
    return _DELETED if rank.replaced or (rank.deleting and code is None) else "Killed"

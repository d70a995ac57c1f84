"""A job that is being deleted and takes its artifacts with it: what is left to do. Beside `decide.py`; pure.

Only `schedule.deletionPolicy: Delete` puts a finalizer on a job, and it holds the job for a bounded time: artifacts
that could not be removed by then stay where they are, and an event says so. Only time in which an operator is there
counts; it is kept on the job, so that operators which come and go do not hold it for ever.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nexa_operator import naming
from nexa_operator.reading import Body, Ref, first_true, is_deleting, label_of, ref_of
from nexa_operator.runtimes.beside import REMOVAL_SECONDS
from nexa_train.config.spec import RecoverySpec

LOOK_SECONDS = 5.0
SPAN_SECONDS = 60
"""An operator that is there counts itself so often, and at its first look, however short its life is."""
_MOST_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Hold:
    """The job must not go before its artifacts: put the finalizer on it."""


@dataclass(frozen=True, kw_only=True)
class Clear:
    """Ranks may still write: end the gangs."""

    gangs: tuple[Ref, ...]


@dataclass(frozen=True, kw_only=True)
class Remove:
    """Nobody writes any more: start the removal."""


@dataclass(frozen=True, kw_only=True)
class Await:
    """Something ends by itself; look again."""


@dataclass(frozen=True, kw_only=True)
class LetGo:
    """Take the finalizer off."""

    problem: str = ""
    """Why artifacts may be left; empty: none are."""


Step: TypeAlias = Hold | Clear | Remove | Await | LetGo


def holds(body: Body) -> bool:
    """Whether the job waits for its artifacts when it is deleted."""
    return naming.FINALIZER in (body["metadata"].get("finalizers") or [])


def wants_hold(body: Body) -> bool:
    """Whether it should and does not yet."""
    return _takes_artifacts(body) and not holds(body) and not is_deleting(body)


def _takes_artifacts(body: Body) -> bool:
    policy = ((body.get("spec") or {}).get("schedule") or {}).get("deletionPolicy")
    return bool(policy == "Delete")


def patience_seconds(body: Body) -> int:
    """How long operators hold the job at most: its ranks are given their time, then the removal has its own."""
    told = ((body.get("spec") or {}).get("recovery") or {}).get("gracePeriodSeconds")
    grace = told if isinstance(told, int) else RecoverySpec().grace_period_seconds
    return grace + REMOVAL_SECONDS + 60


def spans_of(body: Body) -> int:
    """How often an operator has counted itself at it."""
    told = (body["metadata"].get("annotations") or {}).get(naming.ANNOTATION_SPANS, "")
    return int(told) if told.isascii() and told.isdecimal() and len(told) <= _MOST_DIGITS else 0


def next_step(
    body: Body, *, gangs: Sequence[Body], jobs: Sequence[Body], pods: Sequence[Body], now: datetime.datetime
) -> Step:
    """What to do for a job that is being deleted and holds.

    Args:
        gangs: what carries its attempts. jobs: the Jobs beside them. pods: all of its pods.
    """
    if not _takes_artifacts(body):
        # Whoever may change the job may put the finalizer on it; what was promised of its artifacts stands in the spec.
        return LetGo(problem="schedule.deletionPolicy does not say Delete")
    removal = next((job for job in jobs if label_of(job, naming.LABEL_ROLE) == naming.ROLE_REMOVAL), None)
    outcome = Await() if removal is None else _outcome(removal)
    if isinstance(outcome, LetGo):
        return outcome
    patience = patience_seconds(body)
    if spans_of(body) > patience // SPAN_SECONDS:
        return LetGo(problem=f"not done within {patience} s")
    if removal is not None:
        return outcome
    standing = tuple(ref_of(gang) for gang in gangs if not is_deleting(gang))
    if standing:
        return Clear(gangs=standing)
    # A pod whose node is gone never ends; after its grace nothing of it can be alive and reach the store for long.
    return Await() if any(_may_write(pod, now) for pod in pods) else Remove()


def _outcome(removal: Body) -> LetGo | Await:
    if first_true(removal, "SuccessCriteriaMet", "Complete"):
        return LetGo()
    failed = first_true(removal, "FailureTarget", "Failed")
    if failed:
        return LetGo(problem=f"{removal['metadata']['name']} failed: {failed.get('message', '')}".rstrip(": "))
    return Await()


def _may_write(pod: Body, now: datetime.datetime) -> bool:
    if label_of(pod, naming.LABEL_ROLE) or (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return False
    gone_by = pod["metadata"].get("deletionTimestamp")
    return gone_by is None or datetime.datetime.fromisoformat(gone_by) > now

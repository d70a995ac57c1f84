"""Where a job's time went: status -> status. Used by `status.py`; pure, the clock is passed in.

A job is in one state at a time, and a change of state adds the time since the last one to what it left. So nothing
is written while nothing changes; what is written for another reason counts the present state until then. What the
trainer says of its own time (`protocol.Progress`) corrects what the operator saw late: steps that were taken before it
looked, and steps that were lost with the attempt.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nexa_operator.reading import as_time
from nexa_train.config.protocol import Progress, Termination

QUEUE, STARTUP, RESTART = "queue", "startup", "restart"
PRODUCTIVE, LOST, STALL, SUSPENDED = "productive", "lost", "stall", "suspended"
STATES = (QUEUE, STARTUP, PRODUCTIVE, RESTART, LOST, STALL, SUSPENDED)
"""queue: pods wait for room, or for their queue. startup: all have a node, no step yet. restart: from a loss to the
next step. lost: steps that had to be taken again. stall: ranks stood still until they were ended. suspended counts for
nothing."""
IDLE = (QUEUE, SUSPENDED)
"""In which nothing of the job's own goes on."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """Seconds by state, and the state since when; an empty state: nothing runs yet, or any more.

    What has passed since then is not among the seconds.
    """

    seconds: Mapping[str, float] = field(default_factory=dict)
    state: str = ""
    since: datetime.datetime | None = None

    def moved(self, state: str, now: datetime.datetime) -> Account:
        """Into another state, or on in the same."""
        if state == self.state:
            return self
        return Account(seconds=self.until(now), state=state, since=now if state else None)

    def shifted(self, seconds: float, *, source: str, target: str) -> Account:
        """Time that was counted as `source`, or will be, and belongs to `target`."""
        there = self.seconds.get(source, 0.0)
        moved = min(max(0.0, seconds), there)
        counted = {**self.seconds, source: there - moved, target: self.seconds.get(target, 0.0) + moved}
        return Account(seconds=counted, state=self.state, since=self.since)

    def active_seconds(self, now: datetime.datetime) -> float:
        """All but what was spent waiting in a queue or suspended."""
        counted = sum(seconds for state, seconds in self.seconds.items() if state not in IDLE)
        return counted + (0.0 if self.state in IDLE else self._elapsed(now))

    def _elapsed(self, now: datetime.datetime) -> float:
        return 0.0 if self.since is None else max(0.0, (now - self.since).total_seconds())

    def until(self, now: datetime.datetime) -> Mapping[str, float]:
        """Seconds by state, with what has passed in the present one."""
        if not self.state:
            return self.seconds
        return {**self.seconds, self.state: self.seconds.get(self.state, 0.0) + self._elapsed(now)}

    def to_status(self, now: datetime.datetime) -> dict[str, Any]:
        """As `status.goodput` has it: the present state's seconds count until now."""
        seconds = self.until(now)
        counted = {f"{state}Seconds": round(seconds[state], 1) for state in STATES if state in seconds}
        state = {"state": self.state, "since": _written(self.since)} if self.state and self.since else {}
        total = sum(spent for state, spent in seconds.items() if state != SUSPENDED)
        ratio = {"ratio": round(seconds.get(PRODUCTIVE, 0.0) / total, 3)} if total > 0 else {}
        return {**state, **counted, **ratio}


def read(status: Mapping[str, Any], created: datetime.datetime | None) -> Account:
    """What `to_status` wrote, for a job that is there since `created`."""
    seen = status.get("goodput") or {}
    seconds = {state: float(seen[key]) for state in STATES if (key := f"{state}Seconds") in seen}
    account = Account(seconds=seconds, state=seen.get("state", ""), since=as_time(seen.get("since")))
    return account if created is None else _without_present(account, created)


def _without_present(account: Account, created: datetime.datetime) -> Account:
    """As of when the present state began.

    Status does not say until when it counts. It need not: all seconds together are the job's life until then. What they
    lack of it was before any operator looked. A status that is older than its job came with it from a backup.
    """
    if not account.state or account.since is None:
        return account
    if account.since < created:
        return Account(state=account.state, since=created)
    seconds, state = dict(account.seconds), account.state
    more = sum(seconds.values()) - (account.since - created).total_seconds()
    if more >= 0:
        seconds[state] = max(0.0, seconds.get(state, 0.0) - more)
    else:
        seconds[QUEUE] = seconds.get(QUEUE, 0.0) - more
    return Account(seconds=seconds, state=state, since=account.since)


def began_to_train(account: Account, told: Progress | Termination, now: datetime.datetime) -> Account:
    """The trainer has taken steps: since when, it says itself."""
    if account.state in (PRODUCTIVE, SUSPENDED) or told.trained_seconds is None:
        return account
    began = now - datetime.timedelta(seconds=told.trained_seconds)
    if account.since is not None:
        began = max(began, account.since)
    return account.moved(PRODUCTIVE, began)


def lost(
    account: Account, told: Progress | Termination | None, *, stood_seconds: float, now: datetime.datetime
) -> Account:
    """The attempt was lost: what it had not committed was for nothing, and so was the time that it stood still.

    Args:
        told: its last words or, where it left none, the last of its progress; None: nothing is known of it.
        stood_seconds: without any step, at the end.
    """
    if account.state != PRODUCTIVE:
        return account.moved(RESTART, now)
    elapsed = (now - account.since).total_seconds() if account.since else 0.0
    left = account.moved(RESTART, now).shifted(stood_seconds, source=PRODUCTIVE, target=STALL)
    if told is None or told.trained_seconds is None or told.uncommitted_seconds is None:
        return left.shifted(elapsed - stood_seconds, source=PRODUCTIVE, target=LOST)
    # What was done after its last word is not known, and was not committed.
    unknown = max(0.0, elapsed - told.trained_seconds)
    return left.shifted(told.uncommitted_seconds + unknown - stood_seconds, source=PRODUCTIVE, target=LOST)


def _written(when: datetime.datetime | None) -> str | None:
    return (
        None
        if when is None
        else when.astimezone(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )

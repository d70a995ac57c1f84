"""Which events tell something new. Between kopf's handlers and the queue.

Objects change more often than what a look sees of them: the Job controller counts its pods in the status, and every
status of ours comes back as an event. One that tells nothing new is still answered, for the look before it may have
failed or seen the past, but later, and by the same look as all others of its kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Body = Mapping[str, Any]

LATER_SECONDS = 5.0
"""After an event that told nothing new."""


@dataclass
class News:
    """What was last heard of each object of one kind, as far as a look would see it."""

    sign: Callable[[Body], object]
    _heard: dict[str, object] = field(default_factory=dict)

    def is_new(self, change: str | None, body: Body) -> bool:
        """Whether it differs from what was heard before; `change` as the watch says it."""
        uid = body["metadata"]["uid"]
        if change == "DELETED":
            self._heard.pop(uid, None)
            return True
        sign, before = self.sign(body), self._heard.get(uid)
        self._heard[uid] = sign
        return sign != before


def sign_of_training_job(body: Body) -> object:
    """Its status is ours."""
    metadata = body["metadata"]
    return metadata.get("generation"), metadata.get("deletionTimestamp")


def sign_of_gang(body: Body) -> object:
    """Counters in a Job's status say less than its pods do."""
    conditions = (body.get("status") or {}).get("conditions") or []
    told = tuple((each["type"], each["status"], each.get("reason"), each.get("message")) for each in conditions)
    return sign_of_training_job(body), told

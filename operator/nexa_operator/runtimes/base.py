"""What a runtime is: the objects it makes of a plan, and how it reads them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nexa_operator.kinds import Kind
from nexa_operator.plan import RunPlan
from nexa_operator.reading import Body, condition_of, first_true

Object = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class State:
    """How the object that carries a gang stands."""

    suspended: bool = False
    complete: bool = False
    failure: str = ""
    """Why it failed, in one word; DeadlineExceeded where the time that the job was given is over."""
    failure_message: str = ""
    num_replaced: int = 0
    """Pods that its controller keeps up, making another for each that is gone; 0: one that is gone is a failure."""


class Runtime(Protocol):
    """A module of this package."""

    KIND: Kind
    """Of the object that carries a gang."""
    PARTS: tuple[Kind, ...]
    """Of what stands between it and the pods."""
    PROVIDER: str
    """What serves that kind, for people in whose cluster nothing does."""
    CONTAINER: str
    """The trainer's container in a pod."""

    def objects(self, plan: RunPlan) -> tuple[tuple[Kind, Object], ...]:
        """What to create for one attempt, the gang last."""
        ...

    def suspension(self) -> Object:
        """The change of the gang's spec that ends its pods and keeps it."""
        ...

    def owners(self, gang: Body, parts: Sequence[Body]) -> frozenset[str]:
        """UIDs of which one controls each of the gang's pods."""
        ...

    def index(self, pod: Body) -> str:
        """The node index of one of the gang's pods, as a number; empty if it has none."""
        ...

    def state(self, gang: Body, parts: Sequence[Body], pods: Sequence[Body]) -> State:
        """How the gang stands; `pods` are its own."""
        ...


def failure_of(body: Body, *kinds: str) -> tuple[str, str]:
    """Reason and message of the first of these conditions that is true; both empty: none is."""
    condition = first_true(body, *kinds)
    return (condition.get("reason") or "Failed", condition.get("message", "")) if condition else ("", "")


def is_suspended(gang: Body, asked: object) -> bool:
    """Whether it is to be, or was and its controller has not let it go yet: until then old pods may be ending.

    All runtimes say so by a condition of that one name.
    """
    return bool(asked) or bool(first_true(gang, "Suspended"))


def resumed_at(gang: Body) -> str:
    """When a gang that was suspended was last let go, as the API server writes times; empty: never.

    Only Kueue lets gangs go.
    """
    suspended = condition_of(gang.get("status") or {}, "Suspended")
    return str(suspended.get("lastTransitionTime", "")) if suspended.get("status") == "False" else ""

"""Raw objects -> the few things that one asks of any of them: conditions, owners, times, deletion. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any, NamedTuple

Body = Mapping[str, Any]


class Ref(NamedTuple):
    """One object: by the time that something is done to it, another may have its name."""

    name: str
    uid: str


def ref_of(body: Body) -> Ref:
    """By which it can be asked to go, and no other in its place."""
    return Ref(body["metadata"]["name"], body["metadata"].get("uid", ""))


def condition_of(status: Body, kind: str) -> Body:
    """The condition of that type; empty if there is none."""
    conditions: list[Body] = status.get("conditions") or []
    return next((condition for condition in conditions if condition.get("type") == kind), {})


def is_true(status: Body, kind: str) -> bool:
    """Whether the condition of that type is there and true."""
    return condition_of(status, kind).get("status") == "True"


def first_true(body: Body, *kinds: str) -> Body:
    """The first of these conditions of an object that is true; empty if none is."""
    status = body.get("status") or {}
    return next((condition_of(status, kind) for kind in kinds if is_true(status, kind)), {})


def label_of(body: Body, key: str) -> str:
    """The value of a label; empty if there is none."""
    return str((body["metadata"].get("labels") or {}).get(key, ""))


def controller_of(body: Body) -> Body:
    """The reference to the one owner that looks after the object; empty if there is none."""
    references = body["metadata"].get("ownerReferences") or []
    return next((reference for reference in references if reference.get("controller")), {})


def owner_uid(body: Body) -> str:
    """The UID of the object's controller; empty if it has none."""
    return str(controller_of(body).get("uid", ""))


def is_deleting(body: Body) -> bool:
    """Whether it was asked to go."""
    return "deletionTimestamp" in body["metadata"]


def created_at(body: Body) -> datetime.datetime | None:
    """When the server made it; None: it does not say."""
    return as_time((body.get("metadata") or {}).get("creationTimestamp"))


def as_time(text: str | None) -> datetime.datetime | None:
    """None also for what is no time here, as a leap second, which the server takes; so it does times without a zone."""
    try:
        when = datetime.datetime.fromisoformat(text) if text else None
    except (TypeError, ValueError):
        return None
    return when if when is None or when.tzinfo else when.replace(tzinfo=datetime.UTC)

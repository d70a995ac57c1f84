"""Raw objects -> the few things that one asks of any of them: conditions, owners, deletion. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Body = Mapping[str, Any]


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


def owner_uid(body: Body) -> str:
    """The UID of the object's controller; empty if it has none."""
    references = body["metadata"].get("ownerReferences") or []
    return next((reference["uid"] for reference in references if reference.get("controller")), "")


def is_deleting(body: Body) -> bool:
    """Whether it was asked to go."""
    return "deletionTimestamp" in body["metadata"]

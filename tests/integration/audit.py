"""Rights: what a user asked of the API server, by its audit log, and what the chart grants."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.harness import render_chart

Right = tuple[str, str, str]
"""API group, resource with its subresource, verb."""


@dataclass(frozen=True)
class Log:
    """What one user asked of the API server since a moment."""

    file: Path
    start: int
    user: str

    def requests(self) -> list[dict[str, Any]]:
        with self.file.open("rb") as log:
            log.seek(self.start)
            lines = [line for line in log.read().decode().splitlines() if self.user in line]
        asked = [event for event in map(json.loads, lines) if event["user"]["username"] == self.user]
        # A watch is answered when it starts; whatever is under way still will be.
        return [event for event in asked if event["stage"] in ("ResponseStarted", "ResponseComplete")]

    def used(self) -> set[Right]:
        return {_right(event["objectRef"], event["verb"]) for event in self.requests() if "objectRef" in event}


def _right(asked: dict[str, Any], verb: str) -> Right:
    subresource = asked.get("subresource")
    return asked.get("apiGroup", ""), asked["resource"] + (f"/{subresource}" if subresource else ""), verb


def granted(*values: str) -> set[Right]:
    """By all roles of the chart, which has one subject."""
    roles = [item for item in render_chart("rbac.aggregate=false", *values) if item["kind"] in ("Role", "ClusterRole")]
    return {
        (group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }

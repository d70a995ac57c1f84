"""Jobs with sane contents, for tests that care about one thing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nexa_train.config import Job, JobSpec


def spec(**groups: Any) -> JobSpec:
    """The smallest spec; a group given as a mapping is merged into it."""
    values: dict[str, Any] = {"data": {"remote_uri": "train.jsonl"}}
    for group, value in groups.items():
        values[group] = {**values.get(group, {}), **value} if isinstance(value, Mapping) else value
    return JobSpec.model_validate(values)


def job(name: str = "demo", **groups: Any) -> Job:
    return Job.model_validate({"metadata": {"name": name}, "spec": spec(**groups)})

"""Children as the API server hands them out, with sane defaults; a test says only what it is about."""

from __future__ import annotations

import datetime
from typing import Any

from nexa_operator.observe import Gang, Observed, Rank, Record
from nexa_train.config import Job
from nexa_train.config.protocol import CheckpointRef, Progress, Termination

UID = "11111111-2222-3333-4444-555555555555"
GANG_UID = "99999999-2222-3333-4444-555555555555"
NOW = datetime.datetime(2026, 11, 23, 12, 0, 0, tzinfo=datetime.UTC)
LATER = NOW + datetime.timedelta(seconds=60)


def spec(**groups: Any) -> dict[str, Any]:
    sane = {"data": {"remoteUri": "rows.jsonl"}, "cluster": {"numNodes": 2}, "artifacts": {"uri": "s3://models"}}
    return {**sane, **groups}


def job(**groups: Any) -> Job:
    return Job.model_validate({"metadata": {"name": "demo", "namespace": "team"}, "spec": spec(**groups)})


def body(*, status: dict[str, Any] | None = None, **groups: Any) -> dict[str, Any]:
    metadata = {
        "name": "demo", "namespace": "team", "uid": UID, "generation": 1, "resourceVersion": "7",
        "creationTimestamp": "2026-11-23T12:00:00Z",
    }  # fmt: skip
    return {"metadata": metadata, "spec": spec(**groups), **({"status": status} if status else {})}


def owned_by(uid: str) -> list[dict[str, Any]]:
    return [{"kind": "X", "uid": uid, "controller": True}]


def gang_job(*, attempt: int = 0, owner: str = UID, suspend: bool = False, **status: Any) -> dict[str, Any]:
    metadata = {
        "name": f"demo-a{attempt}",
        "uid": GANG_UID,
        "labels": {"train.nexa.dev/attempt": str(attempt)},
        "ownerReferences": owned_by(owner),
    }
    return {"metadata": metadata, "spec": {"suspend": suspend}, "status": status}


def condition(kind: str, **more: str) -> dict[str, str]:
    return {"type": kind, "status": "True", **more}


def pod(
    index: int = 0, *, phase: str = "Running", owner: str = GANG_UID, deleting: bool = False, **status: Any
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": f"demo-a0-{index}-x",
        "labels": {"batch.kubernetes.io/job-completion-index": str(index)},
        "ownerReferences": owned_by(owner),
    }
    if deleting:
        metadata["deletionTimestamp"] = "2026-11-23T12:00:00Z"
    return {"metadata": metadata, "status": {"phase": phase, **status}}


def ended(code: int, message: str = "", *, reason: str = "Error") -> list[dict[str, Any]]:
    terminated = {"exitCode": code, "reason": reason, "message": message, "finishedAt": "2026-11-23T12:00:00Z"}
    return [{"name": "trainer", "state": {"terminated": terminated}}]


def checkpoint(step: int = 50) -> CheckpointRef:
    return CheckpointRef(step=step, uri=f"s3://m/step-{step}", digest="d" * 64)


def words(**given: Any) -> Termination:
    return Termination.model_validate({"run_id": "r", "exit_code": 1, "cause": "Oops", **given})


def progress(**given: Any) -> Progress:
    return Progress.model_validate({"run_id": "r", **given})


def rank(index: int = 0, **given: Any) -> Rank:
    return Rank(**{"index": index, "phase": "Running", **given})


def failed(index: int = 0, **given: Any) -> Rank:
    return Rank(**{"index": index, "phase": "Failed", "exit_code": 1, **given})


def gang(*ranks: Rank, **given: Any) -> Gang:
    return Gang(**{"name": "demo-a0", "attempt": 0, "ranks": ranks, **given})


def seen(gang: Gang | None = None, *, record: Record | None = None, **given: Any) -> Observed:
    return Observed(gang=gang, record=record or Record(), **given)

"""Checkpoints with sane contents, for tests that care about one thing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexa_train.artifact.manifest import FileEntry, Manifest, ManifestDraft
from nexa_train.artifact.publish import Committed, Publisher
from nexa_train.store import Store

RUN = "team-gsm8k-0123456789"
SHA = "ab" * 32


def draft(**changes: Any) -> ManifestDraft:
    values: dict[str, Any] = {
        "config": {"training": {"seed": 7}, "optimizer": {"lr": 2e-4}},
        "weights_digest": SHA,
        "metrics": {"loss": 1.25, "validation_loss": None},
        "dataset": {"uri": "s3://datasets/train.jsonl", "rows": 8, "dropped": 0},
        "world": {"ranks": 2, "microbatch": 4, "precision": "fp32"},
        "cursor": {"samples": 400},
    }
    return ManifestDraft(**(values | changes))


def entry(path: str = "model.safetensors", **changes: Any) -> FileEntry:
    values: dict[str, Any] = {"path": path, "object": f"data/a1-0/{path}", "size": 3, "sha256": SHA}
    return FileEntry(**(values | changes))


def manifest(*, step: int = 50, files: tuple[FileEntry, ...] = (), **changes: Any) -> Manifest:
    return draft(**changes).complete(run_id=RUN, step=step, files=files or (entry(),))


def files_in(folder: Path, contents: Mapping[str, bytes] | None = None) -> dict[str, Path]:
    found = {}
    for path, content in (contents or {"model.safetensors": b"weights" * 1000, "state/rng.json": b"{}"}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
        found[path] = folder / path
    return found


def publish_chain(store: Store, folder: Path, *steps: int, attempt: str = "a1") -> list[Committed]:
    """Checkpoints of one run, each the parent of the next, each with weights of its own."""
    publisher = Publisher(store, RUN, attempt)
    chain: list[Committed] = []
    for step in steps:
        files = files_in(folder / str(step), {"model.safetensors": b"%08d" % step, "state/rng.json": b"{}"})
        parent = chain[-1].digest if chain else None
        chain.append(publisher.publish(step, files, draft(parent=parent, cursor={"samples": 8 * step})))
    return chain

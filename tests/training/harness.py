"""Jobs over a small data set, run by the real command line, and what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nexa_train.artifact.manifest import Manifest
from nexa_train.artifact.publish import committed_folders, read_manifest
from nexa_train.store import open_store

SPEC: dict[str, Any] = {
    "backend": "fsdp",
    "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    "data": {"format": "messages", "validation": {"rows": 8}},
    "training": {
        "global_batch_size": 8,
        "microbatch_size_per_gpu": 4,
        "max_steps": 12,
        "save_every_steps": 4,
        "seed": 7,
    },
    "optimizer": {"lr": 0.01, "warmup_steps": 2},
    "cluster": {"threads_per_rank": 1},
}


def write_rows(path: Path, count: int = 96) -> Path:
    """Rows of uneven length, in the messages format."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            answer = " ".join(f"{number * factor}" for factor in range(1, 2 + number % 7))
            turns = [{"role": "user", "content": f"Count by {number}."}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


def write_pairs(path: Path, count: int = 96) -> Path:
    """Preferences of uneven length: the same prompts, answered right and wrong."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            right = " ".join(f"{number * factor}" for factor in range(1, 2 + number % 7))
            wrong = " ".join(f"{number * factor + 1}" for factor in range(1, 2 + number % 5))
            file.write(json.dumps({"prompt": f"Count by {number}.", "chosen": right, "rejected": wrong}) + "\n")
    return path


def write_texts(path: Path, count: int = 96) -> Path:
    """Texts of uneven length, to pretrain on."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            text = " ".join(f"{number * factor}" for factor in range(2 + number % 9))
            file.write(json.dumps({"text": text}) + "\n")
    return path


PRETRAIN: dict[str, Any] = {"method": {"type": "pretrain"}, "data": {"format": "text"}}


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with the groups of `change` laid over its own."""
    both = {key: {**base[key], **value} for key, value in change.items() if isinstance(base.get(key), dict)}
    return {**base, **change, **both}


@dataclass
class Run:
    """A run that was started: where its artifacts go, and how to start it again."""

    job: Path
    artifacts: Path
    environment: dict[str, str]
    last: subprocess.CompletedProcess[str] | None = field(default=None)

    def start(self, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
        """`nexa run`, not waited for; `prefix`: a command that carries it out."""
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "nexa_train", "run", str(self.job), "-o", "json"],
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.job.parent,
        )

    def finish(self, prefix: Sequence[str] = ()) -> dict[str, Any]:
        """Run to the end; the JSON that `nexa run -o json` prints."""
        process = self.start(prefix)
        out, err = process.communicate(timeout=300)
        self.last = subprocess.CompletedProcess(process.args, process.returncode, out, err)
        return json.loads(out) if out.strip() else {"exit_code": process.returncode, "message": err}

    @property
    def manifests(self) -> list[Manifest]:
        """Committed ones, oldest first."""
        store = open_store(str(self.artifacts))
        folders = [f.name for f in (self.artifacts / "checkpoints").iterdir()]
        return [read_manifest(store, step).manifest for run in folders for step in committed_folders(store, run)]

    @property
    def losses(self) -> list[float]:
        """Of every step, in order."""
        return [entry["loss"] for entry in self.logs]

    @property
    def logs(self) -> list[dict[str, Any]]:
        """What the manifests say of every step, in order."""
        return [entry for manifest in self.manifests for entry in manifest.logs]


class Runs:
    """Makes runs."""

    def __init__(self, cache: Path, rows: Path, folder: Path) -> None:
        self.cache, self.rows, self.folder, self.count = cache, rows, folder, 0

    def make(self, **change: Any) -> Run:
        """A run of `SPEC` with some keys changed, its artifacts in a folder of its own."""
        self.count += 1
        artifacts = self.folder / f"artifacts-{self.count}"
        spec = merged(merged(SPEC, change), {"artifacts": {"uri": str(artifacts)}})
        if "remote_uri" not in spec["data"]:
            spec["data"] = {**spec["data"], "remote_uri": str(self.rows)}
        job = self.folder / f"job-{self.count}.yaml"
        job.write_text(json.dumps({"name": "test", **spec}), encoding="utf-8")
        return Run(job, artifacts, {**os.environ, "NEXA_CACHE": str(self.cache)})


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The rank processes below a launcher."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [
        child
        for child in below
        if "nexa_train.rank" in child.cmdline() and "nexa_train.launch.torchrun" not in child.cmdline()
    ]

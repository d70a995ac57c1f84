"""A backend consumes every key of the job: one that nothing reads would be dropped without a word."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nexa_train.config.load import load_job
from tests.cluster.paths import REPOSITORY
from tests.training.harness import Run, Runs, write_texts

pytestmark = pytest.mark.training

LORA = {"type": "lora", "rank": 2, "alpha": 3.0, "dropout": 0.1, "target_modules": ["q_proj"]}
TRAINED = {
    "tuning": LORA,
    "training": {"max_steps": 2, "save_every_steps": 1, "eval_every_steps": 1},
    "optimizer": {"warmup_steps": 1},
}
ADAFACTOR = {"optimizer": {"name": "adafactor", "warmup_steps": 1}}

FULL = {"tuning": {"type": "full"}}
PRETRAIN = {"method": {"type": "pretrain"}, "data": {"format": "text"}}
DPO = {"method": {"type": "dpo", "beta": 0.2}, "data": {"format": "preference"}}

CASES: dict[str, dict[str, Any]] = {
    "fsdp": {"backend": "fsdp", **TRAINED},
    "fsdp with adafactor": {"backend": "fsdp", **TRAINED, **ADAFACTOR},
    "hf": {"backend": "hf", **TRAINED},
    "hf with adafactor": {"backend": "hf", **TRAINED, **ADAFACTOR},
    "deepspeed": {"backend": "deepspeed", **TRAINED},
    "pretrain on fsdp": {"backend": "fsdp", **TRAINED, **FULL, **PRETRAIN},
    "pretrain on deepspeed": {"backend": "deepspeed", **TRAINED, **PRETRAIN},
    "dpo on fsdp": {"backend": "fsdp", **TRAINED, **DPO},
    "dpo on hf": {"backend": "hf", **TRAINED, **FULL, **DPO},
}

ELSEWHERE = {"data.storage", "model.name"}
"""Read by the operator, which mounts the profile's credentials; refused beside the sizes of a new model."""


@pytest.mark.parametrize("change", CASES.values(), ids=CASES)
def test_every_key_that_says_what_to_train_is_read(
    change: dict[str, Any], runs: Runs, pairs: Path, tmp_path: Path
) -> None:
    form = change.get("data", {}).get("format")
    file = {None: runs.rows, "text": tmp_path / "texts.jsonl", "preference": pairs}[form]
    if form == "text":
        write_texts(file)
    run = runs.make(**change | {"data": {**change.get("data", {}), "remote_uri": str(file)}})
    assert_every_key_is_read(run, tmp_path)


def assert_every_key_is_read(run: Run, folder: Path) -> None:
    """Train it, and see what was asked of it."""
    command = [sys.executable, "-m", "tests.training.reads", str(run.job), str(folder / "run")]
    # A cache of its own: data that is prepared already is not read again.
    environment = {**os.environ, "NEXA_CACHE": str(folder), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    read = set(json.loads(done.stdout.splitlines()[-1]))
    spec = load_job(run.job).spec
    groups = ["model", "data", "method", "tuning", "training", "optimizer"]
    groups += [spec.backend] if spec.backend in ("deepspeed", "axolotl") else []
    said = {f"{group}.{key}" for group in groups for key in type(getattr(spec, group)).model_fields}
    refused = {"optimizer.betas", "optimizer.eps"} if spec.optimizer.name == "adafactor" else set()
    assert said - read - ELSEWHERE - refused == set()

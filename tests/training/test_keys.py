"""A backend consumes every key of the job: one that nothing reads would be dropped without a word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nexa_train.config.base import Strict
from nexa_train.config.load import load_job
from nexa_train.config.support import check_supported
from nexa_train.launch import node as launcher
from nexa_train.launch.node import Node, make_ready
from nexa_train.rundir import RunDir
from tests.training.harness import Runs

pytestmark = pytest.mark.training

LORA = {"type": "lora", "rank": 2, "alpha": 3.0, "dropout": 0.1, "target_modules": ["q_proj"]}
TRAINED = {
    "tuning": LORA,
    "training": {"max_steps": 2, "save_every_steps": 1, "eval_every_steps": 1},
    "optimizer": {"warmup_steps": 1},
}
ADAFACTOR = {"optimizer": {"name": "adafactor", "warmup_steps": 1}}

CASES: dict[str, dict[str, Any]] = {
    "fsdp": {"backend": "fsdp", **TRAINED},
    "fsdp with adafactor": {"backend": "fsdp", **TRAINED, **ADAFACTOR},
    "hf": {"backend": "hf", **TRAINED},
    "deepspeed": {"backend": "deepspeed", **TRAINED},
}

ELSEWHERE = {"data.storage", "model.name"}
"""Read by the operator, which mounts the profile's credentials; refused beside the sizes of a new model."""


@pytest.mark.parametrize("change", CASES.values(), ids=CASES)
def test_every_key_that_says_what_to_train_is_read(
    change: dict[str, Any], runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexa_train import rank

    monkeypatch.setenv("NEXA_CACHE", str(tmp_path))  # data that is prepared already is not read again
    job = load_job(runs.make(**change).job)
    check_supported(job.spec)
    monkeypatch.setattr(launcher, "check_supported", lambda spec: None)  # a look at a key is not its use
    with reads() as seen:
        ready = make_ready(job, Node())
        rundir = RunDir(tmp_path / "run")
        rundir.write_run(ready.to_dict())
        assert rank.main(str(rundir.path)) == 0, rundir.read_outcomes()
    groups = ["model", "data", "method", "tuning", "training", "optimizer"]
    groups += ["deepspeed"] if change["backend"] == "deepspeed" else []
    wanted = {
        (type(getattr(job.spec, group)), key): f"{group}.{key}"
        for group in groups
        for key in type(getattr(job.spec, group)).model_fields
    }
    unread = {name for key, name in wanted.items() if key not in seen} - ELSEWHERE
    if job.spec.optimizer.name == "adafactor":
        unread -= {"optimizer.betas", "optimizer.eps"}  # refused where given
    assert not unread


@contextmanager
def reads() -> Iterator[set[tuple[type, str]]]:
    """Which fields of which models are read as attributes meanwhile; writing a model out does not count."""
    seen: set[tuple[type, str]] = set()

    def recorded(self: Strict, name: str) -> Any:
        if name in type(self).model_fields:
            seen.add((type(self), name))
        return object.__getattribute__(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Strict, "__getattribute__", recorded, raising=False)
        yield seen

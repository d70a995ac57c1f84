"""A checkpoint of one backend is gone on from by another: weights and optimiser to the bit, and the same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.harness import merged
from tests.training.legs import assert_as_one, in_legs
from tests.training.ranks import job

pytestmark = pytest.mark.training

JOB: dict[str, Any] = {"training": {"max_steps": 12}, "optimizer": {"lr": 0.003, "max_grad_norm": 0.5}}
LORA: dict[str, Any] = {"tuning": {"type": "lora", "rank": 4}}
ADAFACTOR: dict[str, Any] = {"optimizer": {"name": "adafactor"}}
DPO: dict[str, Any] = {"method": {"type": "dpo"}, "data": {"format": "preference"}}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(cache))


@pytest.mark.parametrize("way", [("hf", "fsdp", "hf"), ("fsdp", "hf", "fsdp")], ids="-".join)
@pytest.mark.parametrize(
    "change", [{}, LORA, ADAFACTOR, merged(DPO, LORA)], ids=["full", "lora", "adafactor", "dpo with lora"]
)
def test_the_run_goes_on_as_if_one_backend_had_taken_every_step(
    rows: Path, pairs: Path, tmp_path: Path, change: dict[str, Any], way: tuple[str, ...]
) -> None:
    values = merged(merged(job(pairs if "method" in change else rows), JOB), change)
    [whole] = in_legs(values, tmp_path, "fsdp")
    legs = in_legs(values, tmp_path, *way)
    assert_as_one(legs, whole)

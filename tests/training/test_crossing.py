"""A checkpoint of one backend is gone on from by another: weights and optimiser to the bit, and the same steps."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.training.harness import merged
from tests.training.legs import Trained, fetched, save, train
from tests.training.ranks import job

pytestmark = pytest.mark.training

JOB: dict[str, Any] = {"training": {"max_steps": 12}, "optimizer": {"lr": 0.003, "max_grad_norm": 0.5}}
LORA: dict[str, Any] = {"tuning": {"type": "lora", "rank": 4}}
ADAFACTOR: dict[str, Any] = {"optimizer": {"name": "adafactor"}}
DPO: dict[str, Any] = {"method": {"type": "dpo"}, "data": {"format": "preference"}}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(cache))


def in_legs(values: dict[str, Any], folder: Path, *backends: str) -> list[Trained]:
    """Four steps on each backend in turn, the last one to the end."""
    saved, legs = None, []
    for number, backend in enumerate(backends, 1):
        until = 4 * number if number < len(backends) else 0
        leg, made = train({**values, "backend": backend}, 0, world=1, saved=saved, until=until)
        legs.append(leg)
        if until:
            save(folder / "store", made, 0, 1)
            saved = fetched(folder, until, 0)
    return legs


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
    for earlier, later in pairwise(legs):
        assert earlier.after.keys() == later.before.keys()
        assert all(later.before[name].equal(tensor) for name, tensor in earlier.after.items())
    steps = [step for leg in legs for step in leg.steps]
    assert [step.step for step in steps] == list(range(1, 13))
    for found, expected in zip(steps, whole.steps, strict=True):
        assert found.tokens == expected.tokens
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    for name, tensor in whole.after.items():
        assert (legs[-1].after[name] - tensor).abs().max() < 1e-4, name

"""Killed at random moments, again and again: the same bits at the end."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.run import wait_until
from tests.training.harness import merged
from tests.training.nursery import Attempts, Make, Nursery

pytestmark = pytest.mark.training

LORA = {"tuning": {"type": "lora", "rank": 4}}
LONG = {"training": {"max_steps": 240, "save_every_steps": 5}}
SHORT = {"training": {"max_steps": 60, "save_every_steps": 1}, "optimizer": {"lr": 0.001}}


@pytest.fixture(scope="module")
def nursery(cache: Path) -> Iterator[Nursery]:
    found = Nursery(cache, "fsdp", "peft")
    yield found
    found.close()


@pytest.mark.parametrize(
    ("change", "least"), [pytest.param(LONG, 20, id="full"), pytest.param(merged(LONG, LORA), 5, id="lora")]
)
def test_kills_at_random_moments_change_no_bit(make: Make, change: dict[str, Any], least: int) -> None:
    digest = make(**change).finish(2)["checkpoint"]["weights_digest"]
    attempts, chance, kills = make(**change), random.Random(1), 0
    while kills < least:
        pids = attempts.start(2)
        assert pids, f"the run ended after {kills} kills: make it longer"
        wait_for_a_moment(attempts, chance)
        chosen = chance.randrange(2)
        with suppress(ProcessLookupError):
            os.kill(pids[chosen], signal.SIGKILL)
        kills += attempts.wait()[chosen] == -signal.SIGKILL
    assert attempts.finish(2)["checkpoint"]["weights_digest"] == digest


def wait_for_a_moment(attempts: Attempts, chance: random.Random) -> None:
    """Any will do: while a rank starts, restores, trains or saves."""
    if chance.random() < 0.25:
        time.sleep(chance.uniform(0, 0.5))
        return
    wait_for_step(attempts, attempts.committed + chance.randrange(1, 12))
    time.sleep(chance.uniform(0, 0.05))


def wait_for_step(attempts: Attempts, step: int) -> None:
    wait_until(lambda: attempts.step >= step, timeout_seconds=60, what=f"step {step}", interval_seconds=0.005)


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_one_rank_then_two_then_one_take_the_same_samples_to_the_same_losses(make: Make, kill: bool) -> None:
    alone = make(**SHORT)
    alone.finish(1)
    changing = make(**SHORT)
    for world, until in ((1, 8), (2, 16)):
        pids = changing.start(world)
        wait_for_step(changing, until)
        if kill:
            os.kill(pids[-1], signal.SIGKILL)
            assert changing.wait()[-1] == -signal.SIGKILL
        else:
            changing.rundir.ask_to_stop()
            assert changing.wait() == [75] * world
    changing.finish(1)
    assert changing.reads() == alone.reads()
    assert sorted(alone.reads()) == list(range(60))
    expected, found = alone.run.logs, changing.run.logs
    assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    assert [row["grad_norm"] for row in found] == pytest.approx([row["grad_norm"] for row in expected], rel=1e-5)
    assert {manifest.world["ranks"] for manifest in changing.run.manifests} == {1, 2}
    weights, others = (last_weights(attempts) for attempts in (changing, alone))
    assert weights.keys() == others.keys()
    for name, tensor in others.items():
        assert (weights[name] - tensor).abs().max() < 1e-4, name


def last_weights(attempts: Attempts) -> dict[str, Any]:
    from safetensors.torch import load_file

    folder = max(attempts.run.artifacts.glob("checkpoints/*/step-*"))
    (file,) = folder.glob("data/*/model.safetensors")
    return load_file(file)

"""A job trained in legs: each goes on from the checkpoint of the one before, perhaps on another backend or world."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.training.ranks import make_context

if TYPE_CHECKING:
    from torch import Tensor

    from nexa_train.backends.base import StepMetrics


@dataclass(frozen=True)
class Trained:
    """What became of a job: of each step, loss, gradient norm, learning rate and tokens; whole tensors at the ends."""

    steps: list[StepMetrics]
    validation: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def train(
    values: dict[str, Any], rank: int, *, world: int = 2, saved: Any = None, until: int = 0
) -> tuple[Trained, Any]:
    """Train a job on from `saved`, to its end or `until` that step; with what staged it."""
    from nexa_train.backends import make_backend

    backend = make_backend(make_context(values, rank=rank, world=world))
    backend.setup()
    if saved is not None:
        backend.restore(saved)
    before, steps = whole(backend.stage().ready(), world), list[Any]()
    validation = [backend.validate()]

    def note(metrics: StepMetrics) -> bool:
        steps.append(metrics)
        return metrics.step == until

    backend.train(note)
    validation.append(backend.validate())
    return Trained(steps, validation, before, whole(backend.stage().ready(), world)), backend  # type: ignore[arg-type]


def whole(staged: Any, world: int) -> dict[str, Tensor]:
    """All tensors, put together from the pieces of all ranks, which cover each element once."""
    import torch
    import torch.distributed as dist

    held: list[Any] = [{**staged.weights, **staged.optimizer}]
    if world > 1:
        mine, held = held[0], [None] * world
        dist.all_gather_object(held, mine)
    tensors: dict[str, Tensor] = {}
    covered: dict[str, int] = {}
    for name, piece in (item for pieces in held for item in pieces.items()):
        flat = tensors.setdefault(name, torch.empty(piece.shape)).view(-1)
        flat[piece.start : piece.start + piece.tensor.numel()] = piece.tensor.flatten()
        covered[name] = covered.get(name, 0) + piece.tensor.numel()
    assert covered == {name: tensor.numel() for name, tensor in tensors.items()}
    return tensors


def save(folder: Path, backend: Any, rank: int, world: int) -> None:
    """Commit what a backend stages, as the pipeline does."""
    from nexa_train.artifact.manifest import ManifestDraft
    from nexa_train.artifact.publish import Publisher
    from nexa_train.checkpoint import Saver
    from nexa_train.rundir import RunDir
    from nexa_train.store.local import LocalStore

    publisher = Publisher(LocalStore(folder), "run", "a0", nonce="0000")
    saver = Saver(publisher, RunDir(folder / "rundir"), rank=rank, world=world)
    saver.start(backend.stage(), backend.describe(), ManifestDraft(config={}))
    saver.wait()


def fetched(folder: Path, step: int, rank: int) -> Any:
    """A committed step, downloaded."""
    from nexa_train.artifact.publish import fetch, read_manifest
    from nexa_train.checkpoint import Saved
    from nexa_train.store.local import LocalStore

    store = LocalStore(folder / "store")
    manifest = read_manifest(store, f"checkpoints/run/step-{step:08d}")
    return Saved(fetch(store, manifest, folder / f"fetched-{step}-{rank}"))


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


def assert_as_one(legs: list[Trained], whole: Trained) -> None:
    """Each leg began with the very tensors of the one before, and all of them took the steps of `whole`."""
    for earlier, later in pairwise(legs):
        assert earlier.after.keys() == later.before.keys()
        assert all(later.before[name].equal(tensor) for name, tensor in earlier.after.items())
    steps = [step for leg in legs for step in leg.steps]
    assert [step.step for step in steps] == [step.step for step in whole.steps]
    for found, expected in zip(steps, whole.steps, strict=True):
        assert found.tokens == expected.tokens
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
    for name, tensor in whole.after.items():
        assert (legs[-1].after[name] - tensor).abs().max() < 1e-4, name

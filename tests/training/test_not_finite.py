"""A loss that is not finite on one of two ranks: both say whose it was, for whoever speaks first is heard."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from nexa_train.errors import NonFiniteLossError
from tests.training.nursery import free_port
from tests.training.ranks import job, make_context

pytestmark = pytest.mark.training

BACKENDS = ["fsdp", "hf"]
STEP = 3
"""The one that fails; each rank has two microbatches of two sequences in it."""


def two_ranks(rank: int, folder: str, rows: str, port: int) -> None:
    """What each of two ranks does; FOLDER/RANK.json is what it said."""
    import torch
    import torch.distributed as dist

    from nexa_train.rank import leave

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    said = {backend: failed(Path(rows), backend, rank) for backend in BACKENDS}
    Path(folder, f"{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    dist.destroy_process_group()
    leave(0)


def spoil(backend: Any, *, passes: range) -> None:
    """Have the model give what is not a number in some of its passes, counted from 0."""
    count = iter(range(1000))

    def spoilt(_module: Any, _inputs: Any, output: Any) -> Any:
        return output * float("nan") if next(count) in passes else output

    backend.causal.base_model.norm.register_forward_hook(spoilt)


def failed(rows: Path, backend: str, rank: int) -> str:
    """Train until rank 1 meets a loss that is no number in its second microbatch; what this rank says of it."""
    from nexa_train.backends import make_backend

    context = make_context(job(rows, backend=backend, training={"microbatch_size_per_gpu": 2}), rank=rank, world=2)
    made: Any = make_backend(context)
    made.setup()
    if rank == 1:
        spoil(made, passes=range(2 * STEP - 1, 2 * STEP))
    with pytest.raises(NonFiniteLossError) as caught:
        made.train(lambda _: False)
    return str(caught.value)


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory, cache: Path, rows: Path) -> list[dict[str, str]]:
    """Of each rank, what it said on each backend."""
    import torch.multiprocessing as processes

    folder = tmp_path_factory.mktemp("not-finite")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXA_CACHE", str(cache))
        make_context(job(rows))  # prepared once
        processes.spawn(two_ranks, args=(str(folder), str(rows), free_port()), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_rank_names_the_one_at_fault_and_the_samples_of_its_microbatch(
    said: list[dict[str, str]], rows: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(cache))
    healthy, faulty = (by_backend[backend] for by_backend in said)
    assert healthy == faulty
    context = make_context(job(rows, training={"microbatch_size_per_gpu": 2}), rank=1, world=2)
    sequences = context.microbatches(STEP - 1)[1]
    assert healthy.startswith(f"step {STEP}, rank 1: loss nan, gradient norm nan; the optimiser did not move. ")
    assert "Of the step's 4 microbatches 1 had such a loss; their " in healthy
    assert f"their sequences were {sequences}, samples {context.train.samples(sequences)}; look at them" in healthy


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_the_gradient_alone_is_not_finite_nobody_is_blamed_and_the_whole_step_is_listed(
    rows: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    from nexa_train.backends import make_backend

    monkeypatch.setenv("NEXA_CACHE", str(cache))
    context = make_context(job(rows, backend=backend))
    made: Any = make_backend(context)
    made.setup()
    made.causal.base_model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    said = r"^step 1: loss \d.*All losses were finite, the gradient was not"
    with pytest.raises(NonFiniteLossError, match=said) as caught:
        made.train(lambda _: False)
    assert f"sequences were {context.step_sequences(0)}, samples " in str(caught.value)


def test_what_is_not_finite_everywhere_is_named_in_one_line_of_readable_length(
    rows: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nexa_train.loop import NAMED, check_finite

    monkeypatch.setenv("NEXA_CACHE", str(cache))
    context = make_context(job(rows, training={"global_batch_size": 64, "microbatch_size_per_gpu": 64}))
    with pytest.raises(NonFiniteLossError) as caught:
        check_finite(context, 0, float("inf"), 1.0, [float("inf")])
    sequences = context.step_sequences(0)
    listed = ", ".join(map(str, sequences[:NAMED]))
    assert f"sequences were [{listed}, ... 64 in all]" in str(caught.value)
    assert re.match(r"step 1, rank 0: loss inf, gradient norm 1\.0; ", str(caught.value))

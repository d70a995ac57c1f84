"""DeepSpeed's ZeRO beside fsdp: the same steps, the same state at every stage; killed, the same bits in the end."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.run import wait_until
from tests.training.harness import PRETRAIN, Runs, merged, write_texts
from tests.training.legs import Trained, assert_as_one, fetched, save, train, whole
from tests.training.nursery import Make, Nursery
from tests.training.ranks import job, make_context

pytestmark = pytest.mark.training

# 88 sequences, 8 a step: 20 steps, the last with two sequences, of which the second rank has none.
JOB = {
    "training": {"microbatch_size_per_gpu": 2, "max_steps": None, "epochs": 1.75},
    "optimizer": {"weight_decay": 0.1},
}
LORA = {"tuning": {"type": "lora", "rank": 4}}
RECOMPUTED = {"training": {"activation_checkpointing": True}}
PACKED = merged(PRETRAIN, {"data": {"packing": True}, "training": {"epochs": None, "max_steps": 20}})
BF16 = {"training": {"precision": "bf16", "epochs": None, "max_steps": 4}}


def zero(stage: int, offload: str = "none") -> dict[str, Any]:
    return {"backend": "deepspeed", "deepspeed": {"zero_stage": stage, "offload": offload}}


JOBS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "zero 1": zero(1),
    "zero 2": zero(2),
    "zero 3": zero(3),
    "zero 1, optimizer offloaded": zero(1, "optimizer"),
    "zero 2, optimizer offloaded": zero(2, "optimizer"),
    "zero 3, all offloaded": zero(3, "all"),
    "zero 2, small buckets": zero(2),
    "zero 3, small buckets": zero(3),
    "zero 3, recomputed": {**zero(3), **RECOMPUTED},
    "lora": LORA,
    "lora, zero 1": {**zero(1), **LORA},
    "lora, zero 2": {**zero(2), **LORA},
    "lora, zero 3": {**zero(3), **LORA},
    "pretrain, packed": PACKED,
    "pretrain, packed, zero 2": {**zero(2), **PACKED},
    "pretrain, packed, zero 3": {**zero(3), **PACKED},
    "pretrain, packed, lora": {**PACKED, **LORA},
    "pretrain, packed, lora, zero 2": {**zero(2), **PACKED, **LORA},
    "bf16": BF16,
    "bf16, zero 1": {**zero(1), **BF16},
    "bf16, zero 2": {**zero(2), **BF16},
    "bf16, zero 3": {**zero(3), **BF16},
}
TEXTS = "texts.jsonl"
SMALL_BUCKET = 1000
"""Elements: smaller than an embedding, and than a layer's gradients together."""


def reference(name: str) -> str:
    kinds = ("lora", "bf16", "pretrain, packed, lora", "pretrain, packed")
    return next((kind for kind in kinds if name.startswith(kind)), "fsdp")


def two_ranks(rank: int, folder: str, rows: str) -> None:
    """What each of two ranks does; rank 0 writes what became of it."""
    import torch
    import torch.distributed as dist

    from nexa_train.rank import leave

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in place.items()})  # Trainer asks for all of them
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("error")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for name, change in JOBS.items():
        with pytest.MonkeyPatch.context() as patch:
            if "small buckets" in name:
                patch.setattr("nexa_train.backend_config.deepspeed.BUCKET_ELEMENTS", SMALL_BUCKET)
            file = Path(folder) / TEXTS if name.startswith("pretrain") else Path(rows)
            found[name], backend = train(merged(job(file, **JOB), change), rank)
            if "zero" in name:
                groups = backend.engine.zero.optimizer.optimizer.param_groups
                made = sorted({(*group["betas"], group["eps"], group["weight_decay"]) for group in groups})
                given[name] = (backend.engine.zero.config, made, backend.lora and backend.lora.to_dict())
    found["given"] = given
    for way, legs in WAYS.items():
        found[way] = pass_on(Path(folder) / way, Path(rows), rank, legs)
    found["not finite"] = {
        (name, what): not_finite(Path(rows), rank, stage, what) for name, stage in STAGES.items() for what in SPOILT
    }
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()
    leave(0)


STAGES = {"zero 1": 1, "zero 2": 2, "zero 3": 3}
SPOILT = ("loss", "gradient")


HF = {"backend": "hf"}
WAYS: dict[str, list[tuple[dict[str, Any], int, int]]] = {
    "zero 2, fsdp on one rank, zero 3": [(zero(2), 2, 7), ({}, 1, 13), (zero(3), 2, 0)],
    "hf, zero 1, hf": [(HF, 2, 7), (zero(1), 2, 13), (HF, 2, 0)],
    "zero 3, hf, zero 2": [(zero(3), 2, 7), (HF, 2, 13), (zero(2), 2, 0)],
    "lora: zero 2, hf, zero 3, fsdp on one rank": [
        ({**zero(2), **LORA}, 2, 5),
        ({**HF, **LORA}, 2, 10),
        ({**zero(3), **LORA}, 2, 15),
        (LORA, 1, 0),
    ],
}
"""What trains, on how many ranks, until which step."""


def pass_on(folder: Path, rows: Path, rank: int, legs: list[tuple[dict[str, Any], int, int]]) -> list[Trained]:
    """Each leg goes on from the checkpoint of the one before."""
    import torch.distributed as dist

    trained, saved = [], None
    for change, world, until in legs:
        leg = None
        if rank < world:
            leg, backend = train(merged(job(rows, **JOB), change), rank, world=world, saved=saved, until=until)
            save(folder / "store", backend, rank, world)
        trained.append(leg)
        dist.barrier()
        saved = fetched(folder, until, rank) if until else None
    return trained  # type: ignore[return-value]


def not_finite(rows: Path, rank: int, stage: int, what: str) -> dict[str, Any]:
    """The second rank's loss is infinite in the third step, or its gradient alone: what the first one says, and the
    state around it."""
    from nexa_train.backends import make_backend
    from nexa_train.errors import NonFiniteLossError

    backend: Any = make_backend(make_context(merged(job(rows, **JOB), zero(stage)), rank=rank, world=2))
    backend.setup()
    seen: dict[str, Any] = {}

    def poison(metrics: Any) -> bool:
        if metrics.step == 2:
            seen["before"] = whole(backend.stage().ready(), 2)
            if rank == 1:
                norm = backend.causal.base_model.norm
                if what == "loss":
                    norm.register_forward_hook(lambda _module, _inputs, output: output * float("inf"))
                else:
                    norm.weight.register_hook(lambda gradient: gradient * float("inf"))
        return False

    with pytest.raises(NonFiniteLossError) as caught:
        backend.train(poison)
    return {**seen, "said": str(caught.value), "after": whole(backend.stage().ready(), 2)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, cache: Path, rows: Path) -> dict[str, Any]:
    """All that needs two ranks and no launcher, in one start of them."""
    import torch
    import torch.multiprocessing as processes

    folder = tmp_path_factory.mktemp("deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXA_CACHE", str(cache))
        make_context(job(rows, **JOB))  # prepared once
        make_context(merged(job(write_texts(folder / TEXTS), **JOB), PACKED))
        processes.spawn(two_ranks, args=(str(folder), str(rows)), nprocs=2)
    values: dict[str, Any] = torch.load(folder / "found.pt", weights_only=False)
    return values


def differences(ours: list[Any], theirs: list[Any]) -> dict[str, float]:
    """The largest of all steps, relative."""
    return {
        key: max(abs(getattr(a, key) / getattr(b, key) - 1) for a, b in zip(ours, theirs, strict=True))
        for key in ("loss", "grad_norm")
    }


@pytest.mark.parametrize("name", [name for name in JOBS if "zero" in name and "bf16" not in name])
def test_steps_validation_and_state_are_those_of_fsdp(found: dict[str, Any], name: str) -> None:
    ours, theirs = found[name], found[reference(name)]
    assert len(ours.steps) == 20
    assert [(s.step, s.tokens, s.learning_rate) for s in ours.steps] == [
        (s.step, s.tokens, s.learning_rate) for s in theirs.steps
    ]
    assert max(differences(ours.steps, theirs.steps).values()) < 1e-5
    assert ours.validation == pytest.approx(theirs.validation, rel=1e-5)
    assert ours.after.keys() == theirs.after.keys()
    assert all(tensor.shape == ours.after[tensor_name].shape for tensor_name, tensor in theirs.after.items())
    assert max((ours.after[key] - tensor).abs().max().item() for key, tensor in theirs.after.items()) < 1e-4
    assert all(not ours.before[key].equal(tensor) for key, tensor in ours.after.items())  # all of it was trained


@pytest.mark.parametrize("name", [name for name in JOBS if "zero" in name and "small" not in name])
def test_the_engine_has_what_is_shown(found: dict[str, Any], rows: Path, name: str) -> None:
    from nexa_train.backend_config import backend_config
    from nexa_train.config import JobSpec
    from nexa_train.plan import make_plan

    values = merged(merged(job(rows, **JOB), JOBS[name]), {"cluster": {"num_nodes": 2}})
    spec = JobSpec.model_validate(values)
    shown = backend_config(spec, make_plan(spec))
    config, groups, adapters = found["given"][name]
    optimizer, scheduler = shown.pop("optimizer"), shown.pop("lr_scheduler")
    decay = sorted({0.0, 0.1} if "lora" not in name else {0.1})
    assert groups == [(*optimizer["betas"], optimizer["eps"], each) for each in decay]
    assert decay[-1] == optimizer["weight_decay"]["matrices"]
    assert (optimizer["name"], optimizer["lr"], scheduler["warmup_steps"]) == ("adamw", 0.01, 2)
    if "lora" in name:
        said = shown.pop("peft_config")
        assert {key: adapters[key] for key in ("r", "lora_alpha", "lora_dropout")} == {
            key: said[key] for key in ("r", "lora_alpha", "lora_dropout")
        }
    assert config == shown


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_keeps_exact_weights_beside_those_it_computes_with(found: dict[str, Any], stage: int) -> None:
    ours, theirs = found[f"bf16, zero {stage}"], found["bf16"]
    assert all(
        ours.before[name].equal(tensor) for name, tensor in found["fsdp"].before.items() if "exp_avg" not in name
    )
    assert differences(ours.steps, theirs.steps)["loss"] < 0.01
    assert differences(ours.steps, found["fsdp"].steps[:4])["loss"] > 1e-6  # and it is not float32 that computed
    small = ours.after["model.norm.weight"]
    assert not small.equal(small.bfloat16().float())


@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_passes_from_one_backend_and_world_to_another(found: dict[str, Any], way: str) -> None:
    legs, expected = found[way], found["lora" if way.startswith("lora") else "fsdp"]
    assert len(expected.steps) == 20
    assert_as_one(legs, expected)


@pytest.mark.parametrize("name", STAGES)
def test_a_gradient_that_is_not_finite_stops_before_the_optimiser_moves(found: dict[str, Any], name: str) -> None:
    seen = found["not finite"][name, "gradient"]
    assert re.match(r"step 3: loss \d.*All losses were finite, the gradient was not", seen["said"])
    assert all(seen["before"][key].equal(tensor) for key, tensor in seen["after"].items())


@pytest.mark.parametrize("name", STAGES)
def test_of_a_loss_that_is_not_finite_the_other_rank_says_whose_it_was(found: dict[str, Any], name: str) -> None:
    seen = found["not finite"][name, "loss"]
    assert re.match(r"step 3, rank 1: loss nan,.*Of the step's 4 microbatches 2 had such a loss", seen["said"])
    assert all(seen["before"][key].equal(tensor) for key, tensor in seen["after"].items())


SHORT = {"training": {"max_steps": 30, "save_every_steps": 3}, "optimizer": {"lr": 0.001}}


@pytest.fixture(scope="module")
def nursery(cache: Path) -> Iterator[Nursery]:
    started = Nursery(cache, "deepspeed")
    yield started
    started.close()


@pytest.mark.parametrize(
    "change",
    [zero(1), {**zero(2), **LORA}, zero(2, "optimizer"), zero(3), zero(3, "all")],
    ids=["zero 1", "lora on zero 2", "zero 2, optimizer offloaded", "zero 3", "zero 3, all offloaded"],
)
def test_a_killed_and_a_stopped_run_end_with_the_bits_of_an_undisturbed_one(make: Make, change: dict[str, Any]) -> None:
    digest = make(**SHORT, **change).finish(2)["checkpoint"]["weights_digest"]
    attempts = make(**SHORT, **change)
    pids = attempts.start(2)
    wait_until(lambda: attempts.committed >= 3, timeout_seconds=120, what="a checkpoint", interval_seconds=0.01)
    os.kill(pids[1], signal.SIGKILL)
    assert attempts.wait()[1] == -signal.SIGKILL
    killed_at = attempts.committed
    attempts.start(2)
    wait_until(lambda: attempts.step > killed_at, timeout_seconds=120, what="a step", interval_seconds=0.01)
    attempts.rundir.ask_to_stop()
    assert attempts.wait() == [75, 75]
    assert killed_at < attempts.committed < 30
    assert attempts.finish(2)["checkpoint"]["weights_digest"] == digest


def test_one_rank_takes_the_steps_of_two(make: Make) -> None:
    one, two = make(**SHORT, **zero(2)), make(**SHORT, **zero(2))
    one.finish(1)
    two.finish(2)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in one.run.logs] == pytest.approx([row[key] for row in two.run.logs], rel=1e-5)


def test_nothing_is_compiled_nor_said(runs: Runs, tmp_path: Path) -> None:
    run = runs.make(**zero(3), cluster={"num_nodes": 2}, training={"max_steps": 2, "save_every_steps": 2})
    compiled = tmp_path / "extensions"
    run.environment |= {"TORCH_EXTENSIONS_DIR": str(compiled), "CXX": "/bin/false"}
    assert run.finish()["exit_code"] == 0, run.last  # whose standard output is one JSON document
    assert not compiled.exists()
    assert run.last is not None
    assert not [line for line in run.last.stderr.splitlines() if "Warning" in line or "WARNING" in line]


def test_what_deepspeed_is_given_is_decided_by_the_job() -> None:
    from nexa_train.backend_config.deepspeed import deepspeed_config
    from nexa_train.config import JobSpec
    from nexa_train.plan import make_plan

    values = {
        "data": {"remote_uri": "rows.jsonl"},
        "training": {"global_batch_size": 16, "microbatch_size_per_gpu": 2, "precision": "bf16", "max_steps": 1},
        "optimizer": {"max_grad_norm": 0.5},
        "cluster": {"gpus_per_node": 4},
        **zero(3, "all"),
    }
    spec = JobSpec.model_validate(values)
    given = deepspeed_config(spec, make_plan(spec))
    assert json.loads(json.dumps(given)) == given
    assert (given["train_batch_size"], given["train_micro_batch_size_per_gpu"]) == (16, 2)
    assert given["gradient_accumulation_steps"] == 2
    assert given["gradient_clipping"] == 0.5
    assert given["bf16"]["enabled"]
    sharding = given["zero_optimization"]
    assert sharding["stage"] == 3
    assert sharding["offload_optimizer"] == sharding["offload_param"] == {"device": "cpu", "pin_memory": True}

"""TRL's trainers on the plan's microbatches do what the native loop does, on one rank and on two."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.nursery import Make, Nursery, check_killed_once
from tests.training.ranks import Trained, job, make_context, train, train_on_ranks

pytestmark = pytest.mark.training

RELATIVE, ABSOLUTE = 1e-5, 1e-4
LORA = {"type": "lora", "rank": 4}
DPO = {"method": {"type": "dpo"}, "data": {"format": "preference"}, "optimizer": {"lr": 0.001}}
PARTIAL = {"max_steps": None, "epochs": 1, "global_batch_size": 12, "microbatch_size_per_gpu": 2}
"""88 sequences, 12 a step: the eighth has four, all of them the first rank's."""

FEW = {"max_steps": 6}

CASES: dict[str, dict[str, Any]] = {
    "sft": {"training": {"max_steps": 20}},
    "sft with lora": {"tuning": LORA, "training": FEW},
    "sft packed": {"data": {"packing": True}, "model": {"max_seq_len": 160}, "training": {"max_steps": 20}},
    "sft to a partial step": {"training": PARTIAL},
    "sft recomputing activations": {"training": {**FEW, "activation_checkpointing": True}},
    "dpo": {**DPO, "training": {"max_steps": 20}},
    "dpo with lora": {**DPO, "tuning": LORA, "training": FEW},
    "dpo to a partial step": {**DPO, "training": PARTIAL},
}
"""What both backends take."""

QLORA: dict[str, dict[str, Any]] = {"sft with qlora": {}, "dpo with qlora": DPO}
ADAFACTOR: dict[str, Any] = {"optimizer": {"name": "adafactor", "lr": 0.1}, "training": FEW}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    """A model of linear layers wide enough to be quantised; quantising needs weights to load."""
    from nexa_train.models.build import build_model

    context = make_context(job(rows, model={"d_model": 64}, backend="hf"))
    folder = tmp_path_factory.mktemp("model")
    build_model(context.spec, context.located, context.tokenizer).save_pretrained(folder)
    for file in context.located.folder.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def quantised(folder: Path) -> dict[str, Any]:
    """A short run of QLoRA on the model in a folder."""
    model = {"d_model": None, "n_layers": None, "n_heads": None, "name": str(folder)}
    return {"backend": "hf", "model": model, "tuning": {"type": "qlora", "rank": 4}, "training": FEW}


@pytest.fixture(scope="module")
def jobs(rows: Path, pairs: Path, model_folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Every case on every backend that takes it, by name and backend."""
    made = {
        (name, backend): job(pairs if name.startswith("dpo") else rows, backend=backend, **change)
        for name, change in CASES.items()
        for backend in ("fsdp", "hf")
    }
    made["sft with adafactor", "hf"] = job(rows, backend="hf", **ADAFACTOR)
    for name, change in QLORA.items():
        made[name, "hf"] = job(pairs if name.startswith("dpo") else rows, **quantised(model_folder), **change)
    return made


@pytest.fixture(scope="module")
def on_two(
    jobs: dict[tuple[str, str], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Trained]:
    """All of them on the same two ranks."""
    found = train_on_ranks({"/".join(key): values for key, values in jobs.items()}, tmp_path_factory.mktemp("ranks"))
    return {(name, backend): trained for key, trained in found.items() for name, _, backend in [key.partition("/")]}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """As on the ranks: another number of threads rounds differently."""
    import torch

    torch.set_num_threads(1)


def assert_same(found: Trained, expected: Trained) -> None:
    """Equal up to rounding."""
    assert found.tokens == expected.tokens
    assert found.losses == pytest.approx(expected.losses, rel=RELATIVE)
    assert found.norms == pytest.approx(expected.norms, rel=RELATIVE)
    assert found.validation == pytest.approx(expected.validation, rel=RELATIVE)
    for name, weights in expected.weights.items():
        assert found.weights[name] == pytest.approx(weights, abs=ABSOLUTE), name


@pytest.mark.parametrize("name", CASES)
def test_trl_takes_the_steps_that_the_native_loop_takes(name: str, on_two: dict[tuple[str, str], Trained]) -> None:
    assert_same(on_two[name, "hf"], on_two[name, "fsdp"])
    losses = on_two[name, "hf"].losses
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("backend", ["fsdp", "hf"])
@pytest.mark.parametrize("name", CASES)
def test_one_rank_takes_the_steps_that_two_take(
    name: str, backend: str, jobs: dict[tuple[str, str], dict[str, Any]], on_two: dict[tuple[str, str], Trained]
) -> None:
    assert_same(train(jobs[name, backend]), on_two[name, backend])


def test_adafactor_takes_the_same_steps_on_two_ranks_on_one_and_natively(
    rows: Path, on_two: dict[tuple[str, str], Trained], jobs: dict[tuple[str, str], dict[str, Any]]
) -> None:
    found = on_two["sft with adafactor", "hf"]
    assert_same(found, train(jobs["sft with adafactor", "hf"]))
    assert_same(found, train(job(rows, backend="fsdp", **ADAFACTOR)))
    assert found.losses[-1] < found.losses[0]


@pytest.mark.parametrize("name", QLORA)
def test_qlora_trains_on_two_ranks_as_on_one(
    name: str, jobs: dict[tuple[str, str], dict[str, Any]], on_two: dict[tuple[str, str], Trained]
) -> None:
    found = train(jobs[name, "hf"])
    assert_same(found, on_two[name, "hf"])
    assert found.losses[-1] < found.losses[0]
    assert all("lora_" in name for name in found.weights)


@pytest.fixture(scope="module")
def nursery(cache: Path) -> Iterator[Nursery]:
    found = Nursery(cache, "hf", "bitsandbytes")
    yield found
    found.close()


def test_a_killed_run_of_qlora_ends_with_the_bits_of_an_undisturbed_one(make: Make, model_folder: Path) -> None:
    change = {**quantised(model_folder), "training": {"max_steps": 40, "save_every_steps": 4}}
    check_killed_once(lambda: make(**change), world=1, last_step=40)


def test_a_killed_run_of_two_ranks_ends_with_the_bits_of_an_undisturbed_one(make: Make) -> None:
    change = {"backend": "hf", "training": {"max_steps": 40, "save_every_steps": 4}}
    check_killed_once(lambda: make(**change), world=2, last_step=40)


def test_bf16_is_that_of_the_native_loop_up_to_its_rounding(rows: Path) -> None:
    exact = train(job(rows, backend="hf", training=FEW))
    found, native = (
        train(job(rows, backend=backend, training={**FEW, "precision": "bf16"})) for backend in ("hf", "fsdp")
    )
    assert found.losses == pytest.approx(native.losses, rel=0.01)
    assert found.losses != pytest.approx(exact.losses, rel=1e-6), "it is not float32 that computed"


def test_adapters_of_a_quantised_model_keep_the_precision_that_is_saved(
    jobs: dict[tuple[str, str], dict[str, Any]],
) -> None:
    import torch

    from nexa_train.backends import make_backend

    backend: Any = make_backend(make_context(jobs["sft with qlora", "hf"]))
    backend.setup()
    backend.train(lambda metrics: True)
    adapters = [parameter for parameter in backend.causal.parameters() if parameter.requires_grad]
    moments = [tensor for state in backend.optimizer.state.values() for tensor in state.values()]
    assert {tensor.dtype for tensor in [*adapters, *moments]} == {torch.float32}


def test_the_partial_step_is_one(on_two: dict[tuple[str, str], Trained]) -> None:
    assert len(on_two["sft to a partial step", "hf"].losses) == 8


def test_packed_steps_hold_more_than_loose_ones(on_two: dict[tuple[str, str], Trained]) -> None:
    loose, packed = on_two["sft", "hf"], on_two["sft packed", "hf"]
    assert min(packed.tokens) > max(loose.tokens)


def test_packed_samples_do_not_see_each_other_in_trl(rows: Path) -> None:
    from nexa_train.backends import make_backend

    losses = []
    for packing in (False, True):
        everything = {"max_steps": None, "epochs": 1, "global_batch_size": 96, "microbatch_size_per_gpu": 8}
        values = job(rows, backend="hf", data={"packing": packing}, model={"max_seq_len": 160}, training=everything)
        backend: Any = make_backend(make_context(values))
        backend.setup()
        backend.train(lambda metrics: bool(losses.append(metrics.loss)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)

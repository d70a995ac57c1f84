"""Backend axolotl, in the environment that it needs (`make test-axolotl`): really trained, stopped, killed, gone on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexa_train.backend_config.axolotl import VERSION, environment
from nexa_train.config import JobSpec
from nexa_train.errors import ConfigError, NonFiniteLossError
from nexa_train.launch.installed import unmet
from tests.cluster.paths import REPOSITORY
from tests.cluster.run import wait_until
from tests.training.harness import Runs
from tests.training.legs import assert_as_one, in_legs
from tests.training.nursery import Attempts, Nursery
from tests.training.ranks import job, make_context
from tests.training.test_keys import FULL, TRAINED, assert_every_key_is_read

pytestmark = [
    pytest.mark.training,
    pytest.mark.skipif(bool(unmet(f"axolotl=={VERSION}")), reason="needs Axolotl's environment: make test-axolotl"),
]

AXOLOTL = {"backend": "axolotl"}
SHORT = {"training": {"max_steps": 6}}
LONG = {"training": {"max_steps": 40, "save_every_steps": 5}}
LORA = {"tuning": {"type": "lora", "rank": 4}}
QLORA = {"tuning": {"type": "qlora", "rank": 4}}
DPO = {"method": {"type": "dpo", "beta": 0.2}}
SLOW = {"training": {"max_steps": 20, "save_every_steps": 5}}

TWO_GPUS = {"cluster": {"gpus_per_node": 2}}
FSDP = {"axolotl": {"sharding": "fsdp"}}
ZERO = {"axolotl": {"sharding": "deepspeed"}}
SHARDED: dict[str, dict[str, Any]] = {
    "fsdp": FSDP,
    "fsdp-lora": {**FSDP, **LORA},
    "zero-2": ZERO,
    "zero-1-lora": {**ZERO, **LORA, "deepspeed": {"zero_stage": 1}},
}


@pytest.fixture(scope="module")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`data` of a job over pairs of uneven length."""
    path = tmp_path_factory.mktemp("preferences") / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(48):
            chosen = " ".join(f"{number * factor}" for factor in range(1, 3 + number % 5))
            row = {"prompt": f"Count by {number}.", "chosen": chosen, "rejected": "no " * (1 + number % 3)}
            file.write(json.dumps(row) + "\n")
    return {"format": "preference", "remote_uri": str(path)}


@pytest.fixture(scope="module", autouse=True)
def as_the_launcher_sets_it(cache: Path) -> Iterator[None]:
    """The variables of a rank, in this process and in what it starts."""
    with pytest.MonkeyPatch.context() as patch:
        values = environment(JobSpec.model_validate({**AXOLOTL, "data": {"remote_uri": "-"}}))
        for name, value in {**values, "NEXA_CACHE": str(cache), "OMP_NUM_THREADS": "1", "MKL_CBWR": "AUTO"}.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def nursery(cache: Path) -> Iterator[Nursery]:
    found = Nursery(cache, "axolotl", "axolotl.core.builders", "deepspeed")
    yield found
    found.close()


def made(values: dict[str, Any]) -> Any:
    """A backend, set up in this process."""
    from nexa_train.backends import make_backend

    backend: Any = make_backend(make_context(values))
    backend.setup()
    return backend


def trained(backend: Any) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of all its steps."""
    steps: list[Any] = []

    def note(metrics: Any) -> bool:
        steps.append(metrics)
        return False

    backend.train(note)
    return [step.loss for step in steps], [step.grad_norm for step in steps]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(SHORT, id="full"),
        pytest.param({**SHORT, "data": {"packing": True}}, id="packed"),
        pytest.param({"training": {"max_steps": None, "epochs": 0.3, "global_batch_size": 12}}, id="partial-last-step"),
        pytest.param({"training": {"max_steps": 6, "activation_checkpointing": True}}, id="activation-checkpointing"),
        pytest.param({**SHORT, **LORA}, id="lora"),
        pytest.param({**SHORT, **DPO}, id="dpo"),
        pytest.param({**SHORT, **DPO, **LORA}, id="dpo-lora"),
    ],
)
def test_steps_are_those_of_the_native_backend(rows: Path, preferences: dict[str, Any], change: dict[str, Any]) -> None:
    import torch

    values = {**change, **({"data": preferences} if "method" in change else {})}
    once = {**values, "training": {**values["training"], "activation_checkpointing": False}}  # changes no step
    axolotl, native = made(job(rows, **AXOLOTL, **values)), made(job(rows, backend="fsdp", **once))
    with torch.no_grad():  # fresh adapters draw in another order
        ours = dict(axolotl.causal.named_parameters())
        for name, parameter in native.causal.named_parameters():
            parameter.copy_(ours[name])
    assert axolotl.validate() == pytest.approx(native.validate(), rel=1e-5)
    losses, norms = trained(axolotl)
    wanted, wanted_norms = trained(native)
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert norms == pytest.approx(wanted_norms, rel=1e-4)
    assert axolotl.validate() == pytest.approx(native.validate(), rel=1e-5)


@pytest.fixture(scope="module")
def sharded(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What became of `SHARDED`, each job on two ranks."""
    folder = tmp_path_factory.mktemp("sharded")
    jobs = {name: job(rows, **AXOLOTL, **TWO_GPUS, **SHORT, **change) for name, change in SHARDED.items()}
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-m", "tests.training.axolotl_sharded", str(folder)]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    done = subprocess.run(command, env=alone, cwd=REPOSITORY, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_it_takes_the_same_steps_and_goes_on_with_the_same_bits(rows: Path, sharded: Path, name: str) -> None:
    change = {key: value for key, value in SHARDED[name].items() if key == "tuning"}
    alone, _ = trained(made(job(rows, **AXOLOTL, **SHORT, **change)))
    whole, resumed = (json.loads((sharded / name / f"{leg}.json").read_text()) for leg in ("whole", "resumed"))
    assert whole["losses"] == pytest.approx(alone, rel=1e-5)
    assert resumed["losses"] == whole["losses"][3:]
    assert resumed["weights"] == whole["weights"]
    assert ("DeepSpeedEngine" if "zero" in name else "FSDP") in whole["kind"]


@pytest.mark.parametrize("change", [pytest.param({}, id="sft"), pytest.param(DPO, id="dpo")])
def test_qlora_trains_over_weights_of_four_bits(
    rows: Path, preferences: dict[str, Any], change: dict[str, Any]
) -> None:
    import torch

    data = {"data": preferences} if change else {}
    backend = made(job(rows, **AXOLOTL, **SHORT, **QLORA, **change, **data))
    before = backend.validate()
    trained(backend)
    assert backend.validate() < before
    kinds = {type(module).__name__ for module in backend.causal.modules()}
    assert "Linear4bit" in kinds
    staged = backend.stage().ready().ready()
    assert {piece.tensor.dtype for piece in [*staged.weights.values(), *staged.optimizer.values()]} == {torch.float32}
    assert all("lora_" in name for name in staged.weights)


@pytest.mark.parametrize("way", [("axolotl", "fsdp", "axolotl"), ("fsdp", "axolotl", "fsdp")], ids="-".join)
@pytest.mark.parametrize("change", [{}, LORA], ids=["full", "lora"])
def test_a_checkpoint_passes_to_and_from_the_native_backend(
    rows: Path, tmp_path: Path, change: dict[str, Any], way: tuple[str, ...]
) -> None:
    values = job(rows, training={"max_steps": 12}, **change)
    [whole] = in_legs(values, tmp_path, way[0])
    assert_as_one(in_legs(values, tmp_path, *way), whole)


@pytest.mark.parametrize("change", [pytest.param(TRAINED, id="lora"), pytest.param({**TRAINED, **FULL}, id="full")])
def test_every_key_that_says_what_to_train_is_read(runs: Runs, tmp_path: Path, change: dict[str, Any]) -> None:
    assert_every_key_is_read(runs.make(**AXOLOTL, **change), tmp_path)


def wait_for_step(attempts: Attempts, step: int) -> None:
    """Until the next attempt would go on from there."""
    wait_until(lambda: attempts.committed >= step, timeout_seconds=120, what=f"step {step} committed")


@pytest.mark.parametrize(
    ("change", "world"),
    [
        pytest.param(LONG, 1, id="full"),
        pytest.param(LONG, 2, id="full-two-ranks"),
        pytest.param({**LONG, **LORA}, 1, id="lora"),
        pytest.param({**LONG, **QLORA}, 1, id="qlora"),
        pytest.param({**SLOW, **DPO}, 1, id="dpo"),
        pytest.param({**SLOW, **DPO, **LORA}, 1, id="dpo-lora"),
    ],
)
def test_stopped_and_killed_it_goes_on_and_ends_with_the_same_bits(
    nursery: Nursery, runs: Runs, tmp_path: Path, preferences: dict[str, Any], change: dict[str, Any], world: int
) -> None:
    values = {**AXOLOTL, **change} | ({"data": preferences} if "method" in change else {})
    undisturbed, disturbed = (Attempts(nursery, runs.make(**values), tmp_path / name) for name in ("one", "other"))
    digest = undisturbed.finish(world)["checkpoint"]["weights_digest"]

    for step, kind, code in ((5, signal.SIGTERM, 75), (10, signal.SIGKILL, -signal.SIGKILL)):
        pids = disturbed.start(world)
        wait_for_step(disturbed, step)
        os.kill(pids[0], kind)
        assert code in disturbed.wait()
    assert disturbed.finish(world)["checkpoint"]["weights_digest"] == digest
    manifest = disturbed.run.manifests[-1]
    last = change["training"]["max_steps"]
    assert (manifest.step, manifest.world["backend"], manifest.world["ranks"]) == (last, "axolotl", world)


def test_nexa_run_trains_publishes_and_has_nothing_left_to_do(runs: Runs) -> None:
    run = runs.make(**AXOLOTL)
    outcome = run.finish()
    assert outcome["exit_code"] == 0, (outcome, run.last)
    assert [manifest.step for manifest in run.manifests] == [4, 8, 12]
    assert run.losses[-1] < run.losses[0]
    assert "finished before" in run.finish()["message"]


def test_a_loss_that_is_not_finite_stops_before_the_optimiser_moves(rows: Path) -> None:
    import torch

    backend = made(job(rows, **AXOLOTL))
    with torch.no_grad():
        backend.causal.base_model.norm.weight[0] = float("nan")
    before = {name: piece.tensor.clone() for name, piece in backend.stage().ready().ready().weights.items()}
    with pytest.raises(NonFiniteLossError, match=r"step 1, rank 0.*sequences were \[.*samples \["):
        trained(backend)
    for name, piece in backend.stage().ready().ready().weights.items():
        torch.testing.assert_close(piece.tensor, before[name], equal_nan=True, rtol=0, atol=0)


def test_a_lora_target_that_matches_nothing_is_refused(rows: Path) -> None:
    tuning = {"type": "lora", "rank": 4, "target_modules": ["q_proj", "nothing"]}
    there = r"this model has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj$"
    with pytest.raises(ConfigError, match=rf"tuning\.target_modules: nothing match no linear layer; {there}"):
        made(job(rows, **AXOLOTL, tuning=tuning))
    with pytest.raises(ConfigError, match=r"tuning\.target_modules: .*nothing.* not found"):
        made(job(rows, **AXOLOTL, tuning={**tuning, "target_modules": ["nothing"]}))


def test_what_axolotl_has_against_a_job_is_one_error(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nexa_train.backends import make_backend

    values = job(rows, **AXOLOTL, **TWO_GPUS, **FSDP, **QLORA)
    values["data"] = {**values["data"], "format": "preference"}
    # Past our own refusals of several ranks of dpo and of sharded qlora: Axolotl has another.
    monkeypatch.setattr("nexa_train.backend_config.axolotl._not_sharded", lambda *_: "")
    context = replace(make_context(job(rows)), spec=JobSpec.model_validate({**values, **DPO}))
    context = replace(context, plan=replace(context.plan, world_size=2))
    with pytest.raises(ConfigError, match=r"axolotl refuses .* FSDP2 does not support .* load_in_4bit"):
        make_backend(context).setup()

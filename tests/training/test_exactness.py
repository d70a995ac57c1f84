"""What must not change the result, does not: accumulation, number of ranks, backend. Packing: test_steps.py."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.training.harness import Run, Runs

pytestmark = pytest.mark.training

RELATIVE = 1e-5
ONE_RANK: dict[str, Any] = {"cluster": {"num_nodes": 1}}


def finished(run: Run) -> Run:
    outcome = run.finish()
    assert outcome["exit_code"] == 0, (outcome, run.last.stderr if run.last else "")
    return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, cache: Any, rows: Any) -> Run:
    """One rank, fsdp's loop, microbatches of 4."""
    return finished(Runs(cache, rows, tmp_path_factory.mktemp("reference")).make())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"training": {"microbatch_size_per_gpu": 8}}, id="no-accumulation"),
        pytest.param({"training": {"microbatch_size_per_gpu": 1}}, id="accumulation-8"),
        pytest.param({"cluster": {"num_nodes": 2}}, id="two-ranks"),
        pytest.param({"backend": "hf"}, id="hf"),
        pytest.param({"training": {"activation_checkpointing": True}}, id="activation-checkpointing"),
    ],
)
def test_losses_and_gradient_norms_are_those_of_the_reference(runs: Runs, reference: Run, change: Any) -> None:
    other = finished(runs.make(**change))
    assert other.losses == pytest.approx(reference.losses, rel=RELATIVE)
    norms = [[e["grad_norm"] for m in run.manifests for e in m.logs] for run in (reference, other)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_the_same_run_twice_gives_the_same_bits(runs: Runs, reference: Run) -> None:
    again = finished(runs.make())
    assert [m.weights_digest for m in again.manifests] == [m.weights_digest for m in reference.manifests]
    assert again.losses == reference.losses


def test_lora_agrees_between_backends_and_saves_an_adapter_that_peft_reads(runs: Runs) -> None:
    from peft import PeftConfig
    from safetensors.torch import load_file

    tuning = {"tuning": {"type": "lora", "rank": 4}, "training": {"max_steps": 6, "save_every_steps": 6}}
    ours, theirs = finished(runs.make(**tuning)), finished(runs.make(**tuning, backend="hf"))
    assert ours.losses == pytest.approx(theirs.losses, rel=RELATIVE)
    folder = next(ours.artifacts.glob("checkpoints/*/step-00000006/data/*"))
    assert PeftConfig.from_pretrained(str(folder)).r == 4
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert all(name.startswith("base_model.model.model.layers.") for name in names)


def test_a_checkpoint_of_full_tuning_loads_in_transformers(reference: Run) -> None:
    from transformers import AutoModelForCausalLM

    folder = next(reference.artifacts.glob("checkpoints/*/step-00000012/data/*"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2


def test_epochs_end_with_a_partial_step_that_counts_its_own_tokens_only(runs: Runs) -> None:
    # 88 rows to train on, 12 a step: the eighth step has 4.
    training = {"training": {"max_steps": None, "epochs": 1, "global_batch_size": 12, "microbatch_size_per_gpu": 2}}
    one, two = finished(runs.make(**training)), finished(runs.make(**training, cluster={"num_nodes": 2}))
    assert len(one.losses) == math.ceil(88 / 12)
    assert one.losses == pytest.approx(two.losses, rel=RELATIVE)
    assert one.manifests[-1].cursor == {"sequences": 88}


def test_a_checkpoint_of_one_backend_and_world_is_gone_on_from_by_another(runs: Runs, reference: Run) -> None:
    import shutil

    run = runs.make(cluster={"num_nodes": 2})
    shutil.copytree(reference.artifacts, run.artifacts)
    for step in ("step-00000008", "step-00000012"):
        shutil.rmtree(next(run.artifacts.glob(f"checkpoints/*/{step}")))
    finished(run)
    assert run.losses == pytest.approx(reference.losses, rel=RELATIVE)
    assert run.manifests[1].world["ranks"] == 2
    assert run.manifests[1].parent == reference.manifests[0].digest

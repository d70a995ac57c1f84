"""What must not change the result, does not: accumulation, packing, number of ranks, backend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.training.harness import PRETRAIN, Run, Runs, write_texts
from tests.training.ranks import Trained, job, make_context, train, train_on_ranks

pytestmark = pytest.mark.training

RELATIVE = 1e-5


def finished(run: Run) -> Run:
    outcome = run.finish()
    assert outcome["exit_code"] == 0, (outcome, run.last.stderr if run.last else "")
    return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, cache: Any, rows: Any) -> Run:
    """One rank, fsdp's loop, microbatches of 4."""
    return finished(Runs(cache, rows, tmp_path_factory.mktemp("reference")).make())


STEPS = {"max_steps": 20}
SAME: dict[str, dict[str, Any]] = {
    "without accumulation": {"training": {**STEPS, "microbatch_size_per_gpu": 8}},
    "accumulation 8": {"training": {**STEPS, "microbatch_size_per_gpu": 1}},
    "recomputed activations": {"training": {**STEPS, "activation_checkpointing": True}},
    "attention by its formula": {"training": STEPS, "model": {"attn": "eager"}},
}


@pytest.fixture
def _one_thread(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """As on the ranks: another number of threads rounds differently."""
    import torch

    torch.set_num_threads(1)
    monkeypatch.setenv("NEXA_CACHE", str(cache))


def assert_same(found: Trained, expected: Trained) -> None:
    """Up to rounding, which Adam amplifies in the weights."""
    assert found.losses == pytest.approx(expected.losses, rel=RELATIVE)
    assert found.norms == pytest.approx(expected.norms, rel=RELATIVE)
    for name, weights in expected.weights.items():
        assert found.weights[name] == pytest.approx(weights, abs=1e-4), name


@pytest.mark.usefixtures("_one_thread")
def test_accumulation_recomputing_attention_and_ranks_change_no_step_of_twenty(rows: Path, tmp_path: Path) -> None:
    expected = train(job(rows, training=STEPS))
    for change in SAME.values():
        assert_same(train(job(rows, **change)), expected)
    assert_same(train_on_ranks({"two": job(rows, training=STEPS)}, tmp_path / "ranks")["two"], expected)


@pytest.mark.usefixtures("_one_thread")
def test_pretraining_takes_the_same_steps_accumulated_recomputed_and_on_two_ranks(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts.jsonl")
    expected = train(job(texts, **PRETRAIN, training=STEPS))
    for change in SAME.values():
        assert_same(train(job(texts, **PRETRAIN, **change)), expected)
    assert_same(train_on_ranks({"two": job(texts, **PRETRAIN, training=STEPS)}, tmp_path / "ranks")["two"], expected)


@pytest.mark.usefixtures("_one_thread")
def test_packing_changes_no_step_of_twenty_over_the_same_samples(rows: Path) -> None:
    """Packed or not, a step of all sequences holds the same samples, in another order."""
    found = []
    for packing in (True, False):
        change: dict[str, Any] = {"data": {"packing": packing}, "model": {"max_seq_len": 160}}
        count = make_context(job(rows, **change)).train.num_sequences
        whole = {**STEPS, "global_batch_size": count, "microbatch_size_per_gpu": 1 if packing else 8}
        found.append(train(job(rows, **change, training=whole)))
    packed, alone = found
    assert packed.tokens == alone.tokens
    assert_same(packed, alone)


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

"""A run survives what kills it, and ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import psutil
import pytest

from nexa_train.config.load import load_job
from nexa_train.data.prepare import LAYOUT_VERSION
from nexa_train.rundir import RunDir
from tests.cluster.run import wait_until
from tests.training.harness import Run, Runs, ranks_of, write_rows

pytestmark = pytest.mark.training

STEPS = 240
LONG = {"training": {"max_steps": STEPS, "save_every_steps": 5}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path, rows: Path) -> str:
    """The weights digest of LONG, two ranks, left alone."""
    outcome = Runs(cache, rows, tmp_path_factory.mktemp("undisturbed")).make(**LONG, cluster={"num_nodes": 2}).finish()
    assert outcome["exit_code"] == 0, outcome
    return outcome["checkpoint"]["weights_digest"]


def committed(run: Run) -> int:
    """Manifests that the run has committed."""
    return len(list(run.artifacts.glob("checkpoints/*/step-*/manifest.json")))


def wait_for_checkpoints(run: Run, count: int) -> None:
    """Until so many are committed."""
    wait_until(
        lambda: committed(run) >= count,
        timeout_seconds=120,
        what=f"{count} checkpoints committed",
        interval_seconds=0.005,
    )


def test_a_rank_killed_at_random_moments_changes_no_bit(runs: Runs, undisturbed: str) -> None:
    run, chance = runs.make(**LONG, cluster={"num_nodes": 2}), random.Random(11)
    for _ in range(3):
        before = committed(run)
        process = run.start()
        # A new one: only then do the ranks of this attempt run for sure.
        wait_for_checkpoints(run, before + 1)
        chance.choice(ranks_of(process)).send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1, out + err
    outcome = run.finish()
    assert outcome["exit_code"] == 0
    assert outcome["checkpoint"]["weights_digest"] == undisturbed


def test_a_killed_launcher_takes_its_ranks_with_it_and_the_run_goes_on(
    runs: Runs, cache: Path, undisturbed: str
) -> None:
    run = runs.make(**LONG, cluster={"num_nodes": 2})
    process = run.start()
    wait_for_checkpoints(run, 1)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    process.kill()
    process.communicate()
    gone, alive = psutil.wait_procs(ranks, timeout=15)
    assert not alive, gone
    left = [folder / "restore" for folder in cache.glob(f"runs/{load_job(run.job).run_id}/*") if folder.is_dir()]
    for tensors in left:
        tensors.mkdir(exist_ok=True)
    assert run.finish()["checkpoint"]["weights_digest"] == undisturbed
    assert [tensors.exists() for tensors in left] == [False] * len(left)
    assert left


def test_sigterm_commits_a_checkpoint_and_exits_75(runs: Runs, undisturbed: str) -> None:
    run = runs.make(**LONG, cluster={"num_nodes": 2})
    process = run.start()
    wait_for_checkpoints(run, 1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    stopped_at = run.manifests[-1].step
    assert 0 < stopped_at < STEPS
    outcome = run.finish()
    assert outcome["checkpoint"]["weights_digest"] == undisturbed
    assert outcome["step"] == STEPS


def test_sigterm_during_an_evaluation_commits_what_was_trained_and_exits_75(
    runs: Runs, cache: Path, tmp_path: Path
) -> None:
    many = {"remote_uri": str(write_rows(tmp_path / "many.jsonl", 4000)), "validation": {"rows": 3000}}
    run = runs.make(data=many, training={"max_steps": 6, "save_every_steps": 100, "eval_every_steps": 3})
    process = run.start()

    def evaluates() -> bool:
        told = [RunDir(folder).read_progress() for folder in cache.glob(f"runs/{run_id}/*")]
        return any(each and (each.phase, each.step) == ("validating", 3) for each in told)

    run_id = load_job(run.job).run_id
    wait_until(evaluates, timeout_seconds=120, what="the evaluation after step 3", interval_seconds=0.005)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    (stopped,) = run.manifests
    assert stopped.step == 3
    assert "validation_loss" not in stopped.metrics, "it was cut short"
    assert run.finish()["step"] == 6


def test_hf_with_dropout_goes_on_with_the_same_bits(runs: Runs) -> None:
    hf = {
        "backend": "hf",
        "tuning": {"type": "lora", "rank": 4, "dropout": 0.2},
        "training": {"max_steps": 40, "save_every_steps": 5},
    }
    undisturbed = runs.make(**hf).finish()
    run = runs.make(**hf)
    process = run.start()
    wait_for_checkpoints(run, 1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert run.finish()["checkpoint"]["weights_digest"] == undisturbed["checkpoint"]["weights_digest"]


def test_a_finished_run_ends_at_once_and_writes_nothing(runs: Runs) -> None:
    run = runs.make()
    first = run.finish()
    before = sorted((path, os.stat(path).st_mtime_ns) for path in run.artifacts.glob("checkpoints/**/*"))
    again = run.finish()
    assert again["exit_code"] == 0
    assert again["checkpoint"] == first["checkpoint"]
    assert "finished before" in again["message"]
    assert sorted((path, os.stat(path).st_mtime_ns) for path in run.artifacts.glob("checkpoints/**/*")) == before


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(runs: Runs) -> None:
    run = runs.make()
    digest = run.finish()["checkpoint"]["weights_digest"]
    newest = max(run.artifacts.glob("checkpoints/*/step-*"))
    weights = next(newest.glob("data/*/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    outcome = run.finish()
    assert outcome["exit_code"] == 0, (outcome, run.last)
    assert outcome["checkpoint"]["weights_digest"] == digest
    assert run.last is not None
    assert run.last.returncode == 0, run.last.stderr
    assert "a damaged checkpoint is not used: model.safetensors" in run.last.stderr
    assert [manifest.step for manifest in run.manifests] == [4, 8, 12]
    assert len(list(newest.glob("damaged-*.json"))) == 1


def test_a_run_id_with_another_data_set_is_refused_and_nothing_overwritten(runs: Runs) -> None:
    run = runs.make(data={"remote_uri": "rows.jsonl"})
    rows = run.job.parent / "rows.jsonl"
    rows.write_bytes(runs.rows.read_bytes())
    assert run.finish()["exit_code"] == 0
    before = {path: path.read_bytes() for path in run.artifacts.glob("checkpoints/**/*") if path.is_file()}
    rows.write_bytes(runs.rows.read_bytes().replace(b"Count", b"Tell"))
    refused = run.finish()
    assert refused["exit_code"] == 2
    assert "dataset_digest" in refused["message"]
    assert {path: path.read_bytes() for path in run.artifacts.glob("checkpoints/**/*") if path.is_file()} == before


def test_a_run_whose_rows_were_prepared_otherwise_by_an_earlier_version_is_refused(runs: Runs) -> None:
    run = runs.make()
    assert run.finish()["exit_code"] == 0
    [claim] = run.artifacts.glob("checkpoints/*/run.json")
    claim.chmod(0o644)
    claim.write_bytes(claim.read_bytes().replace(b'"data_layout":%d' % LAYOUT_VERSION, b'"data_layout":1'))
    refused = run.finish()
    assert refused["exit_code"] == 2
    assert f"data_layout was 1, is {LAYOUT_VERSION}" in refused["message"]

"""A microbatch that does not fit is made smaller; nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nexa_train.artifact.publish import newest_valid
from nexa_train.config.job import Job
from nexa_train.data.cursor import Order
from nexa_train.launch.memory import remember_too_large
from nexa_train.launch.node import Node, make_ready, rank_environment
from nexa_train.launch.work import RankWork
from nexa_train.rundir import RunDir
from nexa_train.store import open_store
from tests.training.harness import Runs
from tests.training.nursery import free_port
from tests.training.ranks import job

pytestmark = pytest.mark.training

PROBE = """
import torch, transformers, nexa_train.rank
torch.ones(64, 64) @ torch.ones(64, 64)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData")))
"""
ROOM = 450 << 20
"""Beside what a rank needs before it trains: 64 sequences take several times as much, eight do not."""

LARGE: dict[str, Any] = {
    "model": {"d_model": 128, "n_layers": 4, "n_heads": 4, "max_seq_len": 512},
    "data": {"format": "text", "validation": {"rows": 1}},
    "method": {"type": "pretrain"},
    "training": {"global_batch_size": 64, "microbatch_size_per_gpu": "auto", "max_steps": 2, "save_every_steps": 1},
    "cluster": {"resources": {"cpu": "1"}},
}


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [" ".join(str(number * factor) for factor in range(1, 400)) for number in range(65)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def limit() -> int:
    """Bytes of private memory for a rank: enough to start, not for every microbatch."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    return int(done.stdout) * 1024 + ROOM


def test_a_microbatch_that_does_not_fit_is_halved_until_one_does(runs: Runs, long_rows: Path, limit: int) -> None:
    run = runs.make(**LARGE | {"data": {**LARGE["data"], "remote_uri": str(long_rows)}})
    outcome = run.finish(prefix=["prlimit", f"--data={limit}"])
    assert run.last is not None
    assert outcome["exit_code"] == 0, run.last.stderr
    assert "ran out of memory with 64 sequences at once" in run.last.stderr
    world = run.manifests[-1].world
    assert world["microbatch"] < 64
    assert world["microbatch"] * world["accumulation"] == 64
    remembered = sorted(int(path.stem) for path in run.artifacts.glob("checkpoints/*/out-of-memory/*.json"))
    assert min(remembered) == 2 * world["microbatch"]
    assert max(remembered) == 64
    assert [manifest.step for manifest in run.manifests] == [1, 2]


def test_what_does_not_fit_in_the_midst_of_a_run_is_taken_again_in_smaller_parts_and_changes_no_step(
    runs: Runs, limit: int, tmp_path: Path
) -> None:
    training = {**LARGE["training"], "max_steps": 3, "save_every_steps": 2}
    change: dict[str, Any] = {**LARGE, "data": {"format": "text", "validation": {}}, "training": training}
    short = [f"{number} and {number + 1}" for number in range(192)]
    order = Order(len(short), len(short), seed=7)
    last = {order.at(place) for place in range(128, 192)}
    long = " ".join(str(7 * factor) for factor in range(1, 400))
    texts = [long if number in last else text for number, text in enumerate(short)]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    change["data"]["remote_uri"] = str(path)
    run = runs.make(**change)
    outcome = run.finish(prefix=["prlimit", f"--data={limit}"])
    assert run.last is not None
    assert outcome["exit_code"] == 0, run.last.stderr
    first, second = (manifest.world["microbatch"] for manifest in run.manifests)
    assert first == 64 > second
    assert [manifest.step for manifest in run.manifests] == [2, 3]
    undisturbed = runs.make(**change | {"training": {**training, "microbatch_size_per_gpu": 8}})
    assert undisturbed.finish()["exit_code"] == 0
    for key, bound in (("tokens", 0.0), ("loss", 1e-5), ("grad_norm", 1e-4)):
        expected = [row[key] for row in undisturbed.logs]
        assert [row[key] for row in run.logs] == pytest.approx(expected, rel=bound)


def test_a_microbatch_that_was_asked_for_is_never_changed(runs: Runs, long_rows: Path, limit: int) -> None:
    fixed = {"training": {**LARGE["training"], "microbatch_size_per_gpu": 64}}
    run = runs.make(**LARGE | {"data": {**LARGE["data"], "remote_uri": str(long_rows)}} | fixed)
    outcome = run.finish(prefix=["prlimit", f"--data={limit}"])
    assert (outcome["exit_code"], outcome["cause"], outcome["retryable"]) == (1, "OutOfMemory", False)
    assert "set training.microbatch_size_per_gpu lower, or to auto" in outcome["message"]
    assert not run.manifests


A_THREAD_TOO_MUCH = """
import resource, sys, threading
from nexa_train.rank import ran_out_of_memory
if sys.argv[1] == "limited":
    in_use = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (in_use * 1024 + (64 << 20), resource.RLIM_INFINITY))
threading.stack_size(1 << (27 if sys.argv[1] == "limited" else 47))
try:
    threading.Thread(target=print).start()
except RuntimeError as exc:
    print(exc, ran_out_of_memory(exc))
"""


@pytest.mark.parametrize(("limit", "told"), [("limited", True), ("unlimited", False)])
def test_a_thread_for_whose_stack_there_is_no_room_is_want_of_memory_where_memory_is_limited(
    limit: str, told: bool
) -> None:
    command = [sys.executable, "-c", A_THREAD_TOO_MUCH, limit]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"can't start new thread {told}"]


@pytest.mark.parametrize(
    ("microbatch", "advice"), [(1, "lower model.max_seq_len"), (2, "microbatch_size_per_gpu lower")]
)
def test_what_would_help_is_said_where_no_smaller_microbatch_will_be_tried(
    tmp_path: Path, rows: Path, microbatch: int, advice: str
) -> None:
    from nexa_train.rank import out_of_memory_message

    artifacts = {"uri": str(tmp_path)}
    values = job(rows, artifacts=artifacts, training={"microbatch_size_per_gpu": microbatch})
    work = make_ready(Job.model_validate({"metadata": {"name": "test"}, "spec": values}), Node())
    assert isinstance(work, RankWork)
    message = out_of_memory_message(work, 3, "you tried to allocate\n9 bytes")
    assert message.startswith("rank 3 ran out of memory with ")
    assert advice in message


def test_what_was_too_much_for_a_container_that_could_not_say_so_is_noted_once_by_the_next_attempt(
    tmp_path: Path, rows: Path
) -> None:
    training = {"microbatch_size_per_gpu": "auto", "max_steps": 2}
    values = job(rows, artifacts={"uri": str(tmp_path)}, cluster={"num_nodes": 2}, training=training)
    described = Job.model_validate({"metadata": {"name": "test"}, "spec": values})

    def microbatches(out_of_memory_attempt: int | None) -> list[int]:
        nodes = [Node(index, 2, out_of_memory_attempt=out_of_memory_attempt) for index in range(2)]
        ready = [make_ready(described, node) for node in nodes]
        return [work.plan.microbatch for work in ready if isinstance(work, RankWork)]

    assert microbatches(None) == [4, 4]
    for _ in range(2):  # another attempt may end of something else, and be told of the same one again
        assert microbatches(0) == [2, 2]
    assert microbatches(2) == [1, 1]
    assert microbatches(3) == [1, 1]
    assert len([*tmp_path.glob("checkpoints/*/out-of-memory/*")]) == 2, "one sequence is never noted"


def test_nodes_that_hear_at_different_times_of_what_did_not_fit_agree(
    tmp_path: Path, rows: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(cache))
    training = {"microbatch_size_per_gpu": "auto", "max_steps": 2}
    artifacts, cluster = {"uri": str(tmp_path / "artifacts")}, {"num_nodes": 2}
    values = job(rows, artifacts=artifacts, cluster=cluster, training=training)
    described = Job.model_validate({"metadata": {"name": "test"}, "spec": values})
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ranks = []
    for index in range(2):
        node = Node(index, 2)
        work = make_ready(described, node)
        assert isinstance(work, RankWork)
        assert work.plan.microbatch == (4, 2)[index]
        remember_too_large(open_store(work.store_uri), work)
        folder = tmp_path / f"node-{index}"
        RunDir(folder).write_run(work.to_dict())
        environment = rank_environment(work, node) | rendezvous | {"RANK": str(index)}
        ranks.append(subprocess.Popen([sys.executable, "-m", "nexa_train.rank", str(folder)], env=environment))
    try:
        assert [rank.wait(90) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    committed = newest_valid(open_store(artifacts["uri"]), described.run_id).committed
    assert committed is not None
    world = committed.manifest.world
    assert (world["microbatch"], world["accumulation"], world["ranks"]) == (2, 2, 2)

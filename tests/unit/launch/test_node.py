"""How the ranks of one node are started, and what a failure before them says."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from nexa_train.errors import ConfigError, ForeignError, NexaError, RefusedError, StoppedError
from nexa_train.launch.meeting import Meeting
from nexa_train.launch.node import Node, failed_outcome, make_ready, rank_command, threads_of_a_rank, visible_devices
from nexa_train.models.locate import TINY_TOKENIZER
from tests.unit.config.builders import job

FOLDER = Path("/run/nexa")


def command(node: Node) -> list[str]:
    return rank_command(FOLDER, node, run_id="r", store_uri="s3://models")


def test_one_rank_is_started_without_torchrun() -> None:
    assert command(Node()) == [sys.executable, "-m", "nexa_train.rank", "/run/nexa"]


def test_ranks_of_one_node_meet_on_their_own() -> None:
    assert command(Node(ranks=2))[3:] == [
        "--standalone",
        "--nnodes=1",
        "--nproc-per-node=2",
        "--max-restarts=0",
        "--log-dir=/run/nexa/torchrun",
        "-m",
        "nexa_train.rank",
        "/run/nexa",
    ]


def test_ranks_of_several_nodes_meet_at_the_first_once_an_attempt_and_in_the_nodes_order() -> None:
    arguments = command(Node(index=1, count=2, endpoint="pod-0:29500", attempt=3))
    assert {"--nnodes=2", "--node-rank=1", "--rdzv-endpoint=pod-0:29500", "--rdzv-id=r-a3"} <= set(arguments)
    assert "--rdzv-backend=static" in arguments
    assert "--standalone" not in arguments


def test_ranks_of_nodes_without_names_meet_in_the_store() -> None:
    arguments = command(Node(index=1, count=2, endpoint=Meeting("uid", "10.0.0.8"), attempt=3))[3:]
    assert arguments[:5] == ["meet", "s3://models", "checkpoints/r/meetings/uid", "1", "10.0.0.8"]
    assert {"--rdzv-backend=static", "--node-rank=1", "--rdzv-id=r-a3"} <= set(arguments)


@pytest.mark.parametrize(
    ("error", "cause", "code", "retryable"),
    [
        (ConfigError("wrong"), "ConfigError", 2, False),
        (RefusedError("no"), "RefusedError", 4, True),
        (ForeignError("theirs"), "ForeignError", 4, False),
        (StoppedError("stopped"), "Stopped", 75, True),
        (NexaError("failed"), "NexaError", 1, True),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failure_before_the_ranks_keeps_its_code_and_says_whether_to_try_again(
    error: NexaError, cause: str, code: int, retryable: bool
) -> None:
    said = failed_outcome(job(), Node(attempt=2), error)
    assert (said.run_id, said.attempt, said.message) == (job().run_id, 2, str(error))
    assert (said.cause, said.exit_code, said.retryable) == (cause, code, retryable)


@pytest.mark.parametrize(
    ("given", "gpus_per_node", "ranks", "expected"),
    [
        (None, 0, 1, ""),
        ("0,1", 0, 2, ""),
        (None, 1, 1, "0"),
        (None, 8, 8, "0,1,2,3,4,5,6,7"),
        ("4,5,6,7", 2, 2, "4,5"),
        ("GPU-a,GPU-b", 1, 1, "GPU-a"),
    ],
    ids=["cpu", "cpu where gpus are", "one of many", "all", "what the scheduler gave", "by uuid"],
)
def test_ranks_see_one_device_each(given: str | None, gpus_per_node: int, ranks: int, expected: str) -> None:
    assert visible_devices(given, gpus_per_node=gpus_per_node, ranks=ranks) == expected


def test_threads_are_what_the_job_asks_for_else_what_this_process_may_use() -> None:
    assert threads_of_a_rank(job(cluster={"resources": {"cpu": "3500m"}}), Node()) == 3
    assert threads_of_a_rank(job(cluster={"resources": {"cpu": "500m"}}), Node()) == 1
    assert threads_of_a_rank(job(), Node()) == len(os.sched_getaffinity(0))


def test_two_pods_and_two_ranks_of_one_machine_have_the_same_threads() -> None:
    two = job(cluster={"num_nodes": 2, "resources": {"cpu": "4"}})
    assert threads_of_a_rank(two, Node(count=2, ranks=1)) == threads_of_a_rank(two, Node(ranks=2)) == 4


def test_artifacts_whose_folder_json_cannot_name_are_refused_before_a_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"m\xfcller")
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"^artifacts.uri: .*m\\udcfcller/artifacts' is not UTF-8"):
        make_ready(job(), Node())
    assert list(folder.iterdir()) == []


def test_an_adapters_run_is_refused_over_other_weights_before_a_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEXA_CACHE", str(tmp_path / "cache"))
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    base = shutil.copytree(TINY_TOKENIZER, tmp_path / "base")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (base / "model.safetensors").write_bytes(b"weights")
    run = job(
        model={"name": str(base)},
        data={"remote_uri": str(tmp_path / "rows.jsonl")},
        tuning={"type": "lora", "rank": 4},
        artifacts={"uri": str(tmp_path / "artifacts")},
    )
    first = make_ready(run, Node())
    assert make_ready(run, Node()) == first
    (base / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ConfigError, match=rf"run id {run.run_id} exists with another config: base_model was .*, is "):
        make_ready(run, Node())

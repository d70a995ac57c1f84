"""Bad input ends `nexa run` with one clear message and its exit code, before any training, and nothing is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.minio import MinioServer
from tests.training.harness import SPEC, merged, write_rows
from tests.unit.store.small_s3 import SmallS3


def nexa_run(folder: Path, *, env: dict[str, str] | None = None, **change: Any) -> subprocess.CompletedProcess[str]:
    """`nexa run` of a job over rows.jsonl in `folder`."""
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl", 16)
    spec = merged(merged(SPEC, {"data": {"remote_uri": "rows.jsonl"}}), change)
    (folder / "job.yaml").write_text(json.dumps({"name": "bad", **spec}, indent=1), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "nexa_train", "run", "job.yaml"],
        cwd=folder,
        env={**os.environ, "NEXA_CACHE": str(folder / "cache"), **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def refused(done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """It ended with `code` and one line that has all `parts`."""
    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("retrying")]
    assert line.startswith("nexa: error: ")
    for part in parts:
        assert part in line
    assert done.stdout == ""


CONFIGS = [
    pytest.param({"training": {"max_stepz": 3}}, ["job.yaml:", "training.max_stepz", "max_steps"], id="unknown key"),
    pytest.param({"training": {"seed": "many"}}, ["training.seed", "'many'", "integer"], id="wrong type"),
    pytest.param({"cluster": {"num_nodes": 3}}, ["8 is not divisible by the 3 ranks"], id="batch over ranks"),
    pytest.param(
        {"training": {"grad_accumulation_steps": 3}}, ["4 x grad_accumulation_steps 3", "8"], id="batch product"
    ),
    pytest.param({"tuning": {"type": "lora"}}, ["tuning.rank", "required"], id="lora without a rank"),
    pytest.param({"deepspeed": {"zero_stage": 3}}, ["deepspeed", "backend fsdp"], id="options of another backend"),
    pytest.param({"cluster": {"gpus_per_node": 2}}, ["wants 2 GPUs", "this machine has"], id="more GPUs than here"),
    pytest.param({"model": {"n_heads": None}}, ["d_model, n_layers and n_heads"], id="half of the sizes"),
]


@pytest.mark.parametrize(("change", "parts"), CONFIGS)
def test_a_wrong_config_is_refused(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    refused(nexa_run(tmp_path, **change), 2, *parts)
    assert not (tmp_path / "artifacts").exists()


GOOD = '{"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]}\n'
ROWS = [
    pytest.param(GOOD + '{"messages": [}\n', ["rows.jsonl row 2", "not valid JSON"], id="malformed row"),
    pytest.param("", ["rows.jsonl", "no rows"], id="empty"),
    pytest.param('{"text": "x"}\n', ["row 1", "no column 'messages'", "text"], id="another format"),
    pytest.param(
        '{"messages": [{"role": "user", "content": "Hello?"}]}\n',
        ["row 1", "nothing to learn from"],
        id="nothing to learn from",
    ),
]


@pytest.mark.parametrize(("rows", "parts"), ROWS)
def test_data_that_cannot_be_trained_on_is_refused(tmp_path: Path, rows: str, parts: list[str]) -> None:
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    refused(nexa_run(tmp_path, data={"validation": {"rows": None}}), 5, *parts)
    assert not list(tmp_path.glob("artifacts/checkpoints/*"))


def test_a_missing_data_file_is_not_found(tmp_path: Path) -> None:
    refused(nexa_run(tmp_path, data={"remote_uri": "absent.jsonl"}), 3, "data.remote_uri", "absent.jsonl")


def test_a_job_file_that_is_not_there_is_not_found() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nexa_train", "run", "/nowhere/job.yaml"], capture_output=True, text=True, check=False
    )
    refused(done, 3, "/nowhere/job.yaml", "no such file")


@pytest.mark.integration
def test_a_bucket_that_is_not_there_is_not_found(tmp_path: Path, minio_server: MinioServer) -> None:
    done = nexa_run(tmp_path, env=minio_server.env(), artifacts={"uri": "s3://no-such-bucket"})
    refused(done, 3, "no-such-bucket")


@pytest.mark.integration
def test_a_forbidden_bucket_is_refused_and_the_secret_not_told(tmp_path: Path, minio_server: MinioServer) -> None:
    bucket = minio_server.make_bucket()
    env = {**minio_server.env(), "AWS_SECRET_ACCESS_KEY": "wrong-secret-0123456789"}
    done = nexa_run(tmp_path, env=env, artifacts={"uri": f"s3://{bucket}"})
    refused(done, 4, bucket)
    assert "wrong-secret" not in done.stdout + done.stderr


def test_a_store_that_cannot_be_reached_is_refused(tmp_path: Path) -> None:
    # Port 9 of loopback: nothing listens there.
    env = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    refused(nexa_run(tmp_path, env=env, artifacts={"uri": "s3://models"}), 4, "127.0.0.1:9", "models")


def test_a_bucket_without_conditional_writes_is_refused(tmp_path: Path) -> None:
    server = SmallS3(conditional=False)
    env = {"AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    refused(nexa_run(tmp_path, env=env, artifacts={"uri": "s3://models"}), 4, "models", "overwr")
    server.shutdown()
    assert not [name for name in server.objects if "checkpoints" in name]

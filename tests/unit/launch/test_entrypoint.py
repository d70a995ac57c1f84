"""The process of a pod: what it reads, what it answers, and its last words."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nexa_train.config import Job
from nexa_train.config.protocol import PROGRESS_PORT, CheckpointRef, Progress, Termination
from nexa_train.entrypoint import read_environment, read_port, serve
from nexa_train.errors import ConfigError
from nexa_train.launch.meeting import Meeting
from nexa_train.launch.node import Node
from nexa_train.rundir import RunDir
from tests.cluster.run import wait_until
from tests.unit.config.builders import job

JOB = json.dumps({"metadata": {"name": "demo"}, "spec": {"data": {"remoteUri": "train.jsonl"}}})
OF_TWO = json.dumps(
    {"metadata": {"name": "demo"}, "spec": {"data": {"remoteUri": "train.jsonl"}, "cluster": {"numNodes": 2}}}
)

WRONG: dict[str, tuple[dict[str, str], str]] = {
    "no job": ({}, "environment: NEXA_JOB is not set; it holds the job as JSON"),
    "a job that is no JSON": ({"NEXA_JOB": "{"}, "environment: NEXA_JOB cannot be read: Expecting"),
    "a job nested without end": (
        {"NEXA_JOB": "[" * 100_000},
        "environment: NEXA_JOB cannot be read: maximum",
    ),
    "a list as job": ({"NEXA_JOB": "[]"}, "environment: NEXA_JOB holds list, expected the job as an object"),
    "a job with a typo": (
        {"NEXA_JOB": '{"metadata": {"name": "a"}, "spec": {"dta": {}}}'},
        "NexaTrainingJob/a: data: required, and not given; NexaTrainingJob/a: dta: unknown key; did you mean data?",
    ),
    "a word as number of nodes": (
        {"NEXA_JOB": JOB, "NEXA_NUM_NODES": "two"},
        "environment: a number of NEXA_* or JOB_COMPLETION_INDEX cannot be read: inv",
    ),
    "an index beyond the gang": (
        {"NEXA_JOB": OF_TWO, "NEXA_NUM_NODES": "2", "NEXA_RDZV_ENDPOINT": "a:1", "JOB_COMPLETION_INDEX": "2"},
        "environment: JOB_COMPLETION_INDEX is 2, expected 0 to 1",
    ),
    "more nodes than the job has": (
        {"NEXA_JOB": OF_TWO, "NEXA_NUM_NODES": "3", "NEXA_RDZV_ENDPOINT": "a:1"},
        "environment: NEXA_NUM_NODES is 3, the job has cluster.num_nodes 2; change it in the job",
    ),
    "fewer nodes than the job has": (
        {"NEXA_JOB": OF_TWO},
        "environment: NEXA_NUM_NODES is 1, the job has cluster.num_nodes 2; change it in the job",
    ),
    "nowhere to meet": (
        {"NEXA_JOB": OF_TWO, "NEXA_NUM_NODES": "2"},
        "environment: NEXA_RDZV_ENDPOINT is not set, nor are both NEXA_GANG and NEXA_NODE_ADDRESS, and",
    ),
    "a meeting without a name": (
        {"NEXA_JOB": OF_TWO, "NEXA_NUM_NODES": "2", "NEXA_NODE_ADDRESS": "10.0.0.8"},
        "environment: NEXA_RDZV_ENDPOINT is not set, nor are both NEXA_GANG and NEXA_NODE_ADDRESS, and",
    ),
    "a name as address": (
        {"NEXA_JOB": OF_TWO, "NEXA_NUM_NODES": "2", "NEXA_GANG": "uid", "NEXA_NODE_ADDRESS": "pod-1"},
        "environment: NEXA_NODE_ADDRESS is 'pod-1', expected an IP address",
    ),
}


@pytest.mark.parametrize(("environment", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_environment_is_named_by_variable(environment: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_environment(environment)
    assert str(caught.value).startswith(expected)


def two_nodes() -> Job:
    return job(cluster={"num_nodes": 2})


def test_the_environment_says_which_node_of_which_attempt_this_is() -> None:
    environment = {
        "NEXA_JOB": OF_TWO,
        "NEXA_ATTEMPT": "3",
        "NEXA_NUM_NODES": "2",
        "JOB_COMPLETION_INDEX": "1",
        "NEXA_RDZV_ENDPOINT": "demo-0:29500",
        "NEXA_OUT_OF_MEMORY_ATTEMPT": "2",
    }
    assert read_environment(environment) == (two_nodes(), Node(1, 2, 1, "demo-0:29500", 3, 2))


def test_pods_without_names_are_told_their_gang_and_address() -> None:
    two = {"NEXA_JOB": OF_TWO, "NEXA_NUM_NODES": "2", "NEXA_GANG": "uid", "NEXA_NODE_ADDRESS": "FD00::8"}
    assert read_environment(two) == (two_nodes(), Node(0, 2, 1, Meeting("uid", "fd00::8")))


def test_a_pod_alone_needs_nothing_but_its_job() -> None:
    assert read_environment({"NEXA_JOB": JOB}) == (job(), Node())


@pytest.mark.parametrize(("text", "port"), [("", 8080), ("0", 0), ("9000", 9000)])
def test_progress_is_served_where_the_environment_says(text: str, port: int) -> None:
    assert read_port({"NEXA_PROGRESS_PORT": text}) == port


def test_progress_has_a_port_that_both_sides_know() -> None:
    assert read_port({}) == PROGRESS_PORT


@pytest.mark.parametrize("text", ["http", "-1", "65536", "8080.0"])
def test_what_is_no_port_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"NEXA_PROGRESS_PORT is .*, expected a port, or 0 for any free one"):
        read_port({"NEXA_PROGRESS_PORT": text})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return RunDir(tmp_path_factory.mktemp("run"))


@pytest.fixture
def rundir(folder: RunDir) -> RunDir:
    """Empty, as a new attempt finds it."""
    folder.write_run({})
    return folder


@pytest.fixture(scope="module")
def serving(folder: RunDir) -> Iterator[ThreadingHTTPServer]:
    started = serve(folder, job(), Node(attempt=2), port=0)
    yield started
    started.shutdown()
    started.server_close()


@pytest.fixture
def server(serving: ThreadingHTTPServer, rundir: RunDir) -> ThreadingHTTPServer:
    return serving


def get(server: ThreadingHTTPServer, path: str, *, host: str = "127.0.0.1") -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(f"http://{host}:{server.server_port}{path}", timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.headers["Content-Type"], refused.read().decode()


def metrics(server: ThreadingHTTPServer) -> dict[str, float]:
    families = text_string_to_metric_families(get(server, "/metrics")[2])
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_progress_is_answered_before_the_ranks_say_anything(server: ThreadingHTTPServer) -> None:
    status, kind, body = get(server, "/progress")
    assert (status, kind) == (200, "application/json")
    assert Progress.model_validate_json(body) == Progress(run_id=job().run_id, attempt=2, phase="starting")


def test_progress_is_what_the_ranks_said_last(server: ThreadingHTTPServer, rundir: RunDir) -> None:
    checkpoint = CheckpointRef(step=2, uri="s3://m/manifest.json", digest="ab")
    said = Progress(run_id="r", attempt=2, phase="training", step=3, total_steps=9, loss=1.5, checkpoint=checkpoint)
    rundir.write_progress(said)
    heard = Progress.model_validate_json(get(server, "/progress")[2])
    assert heard.seconds_since_last_step is not None
    assert heard.model_copy(update={"seconds_since_last_step": None}) == said


def test_metrics_parse_and_leave_out_what_is_not_known(server: ThreadingHTTPServer, rundir: RunDir) -> None:
    rundir.write_progress(Progress(run_id="r", step=3, total_steps=9, loss=1.5, tokens_per_second=70.0))
    assert metrics(server) == {
        "nexa_step": 3,
        "nexa_total_steps": 9,
        "nexa_loss": 1.5,
        "nexa_tokens_per_second": 70,
    }


def test_metrics_follow_the_ranks(server: ThreadingHTTPServer, rundir: RunDir) -> None:
    rundir.write_progress(Progress(run_id="r", step=3))
    before = metrics(server)["nexa_step"]
    rundir.write_progress(Progress(run_id="r", step=4))
    assert (before, metrics(server)["nexa_step"]) == (3, 4)


def test_it_is_healthy_while_it_lives(server: ThreadingHTTPServer) -> None:
    assert get(server, "/healthz") == (200, "text/plain", "ok")


def test_a_pod_is_asked_at_whichever_address_it_has(server: ThreadingHTTPServer) -> None:
    assert get(server, "/healthz", host="[::1]") == (200, "text/plain", "ok")


def test_a_kernel_without_ipv6_is_served_by_ipv4(
    folder: RunDir, rundir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr("nexa_train.entrypoint._DualStack.server_bind", fail)
    server = serve(folder, job(), Node(attempt=2), port=0)
    try:
        assert get(server, "/healthz") == (200, "text/plain", "ok")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("path", ["/", "/progress/", "/../etc/passwd", "/debug"])
def test_nothing_else_is_there(server: ThreadingHTTPServer, path: str) -> None:
    assert get(server, path)[0] == 404


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [({"NEXA_JOB": "[]"}, "NEXA_JOB holds list"), ({"NEXA_JOB": JOB, "NEXA_PROGRESS_PORT": "x"}, "NEXA_PROGRESS_PORT")],
    ids=["job", "port"],
)
def test_a_wrong_environment_ends_with_last_words_and_is_not_tried_again(
    environment: dict[str, str], complaint: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nexa_train.entrypoint"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    said = Termination.model_validate_json(done.stdout)
    assert (done.returncode, said.exit_code, said.cause, said.retryable) == (2, 2, "ConfigError", False)
    assert complaint in said.message


def test_what_nobody_foresaw_is_in_the_last_words_and_its_place_in_the_log(serving: ThreadingHTTPServer) -> None:
    body = {"metadata": {"name": "demo"}, "spec": {"data": {"remoteUri": "rows.jsonl"}}}
    own = {"NEXA_JOB": json.dumps(body), "NEXA_PROGRESS_PORT": str(serving.server_port)}
    done = subprocess.run(
        [sys.executable, "-m", "nexa_train.entrypoint"],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
    )
    said = Termination.model_validate_json(done.stdout)
    assert (done.returncode, said.exit_code, said.cause, said.retryable) == (1, 1, "OSError", True)
    assert "in serve" in done.stderr


def test_tensors_of_a_killed_one_are_dropped_by_the_next(tmp_path: Path) -> None:
    killed = tmp_path / "nexa-run-killed"
    (killed / "restore").mkdir(parents=True)
    (killed / "lock").touch()
    body = {"metadata": {"name": "demo"}, "spec": {"data": {"remoteUri": "rows.jsonl"}}}
    own = {"NEXA_JOB": json.dumps(body), "NEXA_PROGRESS_PORT": "0", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "nexa_train.entrypoint"]
    subprocess.run(command, env={**os.environ, **own}, cwd=tmp_path, capture_output=True, check=False)
    assert [path.relative_to(tmp_path) for path in tmp_path.glob("nexa-run-*/*")] == [Path("nexa-run-killed/lock")]


def test_a_stop_that_is_asked_for_while_it_imports_is_not_lost() -> None:
    body = {"metadata": {"name": "demo"}, "spec": {"data": {"remoteUri": "rows.jsonl"}}}
    own = {"NEXA_JOB": json.dumps(body), "NEXA_PROGRESS_PORT": "0"}
    started = subprocess.Popen(
        [sys.executable, "-m", "nexa_train.entrypoint"],
        env={**os.environ, **own},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: holds_back_sigterm(started.pid), timeout_seconds=20, what="its first lines", interval_seconds=0)
    started.send_signal(signal.SIGTERM)
    said = Termination.model_validate_json(started.communicate(timeout=30)[0])
    assert (started.returncode, said.exit_code, said.cause, said.retryable) == (75, 75, "Stopped", True)


DOWNLOADS = """
import concurrent.futures, runpy, signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
concurrent.futures.ThreadPoolExecutor(1).submit(time.sleep, 600)  # as the hub's library leaves them, once it is stopped
runpy.run_module("nexa_train.entrypoint", run_name="__main__")
"""


def test_threads_that_still_download_do_not_hold_up_the_end(tmp_path: Path) -> None:
    body = {"metadata": {"name": "demo"}, "spec": {"data": {"remoteUri": "rows.jsonl"}}}
    own = {"NEXA_JOB": json.dumps(body), "NEXA_PROGRESS_PORT": "0", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", DOWNLOADS]
    started = subprocess.Popen(command, env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    wait_until(lambda: holds_back_sigterm(started.pid), timeout_seconds=20, what="its first lines", interval_seconds=0)
    started.send_signal(signal.SIGTERM)
    try:
        said = Termination.model_validate_json(started.communicate(timeout=30)[0])
    finally:
        started.kill()
    assert (started.returncode, said.exit_code, said.cause) == (75, 75, "Stopped")
    assert list(tmp_path.iterdir()) == []


def holds_back_sigterm(pid: int) -> bool:
    blocked = re.search(r"^SigBlk:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return blocked is not None and bool(int(blocked[1], 16) >> signal.SIGTERM - 1 & 1)

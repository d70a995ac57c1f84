"""A job on a real Slurm: submitted by sbatch, trained by srun and torchrun on two nodes, stopped, requeued, refused."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster import host
from tests.cluster.minio import MinioServer, start_minio
from tests.cluster.paths import REPOSITORY
from tests.cluster.product import fill_buckets
from tests.cluster.run import run as run_command
from tests.cluster.run import wait_until
from tests.cluster.slurm import JobState, Slurm, start_slurm
from tests.readme import commands
from tests.training.harness import Run, Runs, write_rows

pytestmark = pytest.mark.e2e

TWO_NODES = {"training": {"max_steps": 120, "save_every_steps": 5}, "cluster": {"num_nodes": 2}}

Make = Callable[[Path], Run]


@dataclass
class Submitted:
    """A run that Slurm has."""

    slurm: Slurm
    run: Run
    number: str

    @property
    def log(self) -> str:
        return (self.run.job.parent / f"test-{self.number}.log").read_text(encoding="utf-8", errors="replace")

    @property
    def last_words(self) -> list[dict[str, Any]]:
        """What each node's entrypoint said at its end, in the order in which they ended."""
        return [json.loads(line) for line in self.log.splitlines() if line.startswith('{"run_id"')]

    def wait_for_checkpoints(self, count: int) -> None:
        committed = lambda: len(list(self.run.artifacts.glob("checkpoints/*/step-*/manifest.json")))  # noqa: E731
        wait_until(
            lambda: committed() >= count,
            timeout_seconds=180,
            what=f"{count} checkpoints committed",
            detail=lambda: self.log,
        )

    def wait_ended(self) -> JobState:
        state = self.slurm.wait_ended(self.number)
        self.slurm.wait_idle()
        return state


def submit(slurm: Slurm, run: Run) -> Submitted:
    """`nexa submit JOB --slurm`, as a user whose files every node sees."""
    command = [sys.executable, "-m", "nexa_train", "submit", run.job, "--slurm"]
    said = slurm.run(*command, env=run.environment, cwd=run.job.parent).stdout
    number = said.split(" as job ")[1].split(";")[0]
    assert said == f"submitted test to Slurm as job {number}; its log is test-{number}.log\n"
    return Submitted(slurm, run, number)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes runs of one description, each with rows and artifacts of its own."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda folder: Runs(cache, write_rows(folder / "rows.jsonl"), folder).make(**TWO_NODES)


@pytest.fixture(scope="module")
def undisturbed(make: Make, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights digest of two ranks on this machine, without Slurm."""
    outcome = make(tmp_path_factory.mktemp("local")).finish()
    assert outcome["exit_code"] == 0, outcome
    return str(outcome["checkpoint"]["weights_digest"])


@pytest.fixture(scope="module")
def completed(slurm: Slurm, make: Make, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """A run that Slurm took to its end."""
    submitted = submit(slurm, make(tmp_path_factory.mktemp("completed")))
    state = submitted.wait_ended()
    assert (state.name, state.exit_code) == ("COMPLETED", 0), submitted.log
    return submitted


def test_two_nodes_train_to_the_bits_of_two_ranks_on_this_machine(completed: Submitted, undisturbed: str) -> None:
    words = completed.last_words
    assert [(each["cause"], each["step"], each["attempt"]) for each in words] == [("Succeeded", 120, 0)] * 2
    assert {each["checkpoint"]["weights_digest"] for each in words} == {undisturbed}
    assert completed.run.manifests[-1].world["nodes"] == 2


def test_its_checkpoints_verify(completed: Submitted) -> None:
    verify = [sys.executable, "-m", "nexa_train", "verify", completed.run.artifacts, "-o", "json"]
    report = json.loads(run_command(verify).stdout)
    assert report["ok"]
    assert [one["step"] for one in report["manifests"]] == list(range(5, 121, 5))


def test_a_wrong_config_fails_the_job_with_2_and_says_why_in_its_log(slurm: Slurm, completed: Submitted) -> None:
    """Wrong in a way that only a node finds out: the name stands for other rows."""
    write_rows(completed.run.job.parent / "rows.jsonl", count=97)
    again = submit(slurm, completed.run)
    state = again.wait_ended()
    assert (state.name, state.exit_code, state.restarts) == ("FAILED", 2, 0), again.log
    assert {each["cause"] for each in again.last_words} == {"ConfigError"}
    assert all("dataset_digest" in each["message"] for each in again.last_words)


def test_scancel_term_commits_a_checkpoint_ends_with_75_and_a_new_job_goes_on(
    slurm: Slurm, make: Make, undisturbed: str, tmp_path: Path
) -> None:
    first = submit(slurm, make(tmp_path))
    first.wait_for_checkpoints(1)
    slurm.run("scancel", "--signal=TERM", first.number)
    state = first.wait_ended()
    assert (state.name, state.exit_code, state.restarts) == ("FAILED", 75, 0), first.log
    stopped = first.last_words[0]
    assert stopped["cause"] == "Stopped"
    assert first.run.manifests[-1].step == stopped["step"] < 120
    second = submit(slurm, first.run)
    assert second.wait_ended().name == "COMPLETED", second.log
    assert second.last_words[0]["checkpoint"]["weights_digest"] == undisturbed


def goes_on(requeued: Submitted) -> str:
    """The weights digest with which a job ends that was stopped, and is let go at once instead of in two minutes."""
    stopped_at = requeued.run.manifests[-1].step
    assert 0 < stopped_at < 120
    requeued.slurm.wait_idle()
    requeued.slurm.run("scontrol", "update", f"JobId={requeued.number}", "StartTime=now")
    state = requeued.wait_ended()
    assert (state.name, state.restarts) == ("COMPLETED", 1), requeued.log
    words = requeued.last_words
    assert [(each["cause"], each["attempt"]) for each in words] == [("Stopped", 0)] * 2 + [("Succeeded", 1)] * 2
    assert words[0]["step"] == stopped_at
    return str(words[-1]["checkpoint"]["weights_digest"])


def test_a_requeued_job_commits_a_checkpoint_and_goes_on_as_the_next_attempt(
    slurm: Slurm, make: Make, undisturbed: str, tmp_path: Path
) -> None:
    submitted = submit(slurm, make(tmp_path))
    submitted.wait_for_checkpoints(1)
    slurm.run("scontrol", "requeue", submitted.number)
    wait_until(lambda: slurm.job(submitted.number).name == "PENDING", timeout_seconds=60, what="requeued")
    assert goes_on(submitted) == undisturbed


def test_a_preempted_job_commits_a_checkpoint_in_its_grace_and_goes_on_when_it_is_let(
    slurm: Slurm, make: Make, undisturbed: str, tmp_path: Path
) -> None:
    submitted = submit(slurm, make(tmp_path))
    submitted.wait_for_checkpoints(1)
    slurm.run("sbatch", "--partition=urgent", "--nodes=2", f"--output={tmp_path}/urgent.log", "--wrap=hostname")
    waits = "waits for its turn, and does not fail"
    wait_until(lambda: slurm.job(submitted.number).name in ("PENDING", "FAILED"), timeout_seconds=90, what=waits)
    assert slurm.job(submitted.number).name == "PENDING", submitted.log
    assert goes_on(submitted) == undisturbed


@pytest.fixture
def minio(slurm: Slurm) -> Iterator[MinioServer]:
    """Where the nodes reach it, with what examples/job.yaml needs."""
    server = start_minio(address=slurm.network.host_ip)
    fill_buckets(server)
    yield server
    server.close()


def test_the_commands_of_the_readme_train_the_example_to_the_same_bits(
    slurm: Slurm, minio: MinioServer, tmp_path: Path
) -> None:
    submit_it, *afterwards = (shlex.split(command) for command in commands("On Slurm"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**minio.env(), "NEXA_CACHE": str(tmp_path / "cache"), "PATH": path}
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    number = slurm.run(*submit_it, env=environment, cwd=tmp_path).stdout.split(" as job ")[1].split(";")[0]
    log = tmp_path / f"two-ranks-{number}.log"
    assert slurm.wait_ended(number).name == "COMPLETED", log.read_text()
    said = [slurm.run(*command, env=environment, cwd=tmp_path).stdout for command in afterwards]
    assert "verified: 4 manifests" in said[-1]
    local = ["nexa", "run", "examples/job.yaml", "--set", f"artifacts.uri={tmp_path}/artifacts", "-o", "json"]
    outcome = json.loads(run_command(local, env=environment, cwd=tmp_path).stdout)
    assert outcome["checkpoint"]["weights_digest"] in log.read_text()


def processes_that_know(folder: Path) -> list[list[str]]:
    """Command lines that name a folder which is this test's alone."""
    running = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
    return [line for line in running if str(folder) in " ".join(line)]


def test_a_slurm_leaves_nothing_not_even_a_running_job() -> None:
    host.require_slurm()
    slurm = start_slurm()
    folder, daemons = slurm.ledger.folder, list(slurm.ledger.processes())
    script = f"srun sh -c 'sleep 600; echo {folder}'"
    slurm.run("sbatch", "--nodes=2", f"--output={folder}/%j.log", f"--wrap={script}")
    is_task = lambda line: line[0].endswith("/sh") and "sleep 600" in line[-1]  # noqa: E731
    wait_until(
        lambda: len([line for line in processes_that_know(folder) if is_task(line)]) == 2,
        timeout_seconds=30,
        what="the job runs on both nodes",
    )
    slurm.stop()
    assert not processes_that_know(folder)
    assert not [each for each in daemons if each.alive]
    assert not [name for name in os.listdir("/sys/class/net") if name.startswith(slurm.network.interface)]
    assert not folder.exists()

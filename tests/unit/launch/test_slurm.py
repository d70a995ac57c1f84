"""The batch script: valid bash, and a job comes out of it as it went in, whatever is in its names."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nexa_train.config import Job
from nexa_train.config.load import job_from_object, load_job, recipe_names
from nexa_train.config.protocol import ENV_JOB
from nexa_train.errors import RefusedError
from nexa_train.launch.slurm import render_script, submit_or_print
from tests.unit.config.builders import job

HOSTILE = """a'b"c $(touch pwned) `touch pwned` ${HOME} \\ \n#SBATCH --nodes=99\n; touch pwned & é"""


def executable(folder: Path, name: str, body: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def options(script: str) -> dict[str, str]:
    """What sbatch reads: the #SBATCH lines before the first command."""
    head = script.split("\nset -eu\n")[0].splitlines()
    found = [line.removeprefix("#SBATCH --").partition("=") for line in head if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in found}


def environment_of(script: str, folder: Path, **more: str) -> dict[str, str]:
    """Run the script for real, with an `srun` that only writes down what it was given."""
    executable(folder / "bin", "scontrol", "printf 'node-a\\nnode-b\\n'")
    executable(folder / "bin", "srun", 'env -0 > env; printf "%s\\0" "$@" > arguments')
    slurm = {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_ID": "4711", **more}
    slurm["PATH"] = f"{folder}/bin:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", script], cwd=folder, env=slurm, check=True)
    pairs = (line.partition("=") for line in (folder / "env").read_text().split("\0") if line)
    return {name: value for name, _, value in pairs}


def srun_arguments(folder: Path) -> list[str]:
    """What the script gave `srun`, after `environment_of`."""
    return (folder / "arguments").read_text().split("\0")[:-1]


@pytest.mark.parametrize("name", recipe_names())
def test_the_script_of_a_recipe_is_valid_bash(name: str) -> None:
    subprocess.run(["bash", "-n"], input=render_script(load_job(recipe=name)), text=True, check=True)


@settings(max_examples=15)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=60))
@example(HOSTILE)
@example("'")
def test_the_script_of_any_uri_is_valid_bash_and_asks_for_the_same(uri: str) -> None:
    script = render_script(job(data={"remote_uri": uri}))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert options(script) == options(render_script(job()))


def test_a_hostile_job_comes_out_as_it_went_in_and_runs_nothing(tmp_path: Path) -> None:
    given = job(data={"remote_uri": HOSTILE}, artifacts={"uri": HOSTILE}, cluster={"annotations": {"note": HOSTILE}})
    seen = environment_of(render_script(given), tmp_path)
    assert job_from_object(json.loads(seen[ENV_JOB])) == given
    assert not (tmp_path / "pwned").exists()


def test_each_node_learns_its_place_in_the_gang(tmp_path: Path) -> None:
    seen = environment_of(render_script(job(cluster={"num_nodes": 2})), tmp_path)
    assert (seen["NEXA_NUM_NODES"], seen["NEXA_ATTEMPT"], seen["NEXA_PROGRESS_PORT"]) == ("2", "0", "0")
    assert seen["NEXA_RDZV_ENDPOINT"] == "node-a:24789"
    start = srun_arguments(tmp_path)[-1]
    assert srun_arguments(tmp_path)[-3:-1] == ["bash", "-c"]
    assert start.startswith("export JOB_COMPLETION_INDEX=$SLURM_NODEID; exec ")
    assert start.endswith(" -m nexa_train.entrypoint")


@pytest.mark.parametrize(("number", "port"), [("1", 29_499), ("9999", 19_501), ("10000", 29_500), ("67043567", 25_933)])
def test_jobs_on_one_node_meet_on_ports_of_their_own(tmp_path: Path, number: str, port: int) -> None:
    seen = environment_of(render_script(job(cluster={"num_nodes": 2})), tmp_path, SLURM_JOB_ID=number)
    assert seen["NEXA_RDZV_ENDPOINT"] == f"node-a:{port}"


def test_a_requeued_job_is_the_next_attempt(tmp_path: Path) -> None:
    assert environment_of(render_script(job()), tmp_path, SLURM_RESTART_COUNT="3")["NEXA_ATTEMPT"] == "3"


def test_a_failing_node_is_not_drowned_by_the_others_and_a_step_has_the_cpus_of_its_job(tmp_path: Path) -> None:
    environment_of(render_script(job(cluster={"resources": {"cpu": "16"}})), tmp_path)
    assert srun_arguments(tmp_path)[:4] == ["--export=ALL", "--kill-on-bad-exit=0", "--wait=60", "--cpus-per-task=16"]


def test_torchrun_leaves_the_ranks_the_time_that_slurm_gives(tmp_path: Path) -> None:
    assert environment_of(render_script(job()), tmp_path)["PET_SHUTDOWN_TIMEOUT"] == "120"
    longer = job(recovery={"grace_period_seconds": 600})
    assert environment_of(render_script(longer), tmp_path)["PET_SHUTDOWN_TIMEOUT"] == "600"


ASKED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "one task a node": ({"cluster": {"num_nodes": 4}}, {"nodes": "4", "ntasks-per-node": "1"}),
    "GPUs": ({"cluster": {"gpus_per_node": 8}}, {"gpus-per-node": "8"}),
    "CPUs": ({"cluster": {"resources": {"cpu": "16"}}}, {"cpus-per-task": "16"}),
    "memory": ({"cluster": {"resources": {"memory": "4Gi"}}}, {"mem": "4096M"}),
    "time, rounded up": ({"schedule": {"active_deadline_seconds": 61}}, {"time": "2"}),
    "a partition": ({"schedule": {"queue_name": "gpu"}}, {"partition": "gpu"}),
    "time to commit a checkpoint": ({}, {"signal": "TERM@120"}),
    "as much as the job says": ({"recovery": {"grace_period_seconds": 600}}, {"signal": "TERM@600"}),
    "less where there is little": ({"schedule": {"active_deadline_seconds": 100}}, {"signal": "TERM@50", "time": "2"}),
    "another go when a node is lost, in the same log": ({}, {"requeue": "", "open-mode": "append"}),
}


@pytest.mark.parametrize(("groups", "expected"), ASKED.values(), ids=ASKED)
def test_slurm_is_asked_for_what_the_job_says(groups: dict[str, Any], expected: dict[str, str]) -> None:
    assert expected.items() <= options(render_script(job(**groups))).items()


def test_slurm_is_not_asked_for_what_the_job_does_not_say() -> None:
    always = {"job-name", "nodes", "ntasks-per-node", "signal", "output", "open-mode", "requeue"}
    assert set(options(render_script(job()))) == always


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on the PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path / "bin"


@pytest.mark.parametrize("answer", ["4711", "4711;cluster-a"])
def test_the_script_goes_to_sbatch_by_stdin_and_the_number_comes_back(slurm: Path, answer: str) -> None:
    executable(slurm, "sbatch", f'cat > "{slurm}/script"; echo "$@" > "{slurm}/arguments"; echo "{answer}"')
    said = submit_or_print(job())
    assert said == "submitted demo to Slurm as job 4711; its log is demo-4711.log"
    assert (slurm / "script").read_text() == render_script(job())
    assert (slurm / "arguments").read_text() == "--parsable\n"


def test_a_refusal_of_sbatch_is_said_in_its_own_words(slurm: Path) -> None:
    executable(slurm, "sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(RefusedError, match="sbatch refused demo: sbatch: error: invalid partition specified: gpu"):
        submit_or_print(job())


def test_without_sbatch_the_script_is_given_with_how_to_submit_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    first, _, script = submit_or_print(job()).partition("\n")
    assert "there is no sbatch on this machine" in first
    assert script == render_script(job())


def test_a_job_that_went_through_a_script_is_the_same_run() -> None:
    script = render_script(load_job(recipe="v3"))
    exported = next(line for line in script.splitlines() if line.startswith(f"export {ENV_JOB}="))
    text = subprocess.run(["bash", "-c", f'{exported}; printf %s "${ENV_JOB}"'], capture_output=True, check=True).stdout
    assert Job.model_validate(json.loads(text)).run_id == load_job(recipe="v3").run_id

"""Following the README on this machine, from a fresh copy of the project. Its cluster part is in test_job.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster import host
from tests.cluster.errors import Unavailable
from tests.cluster.paths import REPOSITORY
from tests.cluster.run import first_line
from tests.readme import commands

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone would hold: every file that is, or could be, committed; no environment."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    return folder


def run(command: str, folder: Path) -> str:
    """One command of the README, in the copy, with its environment on the PATH; returns all it printed."""
    environment = {**os.environ, "PATH": f"{folder / '.venv/bin'}:{os.environ['PATH']}"}
    environment.pop("VIRTUAL_ENV", None)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=840,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def demo(copy: Path) -> str:
    """What `make demo` printed in a fresh copy."""
    first, second = commands("Two commands")
    assert (first, second) == ("make demo", "make test")  # The second is what runs this.
    return run(first, copy)


def test_the_demo_lowers_the_validation_loss_and_ends_with_a_verified_checkpoint(demo: str, copy: Path) -> None:
    before, after = map(float, re.findall(r"validation loss +([\d.]+) before, ([\d.]+) after", demo)[0])
    assert after < before - 0.3
    assert re.search(r"verified: \d+ files", demo)
    plot = copy / re.findall(r"loss plot +(\S+)", demo)[0]
    assert plot.read_text(encoding="utf-8").startswith("<?xml")


def test_every_command_for_this_machine_works(demo: str, copy: Path) -> None:
    printed = {command: run(command, copy) for command in commands("On this machine")}
    assert "finished before" in printed["nexa run examples/local-sft.yaml"]
    assert "verified: 2 manifests" in printed["nexa verify artifacts"]


def test_the_cluster_demo_installs_trains_and_verifies(copy: Path) -> None:
    try:
        host.require_node()
    except Unavailable as reason:
        pytest.skip(first_line(reason))
    printed = run("make cluster-demo", copy)
    assert re.search(r"^two-ranks +Succeeded +2 +40/40", printed, flags=re.MULTILINE)
    assert re.search(r"^verified: 1 manifests", printed, flags=re.MULTILINE)

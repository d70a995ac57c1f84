"""Who is killed leaves nobody behind, at whatever moment: also while torch is imported, which takes seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nexa_train.launch.lifeline import PARENT
from tests.cluster.run import wait_until
from tests.training.harness import Run, Runs, write_rows

HANGS = """
import os, pathlib, sys, time
if {who}:
    pathlib.Path({folder!r}, f"imports-{{os.getpid()}}").touch()
    time.sleep(600)
sys.path.remove({folder!r})
del sys.modules["torch"]
import torch
"""
TORCHRUN, RANK = "'RANK' not in os.environ", "'RANK' in os.environ"


class Torch:
    """One whose import hangs in some processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "modules"
        (self.folder / "torch").mkdir(parents=True)

    def hang(self, run: Run, who: str) -> None:
        (self.folder / "torch" / "__init__.py").write_text(HANGS.format(who=who, folder=str(self.folder)))
        run.environment["PYTHONPATH"] = f"{self.folder}:{run.environment.get('PYTHONPATH', '')}"

    def importing(self, count: int) -> list[psutil.Process]:
        """The processes that import it, as soon as there are so many."""

        def found() -> list[Path]:
            paths = list(self.folder.glob("imports-*"))
            return paths if len(paths) == count else []

        paths = wait_until(found, timeout_seconds=120, what=f"{count} that import torch", interval_seconds=0.01)
        return [psutil.Process(int(path.name.rpartition("-")[2])) for path in paths]


@pytest.fixture
def torch(tmp_path: Path) -> Iterator[Torch]:
    made = Torch(tmp_path)
    yield made
    for path in made.folder.glob("imports-*"):
        if psutil.pid_exists(pid := int(path.name.rpartition("-")[2])):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "cache", write_rows(tmp_path / "rows.jsonl"), tmp_path)


def are_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=15)[1]


@pytest.mark.parametrize("nodes", [1, 2], ids=["the rank", "torchrun"])
def test_a_launcher_killed_while_what_it_started_imports_leaves_nobody(runs: Runs, torch: Torch, nodes: int) -> None:
    run = runs.make(cluster={"num_nodes": nodes})
    torch.hang(run, TORCHRUN)
    launcher = run.start()
    started = torch.importing(1)
    launcher.kill()
    launcher.communicate()
    assert are_gone(started)


def test_a_launcher_killed_while_ranks_of_torchrun_import_leaves_nobody(runs: Runs, torch: Torch) -> None:
    run = runs.make(cluster={"num_nodes": 2})
    torch.hang(run, RANK)
    launcher = run.start()
    ranks = torch.importing(2)
    started = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    launcher.communicate()
    assert are_gone([*started, *ranks])


@pytest.mark.parametrize("module", ["nexa_train.rank", "nexa_train.launch.torchrun"])
def test_who_is_started_by_one_that_is_gone_ends_at_once(module: str, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, str(tmp_path)]
    gone = {**os.environ, PARENT: str(os.getppid())}
    done = subprocess.run(command, env=gone, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert "nexa_train.launch.lifeline" in done.stderr
    assert "torch\n" not in done.stderr, "it was imported"

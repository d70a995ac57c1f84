"""How a rank's process ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nexa_train.rundir import RunDir
from tests.unit.launch.test_work import work

pytestmark = pytest.mark.training

ENDS = """
import atexit, tempfile
from nexa_train.rank import leave

class TakenApart:
    def __del__(self):
        print("the interpreter was taken apart")

kept = TakenApart()
atexit.register(print, "asked to be called")
folder = tempfile.TemporaryDirectory()
print(folder.name)
leave(75)
"""


def test_a_rank_leaves_with_its_code_all_said_and_removed_but_the_interpreter_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 75, done.stderr
    folder, *said = done.stdout.splitlines()
    assert folder.startswith(str(tmp_path))
    assert said == ["asked to be called"]
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_another_world_than_the_plan_s_do_not_begin(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    rundir.write_run(work(None).to_dict())
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "nexa_train.rank", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **place}, timeout=60, check=False)
    [said] = rundir.read_outcomes()
    assert (done.returncode, said.cause, said.retryable) == (2, "ConfigError", False)
    assert said.message.startswith("environment: WORLD_SIZE is 3, the job has 2 ranks (2 nodes x 1)")

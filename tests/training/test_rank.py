"""How a rank's process ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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

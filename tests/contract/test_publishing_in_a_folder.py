"""Publishing to a folder survives SIGKILL between any two changes to the file system, and a disk that is full."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import pytest

from nexa_train.artifact.publish import run_steps
from nexa_train.artifact.verify import verify
from nexa_train.store import open_store
from tests.contract.publishing.attempt import Moment, Nursery, Task

RUN_ID = "team-survives-0123456789"
STEPS = (10, 20)


def attempt(nursery: Nursery, folder: Path, name: str, fault: tuple[int, Moment] | None = None) -> list[dict[str, Any]]:
    """What an attempt says that saves two steps and keeps one, to its end."""
    task = Task(
        uri=str(folder / "artifacts"),
        run_id=RUN_ID,
        name=name,
        steps=STEPS,
        keep_last=1,
        scratch=str(folder / "scratch"),
        local_fault=fault,
    )
    running = nursery.start(task)
    running.go()
    return running.reports()


@pytest.fixture(scope="module")
def changes(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How often an attempt that nothing disturbs changes the file system."""
    last = attempt(nursery, tmp_path_factory.mktemp("undisturbed"), "a0")[-1]
    assert last["ended"] == ""
    assert isinstance(last["changes"], int)
    return last["changes"]


@pytest.mark.parametrize("moment", get_args(Moment))
def test_struck_at_every_change(nursery: Nursery, changes: int, tmp_path: Path, moment: Moment) -> None:
    def struck(number: int) -> str | None:
        folder = tmp_path / str(number)
        first = attempt(nursery, folder, "a1", (number, moment))
        seen = check(folder, first)
        second = attempt(nursery, folder, "a2")
        assert second[-1]["ended"] == "", (number, second)
        assert second[0]["resumed"] == seen, number
        assert check(folder, first + second) == STEPS[-1], number
        assert litter(folder / "artifacts") == [], number
        return first[-1].get("ended") if first else None

    with ThreadPoolExecutor(4) as pool:
        ends = list(pool.map(struck, range(1, changes + 1)))
    assert changes > 60
    # Parallel uploads make the same folders, so not every attempt makes as many changes.
    assert ends.count("") < changes / (2 if moment == "full disk" else 5)


def check(folder: Path, told: list[dict[str, Any]]) -> int:
    """The newest committed step, which is whole like every other that can be seen, and no older than what was told."""
    uri = str(folder / "artifacts")
    assert [report for report in told if report.get("ended") not in (None, "", "RefusedError")] == []
    steps = [step for step in run_steps(open_store(uri), RUN_ID) if step.committed]
    there = {one.step: one.digest for one in verify(uri).manifests} if steps else {}
    if steps:
        assert verify(uri).problems == ()
    for report in told:
        if "digest" in report:
            step = int(str(report["step"]))
            assert there.get(step) == report["digest"] or max(there, default=0) > step
    return max(there, default=0)


def litter(root: Path) -> list[str]:
    """Files that no checkpoint needs, half-written ones included."""
    store = open_store(root)
    needed = {f"checkpoints/{RUN_ID}/run.json"}
    for step in run_steps(store, RUN_ID):
        needed |= {step.key}
        needed |= {key for key in step.others if "/data/a2-" in key or step.committed}
    files = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    # A probe that is killed leaves its five bytes.
    return sorted(name for name in files if name not in needed and not name.startswith(".nexa/probe/"))

"""What a launcher makes of ranks that end, fail, hang or cannot be ended. A shell script stands in for them."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from nexa_train.config import Job
from nexa_train.config.protocol import OUT_OF_MEMORY, Progress, Termination
from nexa_train.launch import node, watchdog
from nexa_train.launch.memory import smallest_too_large
from nexa_train.launch.node import Node, run_node
from nexa_train.rundir import RunDir
from nexa_train.store import open_store
from tests.training.harness import SPEC, merged, write_rows
from tests.unit.config.builders import job

TWO_NODES = Node(count=2, endpoint="node-0:29500")
AUTO = {"training": {"microbatch_size_per_gpu": "auto"}}
TRAINS = Progress(run_id="r", phase="training", step=3)


class Ranks:
    """A job's, whose launcher starts a script in their place: its last argument is the run folder."""

    def __init__(self, folder: Path, program: Path) -> None:
        self.rundir, self.uri, self.program = RunDir(folder / "run"), str(folder / "artifacts"), program
        self.rows = write_rows(folder / "rows.jsonl")

    def job(self, **change: Any) -> Job:
        spec = merged(SPEC, change)
        data = {**spec["data"], "remote_uri": str(self.rows)}
        return job(**{**spec, "data": data, "artifacts": {"uri": self.uri}})

    def do(self, script: str, **said: Progress | Termination) -> None:
        """Have the script run in the run folder, where each document of `said` waits as NAME.json."""
        for name, document in said.items():
            self.program.with_name(f"{name}.json").write_text(document.model_dump_json())
        say = f"say() {{ cp {self.program.parent}/$1.json $2.new; mv $2.new $2; }}"
        await_ = "await() { while [ ! -e $1 ]; do sleep 0.05; done; }"
        self.program.write_text(f'#!/bin/bash\n{say}\n{await_}\ncd "${{@: -1}}"\n{script}\n')
        self.program.chmod(0o755)

    def run(self, job: Job, place: Node, *, on_look: Callable[[int], None]) -> Termination:
        """How it ended; `on_look` is told how often the launcher looked since the ranks said where they are."""
        looks = 0

        def look(_: Progress) -> None:
            nonlocal looks
            looks += 1
            on_look(looks)

        def hung(outcome: Termination) -> None:
            pytest.fail(outcome.message)

        return run_node(job, place, self.rundir, say=hung, on_progress=look)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    monkeypatch.setenv("NEXA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    # It would end this very process where a disk holds it up for longer than the ranks' deadline.
    monkeypatch.setattr(node, "guarded", lambda *_: nullcontext())
    return Ranks(tmp_path, tmp_path / "bin" / "python")


def failed(cause: str, *, retryable: bool = True) -> Termination:
    return Termination(run_id="r", exit_code=1, cause=cause, message="told by the rank", retryable=retryable)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that were asked to stop get next to no time."""
    monkeypatch.setattr(watchdog, "STOP_SECONDS", 0.01)


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_ran_out_of_memory_is_believed_though_torchrun_stopped_the_others(ranks: Ranks) -> None:
    ranks.do(
        "say out outcome-0.json; touch stop-ranks; say trains progress.json; await looked; exit 1",
        out=failed(OUT_OF_MEMORY),
        trains=TRAINS,
    )
    run = ranks.job(**AUTO)
    ended = ranks.run(run, TWO_NODES, on_look=lambda looks: looks > 5 and (ranks.rundir.path / "looked").touch())
    assert (ended.cause, ended.exit_code) == (OUT_OF_MEMORY, 1)
    tried = json.loads((ranks.rundir.path / "run.json").read_text())["plan"]["microbatch"]
    assert smallest_too_large(open_store(ranks.uri), run.run_id) == tried > 1


@pytest.mark.usefixtures("impatient")
def test_a_final_error_of_ranks_that_do_not_end_when_they_are_asked_is_not_taken_for_a_stop(ranks: Ranks) -> None:
    ranks.do(
        "say out outcome-0.json; say trains progress.json; exec sleep 600",
        out=failed("ForeignError", retryable=False),
        trains=TRAINS,
    )
    ended = ranks.run(ranks.job(), TWO_NODES, on_look=lambda _: ranks.rundir.ask_to_stop())
    assert (ended.cause, ended.retryable) == ("ForeignError", False)


@pytest.mark.usefixtures("impatient")
def test_ranks_that_say_nothing_and_do_not_end_when_they_are_asked_were_stopped(ranks: Ranks) -> None:
    ranks.do("say trains progress.json; exec sleep 600", trains=TRAINS)
    ended = ranks.run(ranks.job(), TWO_NODES, on_look=lambda _: ranks.rundir.ask_to_stop())
    assert (ended.cause, ended.exit_code, ended.step) == ("Stopped", 75, 3)


def test_ranks_that_cannot_be_killed_do_not_keep_the_launcher_from_its_last_words(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks.do("echo $$ >process; say trains progress.json; printf . >>beats; exec sleep 600", trains=TRAINS)
    killed: list[tuple[int, int]] = []
    # As one takes it that waits for a device.
    monkeypatch.setattr(os, "killpg", lambda *told: killed.append(told))
    monkeypatch.setattr(node, "KILL_SECONDS", 0.1)
    run = ranks.job(recovery={"progress_deadline_seconds": 1})
    try:
        ended = ranks.run(run, Node(), on_look=lambda _: None)
    finally:
        process = int((ranks.rundir.path / "process").read_text())
        os.kill(process, signal.SIGKILL)
    assert killed == [(process, signal.SIGKILL)]
    assert (ended.cause, ended.exit_code, ended.step) == ("Stalled", 70, 3)

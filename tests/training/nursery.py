"""Ranks within a tenth of a second: forked from a process that has imported torch already.

What runs is the rank's own `main` with the environment that torchrun gives it, ended like torchrun ends ranks: when
one fails, the others are killed. So a test can kill a run dozens of times without waiting for imports.

`python -m tests.training.nursery BACKEND MODULE...` reads lines `RUNDIR WORLD PORT` and answers each with the ranks'
process ids, and with their exit codes once all have ended.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nexa_train.config.load import load_job
from nexa_train.config.protocol import Termination
from nexa_train.launch.node import Node, make_ready
from nexa_train.rundir import RunDir
from tests.cluster.paths import REPOSITORY
from tests.cluster.run import wait_until
from tests.training.harness import Run


class Nursery:
    """Starts ranks and says how they ended."""

    def __init__(self, cache: Path, backend: str = "fsdp", *modules: str) -> None:
        fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MKL_CBWR": "AUTO", "PYTHONHASHSEED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.nursery", backend, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **fixed, "NEXA_CACHE": str(cache)},
            text=True,
            cwd=REPOSITORY,
        )

    def close(self) -> None:
        """End it, and the ranks with it."""
        self.process.kill()
        self.process.communicate()

    def start(self, rundir: Path, world: int) -> list[int]:
        """Process ids of the ranks, which run what `rundir` says."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{rundir} {world} {free_port()}\n")
        self.process.stdin.flush()
        return self._answer()

    def wait(self) -> list[int]:
        """Exit codes of the ranks that were started last, all ended; negative: killed by that signal."""
        return self._answer()

    def _answer(self) -> list[int]:
        assert self.process.stdout is not None
        answer: list[int] = json.loads(self.process.stdout.readline())
        return answer


class Attempts:
    """Attempts at one run, one after another, on however many ranks."""

    def __init__(self, nursery: Nursery, run: Run, folder: Path) -> None:
        self.nursery, self.run, self.folder, self.count = nursery, run, folder, 0
        self.rundir = RunDir(folder)
        self.ended: Termination | None = None

    def start(self, world: int) -> list[int]:
        """Make ready and start; the ranks' process ids, or none: the run had ended before."""
        job = load_job(self.run.job, sets=[f"cluster.num_nodes={world}"])
        ready = make_ready(job, Node(ranks=world, attempt=self.count))
        if isinstance(ready, Termination):
            self.ended = ready
            return []
        self.rundir = RunDir(self.folder / f"attempt-{self.count}")
        self.count += 1
        self.rundir.write_run(ready.to_dict())
        return self.nursery.start(self.rundir.path, world)

    def reads(self) -> dict[int, list[int]]:
        """The sequences of each step that counted, in the order of the ranks; a step that was lost is read again."""
        taken: dict[int, list[int]] = {}
        for attempt in range(self.count):
            ranks = sorted((self.folder / f"attempt-{attempt}").glob("reads-*"))
            shares = [dict(map(json.loads, file.read_text().splitlines())) for file in ranks]
            both = set.intersection(*map(set, shares))  # of a rank that was killed the last one may be missing
            taken |= {step: [s for share in shares for micro in share[step] for s in micro] for step in sorted(both)}
        return taken

    @property
    def step(self) -> int:
        """Where the attempt that was started last stands."""
        progress = self.rundir.read_progress()
        return progress.step if progress else 0

    @property
    def committed(self) -> int:
        """The step that the next attempt will go on from."""
        return max(
            (int(path.parent.name[5:]) for path in self.run.artifacts.glob("checkpoints/*/step-*/manifest.json")),
            default=0,
        )

    def wait(self) -> list[int]:
        """See `Nursery.wait`; forgets what was fetched and not yet published, as the launcher does."""
        codes = self.nursery.wait()
        self.rundir.drop_tensors()
        return codes

    def finish(self, world: int) -> dict[str, Any]:
        """Run to the end; what the rank said last."""
        pids = self.start(world)
        assert pids, self.ended
        codes = self.wait()
        assert codes == [0] * world, [outcome.message for outcome in self.rundir.read_outcomes()]
        progress = self.rundir.read_progress()
        assert progress is not None
        return progress.model_dump()


Make = Callable[..., Attempts]


def check_killed_once(make: Callable[[], Attempts], *, world: int, last_step: int) -> None:
    """Of two equal runs one loses a rank after its first checkpoint: both end with the same weights, bit by bit."""
    undisturbed, killed = make(), make()
    digest = undisturbed.finish(world)["checkpoint"]["weights_digest"]
    pids = killed.start(world)
    wait_until(lambda: killed.committed > 0, timeout_seconds=120, what="a checkpoint", interval_seconds=0.005)
    os.kill(pids[-1], signal.SIGKILL)
    assert -signal.SIGKILL in killed.wait()
    assert 0 < killed.committed < last_step
    assert killed.finish(world)["checkpoint"]["weights_digest"] == digest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _fork(rundir: str, rank: int, world: int, port: str) -> int:
    from nexa_train import rank as module
    from nexa_train.launch.lifeline import die_with_parent

    pid = os.fork()
    if pid:
        return pid
    die_with_parent()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    code = 1
    _record_reads(Path(rundir) / f"reads-{rank}")
    try:
        code = module.main(rundir)
    finally:
        sys.stderr.flush()
        os._exit(code)


def _record_reads(file: Path) -> None:
    """Have this rank note which sequences it takes for each step, as it takes them."""
    from nexa_train.backends.base import RankContext

    microbatches = RankContext.microbatches

    def noted(self: RankContext, step: int) -> list[list[int]]:
        taken = microbatches(self, step)
        with file.open("a") as notes:
            notes.write(json.dumps([step, taken]) + "\n")
        return taken

    RankContext.microbatches = noted  # type: ignore[method-assign]


def _gang(pids: list[int]) -> list[int]:
    """Exit codes; the first that is not 0 ends the others."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] not in (0, 75):
            for other in set(pids) - codes.keys():
                os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in pids]


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    # What a fork finds imported.
    for module in ("nexa_train.rank", f"nexa_train.backends.{sys.argv[1]}", *sys.argv[2:]):
        importlib.import_module(module)
    for line in sys.stdin:
        rundir, world, port = line.split()
        pids = [_fork(rundir, rank, int(world), port) for rank in range(int(world))]
        print(json.dumps(pids), file=answers, flush=True)
        print(json.dumps(_gang(pids)), file=answers, flush=True)


if __name__ == "__main__":
    _serve()

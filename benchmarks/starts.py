"""How long until the first step: a rank beside a transformers script, and a resumed run after little and much data."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.report import Part, Target
from benchmarks.sides import Bench
from nexa_train.config.protocol import Progress
from nexa_train.launch.node import Node, rank_command, rank_environment
from nexa_train.launch.work import RankWork
from nexa_train.rundir import RunDir

POLL_SECONDS, LIMIT_SECONDS = 0.002, 600.0


def startup_part(bench: Bench, model: Path) -> Part:
    """Process start to the end of the first step, of one row, on data prepared before."""
    rounds = 3 if bench.quick else 5
    work = bench.work("startup", model, rows_per_step=1, held_out=0)
    dataset = bench.folder / "tokenised"
    command = [sys.executable, "-m", "benchmarks.hf_script", str(model), str(dataset)]
    _save_tokenised(work, dataset)
    ours, theirs = [], []
    for number in range(rounds):
        ours.append(_until(work, bench.folder / f"startup-{number}", lambda progress: progress.step >= 1))
        theirs.append(_until_line(command, bench.environment()))
    mine, peer = statistics.median(ours), statistics.median(theirs)
    return Part(
        "Start-up: process start to the end of the first step, cached data, 18 M llama, one row",
        ("side", "seconds", "each"),
        [("nexa rank", mine, _list(ours)), ("transformers Trainer script", peer, _list(theirs))],
        [Target("start-up / Trainer script", mine / peer, 0.6, at_most=True)],
    )


def resume_part(bench: Bench) -> Part:
    """Launcher and rank, from nothing running to the first new step, after 10 and after many steps of data."""
    rounds, many = (3, 1_000) if bench.quick else (5, 10_000)
    runs = {steps: _Interrupted(bench, steps) for steps in (10, many)}
    seconds: dict[int, list[float]] = {steps: [] for steps in runs}
    for _ in range(rounds):
        for steps, run in runs.items():
            seconds[steps].append(run.resume())
    few, late = (statistics.median(found) for found in seconds.values())
    return Part(
        "Resume: start to the first new step, a llama of 66 k parameters",
        ("steps of data before", "seconds", "each"),
        [(steps, statistics.median(found), _list(found)) for steps, found in seconds.items()],
        [Target(f"resume after {many} steps / after 10", late / few, 1.1, at_most=True)],
    )


class _Interrupted:
    """A run that was killed right after it committed a checkpoint, to be resumed from there again and again."""

    def __init__(self, bench: Bench, steps: int) -> None:
        self.bench, self.steps, self.count = bench, steps, 0
        self.artifacts = bench.folder / "artifacts" / f"resume-{steps}"
        self.kept = bench.folder / f"kept-{steps}"
        _until(self._work(), self._folder(), lambda told: told.checkpoint is not None)
        shutil.copytree(self.artifacts, self.kept)

    def resume(self) -> float:
        """Seconds until one more step is done."""
        shutil.rmtree(self.artifacts)
        shutil.copytree(self.kept, self.artifacts)
        start = time.perf_counter()
        work = self._work()
        ready = time.perf_counter() - start
        return ready + _until(work, self._folder(), lambda told: told.step == self.steps + 1)

    def _work(self) -> RankWork:
        sizes = {"model": {"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 512}}
        training = {"max_steps": 100_000, "save_every_steps": self.steps, "seed": 7, "global_batch_size": 1}
        return self.bench.work(f"resume-{self.steps}", None, held_out=0, training=training, **sizes)

    def _folder(self) -> Path:
        self.count += 1
        return self.bench.folder / f"resume-{self.steps}-{self.count}"


def _until(work: RankWork, folder: Path, reached: Callable[[Progress], bool]) -> float:
    """Start a rank as the launcher does, and kill it where it is; seconds until then."""
    rundir = RunDir(folder)
    rundir.write_run(work.to_dict())
    command = rank_command(rundir.path, Node(), run_id=work.job.run_id, store_uri=work.store_uri)
    with _running(command, rank_environment(work, Node()), folder / "log") as process:
        start = time.perf_counter()
        while process.poll() is None and time.perf_counter() - start < LIMIT_SECONDS:
            told = rundir.read_progress()
            if told is not None and reached(told):
                return time.perf_counter() - start
            time.sleep(POLL_SECONDS)
    raise SystemExit(f"{' '.join(command)} did not get there: {(folder / 'log').read_text()[-2000:]}")


def _until_line(command: list[str], environment: dict[str, str]) -> float:
    """Seconds until a process writes its first line; it is killed then."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line, seconds = process.stdout.readline(), time.perf_counter() - start
        process.kill()
        if not line:
            raise SystemExit(f"{' '.join(command)} ended: {process.stderr.read()[-2000:]}")
    return seconds


@contextmanager
def _running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _save_tokenised(work: RankWork, folder: Path) -> None:
    from datasets import Dataset

    from benchmarks.batches import in_order
    from nexa_train.rank import make_context

    Dataset.from_dict(in_order(make_context(work, 0, 1))).save_to_disk(folder)


def _list(seconds: list[float]) -> str:
    return ", ".join(f"{each:.2f}" for each in seconds)

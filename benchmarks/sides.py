"""The sides of a comparison as processes, and the job that all of them train on."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from nexa_train.config.job import Job
from nexa_train.launch.node import Node, make_ready, rank_environment
from nexa_train.launch.work import RankWork

HELD_OUT, RATE = 64, 1e-3
ROWS_PER_STEP, LENGTH, PACKED_PER_STEP = 8, 1024, 2
"""TRL's own defaults; two full sequences hold about as many tokens as eight rows of GSM8K, 2,048 and 1,740."""


@dataclass
class Side:
    """One contender: what it is told, and what was seen of it."""

    name: str
    settings: dict[str, Any]
    tokens: int
    """Real tokens a turn."""
    environment: dict[str, str]
    rounds: int | None = None
    """Counted turns at most: slow sides take fewer."""
    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    peak: int = 0
    validation_loss: float | None = None
    process: subprocess.Popen[str] | None = None

    def start(self, folder: Path) -> None:
        """Load model and data; returns when it could begin to train."""
        path = folder / f"{re.sub('[^a-z0-9]+', '-', self.name)}.json"
        path.write_text(json.dumps(self.settings))
        self.log, pipe = path.with_suffix(".log"), subprocess.PIPE
        command = [sys.executable, "-m", "benchmarks.contender", str(path)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=self.environment
            )
        self._answer()

    def turn(self, *, counted: bool) -> None:
        """Train for one turn."""
        self._say({"tokens": self.tokens})
        answer = self._answer()
        self.steps += answer["steps"]
        if counted:
            tokens = sum(step["tokens"] for step in answer["steps"])
            self.rates.append(tokens / answer["seconds"])
            self.cpu.append(tokens / answer["cpu_seconds"])

    def finish(self) -> None:
        """Stop training; learn what it took and what it brought."""
        self._say({})
        answer = self._answer()
        self.peak, self.validation_loss = answer["peak_bytes"], answer["validation_loss"]
        assert self.process is not None
        self.process.wait(60)

    def kill(self) -> None:
        """End the process, whatever it does."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def rate(self) -> float:
        """Real tokens per second, the median of its turns."""
        return statistics.median(self.rates)

    @property
    def cpu_rate(self) -> float:
        """Real tokens per second of processor time: what a busy machine leaves comparable."""
        return statistics.median(self.cpu)

    @property
    def target_share(self) -> float:
        """Target tokens among the real ones."""
        return sum(step["targets"] for step in self.steps) / sum(step["tokens"] for step in self.steps)

    def _say(self, command: dict[str, Any]) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended: {self.log.read_text()[-3000:]}")
        return dict(json.loads(line))


@dataclass(frozen=True)
class Bench:
    """What all parts share.

    Attributes:
        folder: for all that is written.
    """

    data: Path
    folder: Path
    quick: bool
    threads: int

    def work(
        self,
        name: str,
        model: Path | None,
        /,
        *,
        packed: bool = False,
        rows_per_step: int = ROWS_PER_STEP,
        held_out: int = HELD_OUT,
        **change: dict[str, Any],
    ) -> RankWork:
        """A job over the data, made ready by the launcher as `nexa run` would.

        Args:
            change: keys of a group of the job, over those of the benchmark.
        """
        spec: dict[str, dict[str, Any]] = {
            "model": {"name": str(model), "max_seq_len": LENGTH} if model else {},
            "data": {"remote_uri": str(self.data), "format": "question_answer", "packing": packed},
            "training": {"max_steps": 100_000, "save_every_steps": 100_000, "seed": 7},
            "optimizer": {"lr": RATE, "scheduler": "constant"},
            "cluster": {"threads_per_rank": self.threads},
            "artifacts": {"uri": str(self.folder / "artifacts" / name)},
        }
        spec["training"]["global_batch_size"] = PACKED_PER_STEP if packed else rows_per_step
        if held_out:
            spec["data"]["validation"] = {"rows": held_out}
        for group, keys in change.items():
            spec[group] = spec.get(group, {}) | keys
        ready = make_ready(Job.model_validate({"metadata": {"name": name}, "spec": spec}), Node())
        assert isinstance(ready, RankWork)
        return ready

    def environment(self, work: RankWork | None = None) -> dict[str, str]:
        """Of a process; with ours, as its launcher sets it."""
        own = rank_environment(work, Node()) if work else {}
        return own | machine.environment(self.threads)

    def nexa(self, name: str, work: RankWork, tokens: int) -> Side:
        """Ours."""
        return Side(name, {"engine": "nexa", "work": work.to_dict()}, tokens, self.environment(work))

    def plain(self, name: str, work: RankWork, tokens: int, *, bf16: bool) -> Side:
        """The plain loop, on the same rows in the same order."""
        return Side(name, {"engine": "plain", "bf16": bf16} | self._peer(work), tokens, self.environment())

    def trl(self, name: str, work: RankWork, tokens: int, config: dict[str, Any], **more: Any) -> Side:
        """TRL with these keys of SFTConfig; the same rows in the same order unless it packs or sorts them itself."""
        config = {"train_sampling_strategy": "sequential", **config}
        return Side(name, {"engine": "trl", "config": config, **more} | self._peer(work), tokens, self.environment())

    def by_turns(self, sides: list[Side], rounds: int, *, measure: Callable[[], object] = lambda: None) -> None:
        """Train all sides in turns, A B C A B C; the first round warms up and does not count.

        Args:
            measure: called at the end of each round that counts, for what is to be compared with the sides.
        """
        with ExitStack() as running:
            for side in sides:
                running.callback(side.kill)
                side.start(self.folder)
            for number in range(rounds + 1):
                for side in sides:
                    if side.rounds is None or number <= side.rounds:
                        side.turn(counted=number > 0)
                if number > 0:
                    measure()
            for side in sides:
                side.finish()

    def _peer(self, work: RankWork) -> dict[str, Any]:
        return {"model": str(work.located.folder), "work": work.to_dict(), "lr": RATE}

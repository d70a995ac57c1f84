"""What saving costs training, beside the blocking save of transformers' Trainer: one model, one run, by turns.

    python -m benchmarks.checkpoint --data ROWS            some minutes on two cores
    python -m benchmarks.checkpoint --data ROWS --pairs 1  a first look

A run of the product, full fine-tuning of the benchmark's 18 M llama into a folder, saves at every fortieth step: the
twenty steps after a save are compared with the twenty after those. Right before each save Trainer saves the same model
and optimiser, and deletes it; that time counts for neither.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from benchmarks import machine
from benchmarks.report import Part, Target
from benchmarks.sides import Bench
from benchmarks.trainer import make_llama

if TYPE_CHECKING:
    from nexa_train.backends.base import StepMetrics
    from nexa_train.launch.work import RankWork
    from nexa_train.pipeline import TrainingPipeline

EVERY = 20
"""Steps between saves, for the promise on added time."""


class Watch:
    """Sits between a backend and the pipeline: times segments of `EVERY` steps, and has Trainer save in between."""

    def __init__(self, pipeline: TrainingPipeline, folder: Path) -> None:
        self.pipeline, self.folder = pipeline, folder
        self.segments: list[tuple[float, float]] = []
        self.trainers: list[float] = []
        self.stalls: list[float] = []
        self.since = (0.0, 0.0)
        train = pipeline.backend.train

        def watched(after_step: Callable[[StepMetrics], bool]) -> None:
            self.trainer = _trainer(pipeline, folder)
            train(lambda metrics: self._after_step(metrics, after_step))

        pipeline.backend.train = watched  # type: ignore[method-assign]

    def _after_step(self, metrics: StepMetrics, after_step: Callable[[StepMetrics], bool]) -> bool:
        if metrics.step % EVERY:
            return after_step(metrics)
        now = _clocks()
        if metrics.step > 2 * EVERY:
            self.segments.append((now[0] - self.since[0], now[1] - self.since[1]))
        saves = metrics.step % (2 * EVERY) == 0
        if saves:
            self._trainer_saves()
        self.since = _clocks()
        stop = after_step(metrics)
        if saves:
            self.stalls.append(_clocks()[0] - self.since[0])
        return stop

    def _trainer_saves(self) -> None:
        began = time.perf_counter()
        self.trainer._save_checkpoint(self.trainer.model, trial=None)
        self.trainers.append(time.perf_counter() - began)
        for folder in self.folder.glob("checkpoint-*"):
            rmtree(folder)


def _trainer(pipeline: TrainingPipeline, folder: Path) -> Any:
    """Trainer around the weights and the optimiser that the backend trains, in transformers' llama."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

    backend: Any = pipeline.backend
    model = AutoModelForCausalLM.from_config(LlamaConfig(**backend.causal.config.to_dict()))
    model.load_state_dict(backend.causal.state_dict(), assign=True)
    model.tie_weights()
    schedule = torch.optim.lr_scheduler.LambdaLR(backend.optimizer, lambda step: 1.0)
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    return Trainer(model, arguments, optimizers=(backend.optimizer, schedule))


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def run(work: RankWork, folder: Path) -> Watch:
    """One attempt at the run, its one rank in this process."""
    from nexa_train.pipeline import RunFacts, TrainingPipeline
    from nexa_train.rank import configure, make_context
    from nexa_train.rundir import RunDir
    from nexa_train.store import open_store

    configure(work, 0)
    facts = RunFacts(work.job, work.attempt, work.dataset, work.code, work.world_facts())
    rundir = RunDir(folder / "rundir")
    rundir.path.mkdir()
    pipeline = TrainingPipeline(make_context(work, 0, 1), facts, open_store(work.store_uri), rundir, local_rank=0)
    watch = Watch(pipeline, folder / "trainer")
    pipeline.run()
    return watch


def checkpoint_part(watch: Watch) -> Part:
    """The two promises, and what they are made of."""
    # The first save of each pays for its memory, our last waits until it is committed; one pair has no other.
    stalls = watch.stalls[1:-1] or watch.stalls[:1]
    ours, theirs = statistics.median(stalls), statistics.median(watch.trainers[1:])
    after, plain = watch.segments[::2], watch.segments[1::2]
    added = [with_save[0] / without[0] - 1 for with_save, without in zip(after, plain, strict=False)]
    cpu = [with_save[1] / without[1] - 1 for with_save, without in zip(after, plain, strict=False)]
    rows = [
        ("ours, training stands still", ours, min(stalls)),
        ("Trainer, training stands still", theirs, min(watch.trainers[1:])),
        (f"{EVERY} steps after a save", *_middle([seconds for seconds, _ in after])),
        (f"{EVERY} steps without", *_middle([seconds for seconds, _ in plain])),
    ]
    targets = [
        Target("stall of a save / Trainer's blocking save", ours / theirs, 0.10, at_most=True),
        Target(f"time added by a save every {EVERY} steps", statistics.median(added), 0.05, at_most=True),
        Target(f"processor time added by a save every {EVERY} steps", statistics.median(cpu), 0.05, at_most=True),
    ]
    return Part(
        "Saving, llama of 18 M, weights and two moments in fp32", ("what", "median s", "least s"), rows, targets
    )


def _middle(values: list[float]) -> tuple[float, float]:
    return statistics.median(values), min(values)


def main() -> int:
    """Run it; print a table, and write JSON where asked."""
    options = _options()
    if options.data is None or not options.data.is_file():
        print("benchmarks.checkpoint: skipped: no rows given by --data or NEXA_BENCH_DATA", file=sys.stderr)
        return 0
    os.environ.update(machine.environment(options.threads))
    with tempfile.TemporaryDirectory(prefix="nexa-bench-") as name:
        folder = Path(name)
        bench = Bench(options.data.resolve(), folder, False, options.threads)
        steps = 2 * EVERY * (options.pairs + 1)
        training = {"max_steps": steps, "save_every_steps": 2 * EVERY, "seed": 7}
        model = make_llama(folder / "llama-18m")
        work = bench.work("save", model, rows_per_step=options.rows, held_out=0, training=training)
        os.environ.update(bench.environment(work))
        part = checkpoint_part(run(work, folder))
    print(part.text())
    if options.json:
        options.json.write_text(json.dumps(part.document(), indent=1) + "\n")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = os.environ.get("NEXA_BENCH_DATA")
    parser.add_argument("--data", type=Path, default=Path(given) if given else None, help="rows (NEXA_BENCH_DATA)")
    parser.add_argument("--pairs", type=int, default=5, help="of twenty steps after a save and twenty without (5)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step (8)")
    parser.add_argument("--threads", type=int, default=2, help="of training (2)")
    parser.add_argument("--json", type=Path, help="write everything there as well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

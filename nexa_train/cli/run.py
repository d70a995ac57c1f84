"""`nexa run`: the launcher of this machine with a face. What it does is in `launch/node.py`."""

from __future__ import annotations

import secrets
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar

from nexa_train.artifact.verify import Report, verify
from nexa_train.cache import cache_folder
from nexa_train.config import Job
from nexa_train.config.protocol import CheckpointRef, Progress, Termination
from nexa_train.config.support import without_meaning
from nexa_train.errors import NexaError
from nexa_train.launch.node import Node, adopt_environment, failed_outcome, run_node
from nexa_train.report.plot import plot_run
from nexa_train.rundir import RunDir

TAIL_LINES = 20
"""Of the ranks' log, shown where they ended without saying why."""
_LOG = "ranks.log"


def run_job(job: Job, *, as_json: bool) -> int:
    """Train on this machine, all ranks on it; prints how it went.

    Raises:
        NexaError: what was wrong before a rank ran.
    """
    # Progress is for eyes: it goes to stderr, so that -o json leaves one clean document on stdout.
    console = Console(stderr=True)
    if ignored := without_meaning(job.spec, "here"):
        print(f"nexa: not applied on this machine: {', '.join(ignored)}", file=sys.stderr)
    adopt_environment(job)
    rundir = None
    node = Node(ranks=job.spec.cluster.world_size)
    try:
        rundir = RunDir(cache_folder("runs", job.run_id, secrets.token_hex(4)))
        outcome = _trained(job, node, rundir, console, as_json=as_json)
    except Exception as exc:
        if not as_json:
            raise
        outcome = _unforeseen(job, exc) if not isinstance(exc, NexaError) else failed_outcome(job, node, exc)
    if as_json:
        print(outcome.model_dump_json())
    if outcome.exit_code or rundir is None:
        return _failed(console, outcome, rundir)
    shutil.rmtree(rundir.path)
    return _succeeded(job, outcome, as_json=as_json)


def _trained(job: Job, node: Node, rundir: RunDir, console: Console, *, as_json: bool) -> Termination:
    say = partial(_say_stalled, console, as_json=as_json)
    log = (rundir.path / _LOG).open("wb")
    with _obeying_signals(rundir), rundir.held("*"), log as output, _showing(console, job) as show:
        return run_node(job, node, rundir, say=say, output=output, on_progress=show)


def _unforeseen(job: Job, exc: Exception) -> Termination:
    """What only a trace says the place of."""
    traceback.print_exception(exc)
    return Termination(run_id=job.run_id, exit_code=1, cause=type(exc).__name__, message=str(exc))


def _say_stalled(console: Console, outcome: Termination, *, as_json: bool) -> None:
    """The last words of a run that is ended where it stands."""
    if as_json:
        print(outcome.model_dump_json(), flush=True)
    print(f"nexa: error: {outcome.message}", file=sys.stderr, flush=True)
    console.show_cursor()


def _failed(console: Console, outcome: Termination, rundir: RunDir | None) -> int:
    print(f"nexa: error: {outcome.message}", file=sys.stderr)
    log = rundir.path / _LOG if rundir else None
    if log and log.is_file() and outcome.cause not in ("Stopped", "NonFiniteLossError"):
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        console.print("\n".join([f"the last lines of {log}:", *tail]), markup=False, highlight=False)
    return outcome.exit_code


def _succeeded(job: Job, outcome: Termination, *, as_json: bool) -> int:
    checkpoint = outcome.checkpoint
    if checkpoint is None:
        raise NexaError(f"{job.run_id} ended without a checkpoint, which should not be possible; please report it")
    report = verify(checkpoint.uri)
    plot, initial = _plot(job)
    if not as_json:
        _report(job, outcome, checkpoint, report, plot, initial)
    return 0 if report.ok else 1


def _plot(job: Job) -> tuple[Path | None, float | None]:
    """See `plot_run`; what has been trained is no worse for a plot that could not be drawn."""
    try:
        return plot_run(job)
    except OSError as exc:
        print(f"nexa: warning: the loss plot is left out: {exc}", file=sys.stderr)
        return None, None


def _report(
    job: Job, outcome: Termination, checkpoint: CheckpointRef, report: Report, plot: Path | None, initial: float | None
) -> None:
    """Plain lines on stdout: paths stay whole, to be copied."""
    if outcome.message:
        print(f"{job.run_id}: {outcome.message}")
    if initial is not None and outcome.validation_loss is not None:
        print(f"validation loss   {initial:.4f} before, {outcome.validation_loss:.4f} after")
    print(f"checkpoint        {checkpoint.uri}")
    print(f"                  sha256:{checkpoint.digest}, weights sha256:{checkpoint.weights_digest}")
    verdict = "verified" if report.ok else "DAMAGED"
    print(f"                  {verdict}: {report.num_files} files, {report.num_bytes} bytes")
    if plot is not None:
        print(f"loss plot         {plot}")


@contextmanager
def _obeying_signals(rundir: RunDir) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks for a checkpoint, the second ends at once."""

    def ask(number: int, _frame: FrameType | None) -> None:
        if rundir.launcher_stop_asked():  # not its ranks, which may hear of the first signal sooner
            raise KeyboardInterrupt
        rundir.ask_to_stop()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _showing(console: Console, job: Job) -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal; a line whenever a phase or a tenth of the steps is done anywhere else."""
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    # Drawn when there is something new: a thread that draws all the time looks busy to the guard. stdout is the JSON's.
    with Bar(*columns, console=console, auto_refresh=False, redirect_stdout=False) as bar:
        task = bar.add_task("reading data and model", total=None, facts="")

        def show(progress: Progress) -> None:
            done, total = progress.step, progress.total_steps
            bar.update(
                task, total=total, completed=done, description=progress.phase, facts=_facts(progress), refresh=True
            )

        yield show


class _Lines:
    """Prints to stderr, seldom."""

    def __init__(self) -> None:
        self.said: tuple[str, int] | None = None

    def __call__(self, progress: Progress) -> None:
        tenth = 10 * progress.step // (progress.total_steps or 1)
        if self.said == (progress.phase, tenth):
            return
        self.said = (progress.phase, tenth)
        total = progress.total_steps or "?"
        print(f"{progress.phase} {progress.step}/{total} {_facts(progress)}".rstrip(), file=sys.stderr, flush=True)


def _facts(progress: Progress) -> str:
    parts = []
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.4f}")
    if progress.tokens_per_second is not None:
        parts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    if progress.eta_seconds is not None and progress.phase == "training":
        minutes, seconds = divmod(round(progress.eta_seconds), 60)
        parts.append(f"ETA {minutes}:{seconds:02d}")
    return "  ".join(parts)

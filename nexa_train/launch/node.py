"""Runs this node's part of a job: make ready, start the ranks, watch them, say how it ended.

`nexa run` and the entrypoint of a pod are the same thing with another face: both call `run_node`. All that
can be found wrong is found in `make_ready`, before a rank starts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any

from nexa_train.artifact.manifest import step_folder
from nexa_train.artifact.publish import Committed, claim_run, claimed, committed_folders, manifest_uri, newest_valid
from nexa_train.backend_config import axolotl, backend_config
from nexa_train.config.job import Job
from nexa_train.config.protocol import EXIT_STALLED, NOT_MET, OUT_OF_MEMORY, CheckpointRef, Progress, Termination
from nexa_train.config.support import check_supported
from nexa_train.data.prepare import LAYOUT_VERSION, Prepared, prepare
from nexa_train.data.tokenizer import ChatTokenizer, load_tokenizer
from nexa_train.errors import ConfigError, NexaError, StoppedError
from nexa_train.launch import watchdog
from nexa_train.launch.guard import guarded
from nexa_train.launch.installed import check_installed
from nexa_train.launch.lifeline import PARENT
from nexa_train.launch.meeting import Meeting
from nexa_train.launch.memory import (
    out_of_memory_kills,
    remember_attempt_too_large,
    remember_too_large,
    smallest_too_large,
)
from nexa_train.launch.watchdog import Clock, Watchdog
from nexa_train.launch.work import RankWork, dataset_facts
from nexa_train.models.locate import Located, architecture, check_model, locate
from nexa_train.plan import TrainPlan, make_plan, parse_quantity
from nexa_train.provenance import code_facts, has_bf16_units, processor
from nexa_train.registry import Architecture
from nexa_train.rundir import RunDir
from nexa_train.store import Store, open_store

POLL_SECONDS = 0.2
SIGNAL_AGAIN_SECONDS = 0.5
KILL_SECONDS = 10.0
"""How long killed ranks are waited for: one that waits for a device or a file server goes only when that answers."""
_TORCHRUN_S_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Others set them too, and mean nodes: a rank without torchrun would wait for a world that never comes."""
_BASE_MODEL = "base_model"
"""Where the identity of a run has what it trains from."""


@dataclass(frozen=True)
class Node:
    """This node's place in the gang."""

    index: int = 0
    count: int = 1
    ranks: int = 1
    endpoint: str | Meeting | None = None
    """host:port of node 0, or how it is found; None: there is no other node."""
    attempt: int = 0
    out_of_memory_attempt: int | None = None
    """An earlier one that was killed for memory as a whole, before it could note with how many sequences."""


def adopt_environment(job: Job) -> None:
    """Give this process, and the ranks after it, what the job gives its containers; a pod has it from its start."""
    os.environ.update({variable.name: variable.value for variable in job.spec.cluster.env})


def make_ready(job: Job, node: Node) -> RankWork | Termination:
    """Check everything, prepare the data, claim the run's name.

    Returns:
        The ranks' work; or how the run ended, if it had already.

    Raises:
        NexaError: anything that would make the run fail, before it starts.
    """
    check_supported(job.spec)
    check_installed(job.spec.backend)
    check_devices(job, node)
    store = open_store(job.spec.artifacts.uri)
    _check_text(store.uri, "artifacts.uri")
    store.probe()
    located = locate(job.spec.model, begun_with=lambda: str(claimed(store, job.run_id).get(_BASE_MODEL, "")))
    tokenizer = load_tokenizer(located.folder)
    check_model(located, job.spec, tokenizer)
    prepared = prepare(job.spec, tokenizer)
    for note in prepared.notes:
        print(f"nexa: {note}", file=sys.stderr, flush=True)
    sizes = architecture(job.spec.model, located)
    plan = first_plan(job, node, sizes, num_sequences=prepared.num_sequences)
    backend_config(job.spec, plan)  # refuses what the backend's library has no words for
    found_out = {"microbatch": plan.microbatch, "threads": plan.threads}
    frozen = claim_run(store, job.run_id, _identity(job, prepared, located, tokenizer), frozen=found_out)

    def fitting_plan() -> TrainPlan:
        return make_plan(
            job.spec,
            num_sequences=prepared.num_sequences,
            architecture=sizes,
            threads=frozen.get("threads", plan.threads),
            microbatch=frozen["microbatch"],
            too_large=smallest_too_large(store, job.run_id),
            precision=plan.precision,
        )

    work = RankWork(
        job,
        fitting_plan(),
        located,
        prepared.folder,
        dataset_facts(job, prepared, located),
        code_facts(),
        store.uri,
        node.attempt,
    )
    if node.out_of_memory_attempt is not None and work.adapts_microbatch:
        remember_attempt_too_large(store, work, node.out_of_memory_attempt)
        work = replace(work, plan=fitting_plan())
    return _finished(work, store) or work


def _check_text(uri: str, key: str) -> None:
    """Refuse a place that JSON cannot name, as what is said of a checkpoint would have to.

    Raises:
        ConfigError: a folder's name is not UTF-8.
    """
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{key}: {uri!r} is not UTF-8, so JSON cannot name what is there; take another folder"
        ) from None


def first_plan(job: Job, node: Node, sizes: Architecture | None, *, num_sequences: int | None = None) -> TrainPlan:
    """The plan with which a run begins on this machine; later attempts keep its microbatch.

    Args:
        sizes: of the model, where known. num_sequences: see `make_plan`.
    """
    return make_plan(
        job.spec,
        num_sequences=num_sequences,
        architecture=sizes,
        threads=threads_of_a_rank(job, node),
        precision=usable_precision(job),
    )


def run_node(
    job: Job,
    node: Node,
    rundir: RunDir,
    *,
    say: Callable[[Termination], object],
    output: IO[bytes] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Termination:
    """Take this node's ranks to their end.

    Args:
        say: says the last words of a process that hangs before its ranks run: it is ended where it stands, with 70, and
            nothing is returned.
        output: where the ranks' own output goes; None: where ours goes.
        on_progress: called a few times a second while ranks run.

    Raises:
        NexaError: see `make_ready`; StoppedError: a stop was asked for before a rank ran.
    """
    while True:
        ready = _made_ready(job, node, rundir, say)
        if isinstance(ready, Termination):
            return ready
        ended = _run_ranks(ready, node, rundir, output, on_progress)
        if ended.cause != OUT_OF_MEMORY or not ready.adapts_microbatch:
            return ended
        remember_too_large(open_store(ready.store_uri), ready)
        if node.count > 1:
            return ended  # the other nodes' ranks ended too: all begin again with the next attempt
        print(f"nexa: {ended.message}; trying fewer", file=sys.stderr, flush=True)
        rundir.forget_ranks_stop()


def _run_ranks(
    work: RankWork,
    node: Node,
    rundir: RunDir,
    output: IO[bytes] | None,
    on_progress: Callable[[Progress], None] | None,
) -> Termination:
    rundir.write_run(work.to_dict())
    if rundir.launcher_stop_asked():
        raise _stopped_early(work.job)
    killed_before = out_of_memory_kills()
    ranks = _start(work, node, rundir, output)
    try:
        ended = _watch(ranks, work, node, rundir, on_progress)
    finally:
        if ranks.poll() is None:
            os.killpg(ranks.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                ranks.wait(KILL_SECONDS)
        rundir.drop_tensors()
    # Where it was one of several, the others' words are the last: they lost the connection to it.
    if ended.exit_code == 1 and ended.retryable and out_of_memory_kills() > killed_before:
        message = f"the kernel killed a rank for memory with {work.plan.microbatch} sequences at once"
        # Where nothing gives way, another attempt may still fit: the node may have been short of memory, not the run.
        cause = OUT_OF_MEMORY if work.adapts_microbatch else "Killed"
        return ended.model_copy(update={"cause": cause, "message": message})
    return ended


class _Signalled(BaseException):
    """Not an Exception: no library may swallow it."""


def _made_ready(job: Job, node: Node, rundir: RunDir, say: Callable[[Termination], object]) -> RankWork | Termination:
    """`make_ready`, ended where a stop is asked for or nothing moves: what is half made then has no name yet."""
    if rundir.launcher_stop_asked():
        raise _stopped_early(job)
    try:
        with (
            guarded(job.spec.recovery.progress_deadline_seconds, lambda stacks: say(_stalled_early(job, node, stacks))),
            _ended_by_signals(),
        ):
            return make_ready(job, node)
    except _Signalled:
        raise _stopped_early(job) from None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise _Signalled after whatever a signal does already.

    Again and again, for Python drops what is raised while it runs a finaliser or a weak reference's callback.
    """

    def end(number: int, frame: FrameType | None) -> None:
        before[number](number, frame)
        signal.setitimer(signal.ITIMER_REAL, SIGNAL_AGAIN_SECONDS, SIGNAL_AGAIN_SECONDS)
        raise _Signalled

    def end_again(_number: int, _frame: FrameType | None) -> None:
        raise _Signalled

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before: dict[int, Any] = {number: handler for number, handler in handlers.items() if callable(handler)}
    alarm = signal.signal(signal.SIGALRM, end_again)
    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in [*before.items(), (signal.SIGALRM, alarm)]:
            signal.signal(number, handler)


def _stopped_early(job: Job) -> StoppedError:
    return StoppedError(f"{job.run_id} was stopped before the first step; run again to go on")


def _start(work: RankWork, node: Node, rundir: RunDir, output: IO[bytes] | None) -> subprocess.Popen[bytes]:
    # Inherited blocked: Slurm signals every process of a step, torchrun would kill its ranks on it, and a rank that
    # still imports torch has no handler yet. Ranks unblock it once they have one.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        return subprocess.Popen(
            rank_command(rundir.path, node, run_id=work.job.run_id, store_uri=work.store_uri),
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            env=rank_environment(work, node),
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which asks for a checkpoint.
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def rank_command(folder: Path, node: Node, *, run_id: str, store_uri: str) -> list[str]:
    """How the ranks of one node are started: torchrun, or the one rank itself. Pure."""
    ranks = ["-m", "nexa_train.rank", str(folder)]
    if node.count * node.ranks == 1:
        return [sys.executable, *ranks]
    shape = [f"--nnodes={node.count}", f"--nproc-per-node={node.ranks}", "--max-restarts=0"]
    shape.append(f"--log-dir={folder / 'torchrun'}")  # else in a folder of its own, which a killed torchrun leaves
    rendezvous = _rendezvous(node, run_id=run_id, store_uri=store_uri)
    return [sys.executable, "-m", "nexa_train.launch.torchrun", *rendezvous, *shape, *ranks]


def _rendezvous(node: Node, *, run_id: str, store_uri: str) -> list[str]:
    """The static one: node 0 has the first ranks, whatever its name. c10d's sorts nodes by name."""
    if node.endpoint is None:
        return ["--standalone"]
    static = ["--rdzv-backend=static", f"--node-rank={node.index}", f"--rdzv-id={run_id}-a{node.attempt}"]
    if isinstance(node.endpoint, Meeting):
        return [*node.endpoint.arguments(store_uri, run_id, node.index), *static]
    return [f"--rdzv-endpoint={node.endpoint}", *static]


def check_devices(job: Job, node: Node) -> None:
    """Refuse to start more ranks than this machine has GPUs, as far as that is seen without a driver.

    Raises:
        ConfigError: names both numbers.
    """
    found = num_gpus()
    if job.spec.cluster.gpus_per_node and found is not None and node.ranks > found:
        raise ConfigError(
            f"cluster.gpus_per_node: the job wants {node.ranks} GPUs here and this machine has {found}; "
            "run it where they are, or train on the CPU with cluster.gpus_per_node 0"
        )


def num_gpus() -> int | None:
    """GPUs that this machine shows as devices; None: they are there in another way (WSL)."""
    return None if Path("/dev/dxg").exists() else len(list(Path("/dev").glob("nvidia[0-9]*")))


def visible_devices(given: str | None, *, gpus_per_node: int, ranks: int) -> str:
    """CUDA_VISIBLE_DEVICES for the ranks of a node: one device a rank, none for a job on the CPU. Pure.

    Args:
        given: what the environment allows already; None: all.
    """
    if gpus_per_node == 0:
        return ""
    allowed = given.split(",") if given else [str(number) for number in range(ranks)]
    return ",".join(allowed[:ranks])


def usable_precision(job: Job) -> str:
    """The number format of the forward pass: what the job asks for, but fp32 on a CPU that only emulates bf16."""
    asked = job.spec.training.precision
    if asked == "fp32" or job.spec.cluster.gpus_per_node or has_bf16_units():
        return asked
    print(
        f"nexa: training.precision: fp32 instead of bf16, for which this processor ({processor()}) has no units",
        file=sys.stderr,
        flush=True,
    )
    return "fp32"


def threads_of_a_rank(job: Job, node: Node) -> int:
    """A rank's share of the processors that the job asks for a pod, wherever it runs; else of those there are here."""
    cluster = job.spec.cluster
    if cluster.resources.cpu:
        return int(parse_quantity(cluster.resources.cpu)) // cluster.ranks_per_node or 1
    return len(os.sched_getaffinity(0)) // node.ranks or 1


def _identity(job: Job, prepared: Prepared, located: Located, tokenizer: ChatTokenizer) -> dict[str, object]:
    """What two attempts must have in common beyond the description: the things that it names."""
    return {
        "config": job.identity,
        "dataset_digest": prepared.digest,
        "data_layout": LAYOUT_VERSION,
        "tokenizer_digest": tokenizer.digest,
        _BASE_MODEL: located.origin,
    }


def rank_environment(work: RankWork, node: Node) -> dict[str, str]:
    """Variables of every rank of a node: threads, what equal bits need, and whom they are not to outlive."""
    threads = str(work.plan.threads)
    fixed = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    # MKL may round differently from run to run by the alignment of memory unless told (its "Conditional
    # Numerical Reproducibility"); PYTHONHASHSEED is for third parties' sets.
    fixed |= {"MKL_CBWR": "AUTO", "PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1"}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = work.job.spec.cluster.gpus_per_node
    fixed["CUDA_VISIBLE_DEVICES"] = visible_devices(given, gpus_per_node=gpus, ranks=node.ranks)
    # cuBLAS needs this for equal bits (its documentation, "Results reproducibility").
    fixed["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    fixed |= axolotl.environment(work.job.spec)
    fixed[PARENT] = str(os.getpid())
    inherited = {name: value for name, value in os.environ.items() if name not in _TORCHRUN_S_OWN}
    return {**inherited, **fixed}


def _finished(work: RankWork, store: Store) -> Termination | None:
    """How the run ended, if its last step is committed and whole. Any other is read by the ranks, once.

    It has not ended where a stop cut the last evaluation short: the ranks take that again, and commit nothing.
    """
    run_id, total = work.job.run_id, work.plan.total_steps
    if total is None or step_folder(run_id, total) not in committed_folders(store, run_id):
        return None
    found = newest_valid(store, run_id)
    for problem in found.damaged:
        _warn(f"a damaged checkpoint is not used: {problem}")
    newest = found.committed
    if newest is None or newest.manifest.step != total or _lacks_validation(work, newest):
        return None
    manifest = newest.manifest
    uri = manifest_uri(store, newest)
    return Termination(
        run_id=manifest.run_id,
        attempt=work.attempt,
        exit_code=0,
        cause="Succeeded",
        message="finished before; nothing was left to train",
        step=manifest.step,
        total_steps=work.plan.total_steps,
        loss=manifest.metrics.get("loss"),
        validation_loss=manifest.metrics.get("validation_loss"),
        checkpoint=CheckpointRef(
            step=manifest.step, uri=uri, digest=newest.digest, weights_digest=manifest.weights_digest or ""
        ),
    )


def _lacks_validation(work: RankWork, last: Committed) -> bool:
    has_rows = work.dataset["audit"]["validation"]["sequences"] > 0
    return has_rows and "validation_loss" not in last.manifest.metrics


def _watch(
    ranks: subprocess.Popen[bytes],
    work: RankWork,
    node: Node,
    rundir: RunDir,
    on_progress: Callable[[Progress], None] | None,
) -> Termination:
    clock = Clock()
    dog = Watchdog(work.job.spec.recovery.progress_deadline_seconds, now=clock.now)
    busy_seconds = partial(watchdog.busy_seconds, ranks.pid)
    warned = 0

    def look() -> Progress | None:
        nonlocal warned
        progress, warnings = rundir.read_progress(), rundir.warnings()
        if progress and on_progress:
            on_progress(progress)
        for message in warnings[warned:]:
            _warn(message)
        warned = len(warnings)
        return progress

    while (code := ranks.poll()) is None:
        progress, now = look(), clock.look()
        if dog.is_stalled(progress, beats=rundir.beats(), busy_seconds=busy_seconds, now=now):
            return _stalled(ranks, work, node, rundir, progress)
        if node.count > 1 and rundir.launcher_stop_asked() and dog.waits_in_vain(progress, now=now):
            if outcomes := rundir.read_outcomes():  # it failed, and torchrun still waits for the others of this node
                return outcomes[0]
            said = "asked to stop, its ranks did not come to the end of their step: another node's are gone"
            return _ended(work, progress, StoppedError.exit_code, "Stopped", said)
        time.sleep(POLL_SECONDS)
    progress = look()
    if code == 0 and progress:
        return _ended(work, progress, 0, "Succeeded", "")
    outcomes = rundir.read_outcomes()
    if outcomes:
        return outcomes[0]
    if node.count > 1 and not rundir.beats():
        where = "in the artifact store" if isinstance(node.endpoint, Meeting) else f"at {node.endpoint}"
        said = f"no rank began: not all {node.count} nodes came to the rendezvous {where}"
        return _ended(work, progress, 1, NOT_MET, said)
    return _killed(work, progress, code)


def _warn(message: str) -> None:
    print(f"nexa: warning: {message}", file=sys.stderr, flush=True)


def _stalled(
    ranks: subprocess.Popen[bytes], work: RankWork, node: Node, rundir: RunDir, progress: Progress | None
) -> Termination:
    """Have every rank say where it stands; who watched them ends them."""
    run_id, deadline = work.job.run_id, work.job.spec.recovery.progress_deadline_seconds
    where = f"{progress.phase}, step {progress.step}" if progress else "starting"
    what = f"nothing moved for {deadline} s ({where})"
    stacks = watchdog.capture(ranks.pid, rundir, others=node.count > 1)
    uri = _keep(stacks, what, store_uri=work.store_uri, run_id=run_id, attempt=work.attempt, node=node)
    message = f"{what}; what its ranks did is in {uri or 'the log'}"
    return _ended(work, progress, EXIT_STALLED, "Stalled", message)


def _stalled_early(job: Job, node: Node, stacks: str) -> Termination:
    """The last words of a node that hung before its ranks ran."""
    what = f"nothing moved for {job.spec.recovery.progress_deadline_seconds} s (before the ranks ran)"
    uri = _keep(stacks, what, store_uri=job.spec.artifacts.uri, run_id=job.run_id, attempt=node.attempt, node=node)
    message = f"{what}; where it stood is in {uri or 'the log'}"
    return Termination(
        run_id=job.run_id, attempt=node.attempt, exit_code=EXIT_STALLED, cause="Stalled", message=message
    )


def _keep(stacks: str, what: str, *, store_uri: str, run_id: str, attempt: int, node: Node) -> str | None:
    """Put them beside the run's checkpoints; None: they are in the log, for the store did not take them."""
    text = f"{run_id}, attempt {attempt}, node {node.index} of {node.count}: {what}\n\n{stacks}"
    uri = watchdog.keep(text, store_uri=store_uri, run_id=run_id, attempt=attempt, node=node.index)
    if uri is None:
        print(text, file=sys.stderr, flush=True)
    return uri


def _killed(work: RankWork, progress: Progress | None, code: int) -> Termination:
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    message = (
        f"the ranks ended without last words ({how}); where their log shows no error, they were killed: out of memory?"
    )
    return _ended(work, progress, 1, "Killed", message)


def _ended(work: RankWork, progress: Progress | None, exit_code: int, cause: str, message: str) -> Termination:
    facts = progress.model_dump(include=set(Termination.model_fields)) if progress else {}
    facts |= {"run_id": work.job.run_id, "attempt": work.attempt, "exit_code": exit_code}
    return Termination.model_validate(facts | {"cause": cause, "message": message})


def failed_outcome(job: Job, node: Node, exc: NexaError) -> Termination:
    """The last words of a node that failed before its ranks ran."""
    cause = "Stopped" if isinstance(exc, StoppedError) else type(exc).__name__
    return Termination(
        run_id=job.run_id,
        attempt=node.attempt,
        exit_code=exc.exit_code,
        cause=cause,
        message=str(exc),
        retryable=exc.retryable,
    )

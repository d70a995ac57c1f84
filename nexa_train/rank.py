"""One rank: `python -m nexa_train.rank RUNDIR`, started by torchrun. Sets the process up, runs the pipeline.

When it fails, what ended it is in the run folder before the process is gone.
"""

from __future__ import annotations

from nexa_train.launch.lifeline import die_with_parent, leave

if __name__ == "__main__":
    die_with_parent()  # before torch, which takes seconds

import faulthandler
import os
import resource
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from nexa_train.backends.base import RankContext
from nexa_train.checkpoint import PATIENCE
from nexa_train.config.protocol import OUT_OF_MEMORY, Termination
from nexa_train.data.batches import Split
from nexa_train.data.cursor import Order
from nexa_train.data.tokenizer import load_tokenizer
from nexa_train.errors import ConfigError, NexaError, StoppedError
from nexa_train.launch.work import RankWork
from nexa_train.pipeline import RunFacts, TrainingPipeline
from nexa_train.plan import TrainPlan
from nexa_train.relay import beats_of_all_nodes
from nexa_train.rundir import RunDir
from nexa_train.store import open_store
from nexa_train.store.watched import WatchedStore


def main(folder: str) -> int:
    """Run this rank; returns the process's exit code."""
    rundir = RunDir(Path(folder))
    rank = int(os.environ.get("RANK", "0"))
    stacks = rundir.own_stacks(rank).open("wb", buffering=0)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)  # the launcher asks when nothing moves
    rundir.beat()
    rundir.stop_on_signals(of_a_rank=True)
    # Blocked by the launcher until now; one that came meanwhile is obeyed here.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        _run(rundir, rank)
    except Exception as exc:  # noqa: BLE001 - a rank must say what ended it, whatever it was
        return _ended_by(exc, rundir, rank)
    finally:
        if dist.is_initialized():
            # After the last words: the others fail when the connections go, and whoever speaks first is the cause.
            dist.destroy_process_group()
    return 0


def _ended_by(exc: Exception, rundir: RunDir, rank: int) -> int:
    if ran_out_of_memory(exc):
        work = RankWork.from_dict(rundir.read_run())
        message = out_of_memory_message(work, rank, str(exc))
        return _last_words(rundir, rank, 1, OUT_OF_MEMORY, message, retryable=work.adapts_microbatch)
    if isinstance(exc, NexaError):
        cause = "Stopped" if isinstance(exc, StoppedError) else type(exc).__name__
        return _last_words(rundir, rank, exc.exit_code, cause, str(exc), retryable=exc.retryable)
    traceback.print_exception(exc)
    return _last_words(rundir, rank, 1, type(exc).__name__, str(exc), retryable=True)


def ran_out_of_memory(exc: Exception) -> bool:
    """Whether torch or Python had no memory to give; torch's allocator on the CPU has no class for it."""
    if isinstance(exc, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: " in str(exc):
        return True
    # A thread's stack is memory too. Python does not say which of its limits a process met: where its memory has one
    # (`ulimit -d`, `ulimit -v`), it is that.
    limits = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_DATA, resource.RLIMIT_AS))
    return str(exc) == "can't start new thread" and any(limit != resource.RLIM_INFINITY for limit in limits)


def out_of_memory_message(work: RankWork, rank: int, told: str) -> str:
    """What is said of it: with how many sequences, by whom, and what to do."""
    at_once = work.plan.microbatch
    if work.adapts_microbatch:
        advice = ""
    elif at_once > 1:
        advice = "; set training.microbatch_size_per_gpu lower, or to auto"
    else:
        advice = "; lower model.max_seq_len, set training.activation_checkpointing, or use more ranks or memory"
    cut = " ".join(told.split())[:300]
    return f"rank {rank} ran out of memory with {at_once} sequence{'s' * (at_once > 1)} at once: {cut}{advice}"


def _run(rundir: RunDir, rank: int) -> None:
    work = RankWork.from_dict(rundir.read_run())
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    check_world(work.plan, world)
    configure(work, local_rank)
    if world > 1:
        # Flags and sums of a few bytes live on the CPU also where weights do not. It is the launcher's watchdog that
        # judges who waits for too long: torch's half an hour would end ranks while the first one reads a checkpoint.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        work = replace(work, plan=agreed(work.plan))
    context = make_context(work, rank, world)
    facts = RunFacts(work.job, work.attempt, work.dataset, work.code, work.world_facts())
    store = WatchedStore(open_store(work.store_uri), rundir.beat)
    with beats_of_all_nodes(rundir, local_rank=local_rank, world=world):
        TrainingPipeline(context, facts, store, rundir, local_rank=local_rank).run()


def check_world(plan: TrainPlan, world: int) -> None:
    """Refuse to train in a world that the samples were not shared out for: some would be read by nobody, or twice.

    Raises:
        ConfigError: names both numbers.
    """
    if world != plan.world_size:
        raise ConfigError(
            f"environment: WORLD_SIZE is {world}, the job has {plan.world_size} ranks ({plan.nodes} nodes x "
            f"{plan.ranks_per_node}); change it in the job"
        )


def agreed(plan: TrainPlan) -> TrainPlan:
    """The plan with the smallest microbatch of all ranks' plans, and in fp32 if any is.

    Each node's launcher looks by itself at what ran out of memory before, perhaps a moment before it is noted, and at
    what its processor can do; ranks that add up in different ways would wait for each other for ever.
    """
    least = torch.tensor([plan.microbatch, plan.precision == "bf16"], dtype=torch.int64)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    microbatch, bf16 = least.tolist()
    accumulation = plan.microbatch * plan.accumulation // microbatch
    precision = "bf16" if bf16 else "fp32"
    return replace(plan, microbatch=microbatch, accumulation=accumulation, precision=precision)


def configure(work: RankWork, local_rank: int) -> None:
    """Set up torch in this process as the job asks.

    Raises:
        ConfigError: this rank has no GPU.
    """
    torch.set_num_threads(work.plan.threads)
    # What `use_deterministic_algorithms` does, which also imports torch's compiler: two seconds.
    torch.set_deterministic_debug_mode("error" if work.job.spec.training.deterministic else "default")
    if work.job.spec.cluster.gpus_per_node:
        found = torch.cuda.device_count()
        if local_rank >= found:
            raise ConfigError(
                f"cluster.gpus_per_node: local rank {local_rank} has no GPU, torch sees {found}: check the driver and "
                "that this torch is a CUDA build, or train on the CPU with cluster.gpus_per_node 0"
            )
        torch.cuda.set_device(local_rank)


def make_context(work: RankWork, rank: int, world: int) -> RankContext:
    """What one rank works with: its data mapped, its order of samples."""
    train = Split(work.data_folder, "train")
    total = work.plan.total_sequences
    assert total is not None  # noqa: S101 - the launcher prepared the data
    return RankContext(
        spec=work.spec,
        plan=work.plan,
        located=work.located,
        tokenizer=load_tokenizer(work.located.folder),
        train=train,
        validation=Split(work.data_folder, "validation"),
        order=Order(train.num_sequences, total, work.job.spec.training.seed),
        rank=rank,
        world=world,
    )


def _last_words(rundir: RunDir, rank: int, exit_code: int, cause: str, message: str, *, retryable: bool) -> int:
    """Say how this rank ended, with the facts as this node last told them; returns the exit code."""
    work = RankWork.from_dict(rundir.read_run())
    told = rundir.read_progress()
    facts = told.model_dump(include=set(Termination.model_fields)) if told else {}
    facts |= {"run_id": work.job.run_id, "attempt": work.attempt, "exit_code": exit_code}
    facts |= {"cause": cause, "message": message, "retryable": retryable}
    rundir.write_outcome(rank, Termination.model_validate(facts))
    return exit_code


if __name__ == "__main__":
    leave(main(sys.argv[1]))

"""Job -> an sbatch script, and its submission. Each node runs the same entrypoint as a pod does."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys

from nexa_train.config.job import Job
from nexa_train.config.protocol import (
    ENV_ATTEMPT,
    ENV_JOB,
    ENV_NODE_INDEX,
    ENV_NUM_NODES,
    ENV_PROGRESS_PORT,
    ENV_RDZV_ENDPOINT,
    RDZV_PORT,
)
from nexa_train.errors import RefusedError, StoppedError
from nexa_train.plan import parse_quantity

STRAGGLER_SECONDS = 60
"""How long the other nodes of a job may go on when one has ended: it cannot be without them for long."""
RDZV_PORTS = 10_000
"""Jobs that share a node meet on different ports, the last of which is `RDZV_PORT`."""


def render_script(job: Job) -> str:
    """The batch script. Pure but for the path of this Python, which must be the same on the nodes."""
    cluster = job.spec.cluster
    options: dict[str, object] = {
        "job-name": job.metadata.name,
        "nodes": cluster.num_nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node or None,
        "cpus-per-task": int(parse_quantity(cluster.resources.cpu)) or None if cluster.resources.cpu else None,
        "mem": _megabytes(cluster.resources.memory),
        "time": _minutes(job.spec.schedule.active_deadline_seconds),
        "partition": job.spec.schedule.queue_name,
        "signal": f"TERM@{_grace(job)}",
        "output": f"{job.metadata.name}-%j.log",
        "open-mode": "append",  # A requeued job's log goes on where its last attempt left it.
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    lines.append("#SBATCH --requeue")  # After the loss of a node; a step that ended by itself is not run again.
    exports = [f"export {name}={value}" for name, value in _environment(job).items()]
    return "\n".join(["#!/bin/bash", *lines, "set -eu", *exports, *_BEGIN, f"{_srun(options)} || code=$?", *_END, ""])


_BEGIN = (
    "code=0",
    "trap : TERM",  # The ranks' to answer; this shell waits for what they say.
)
_PREEMPTED = "scontrol show job --oneliner $SLURM_JOB_ID | grep -q ' PreemptTime=[0-9]'"
_END = (
    # Slurm requeues a preempted job when its GraceTime is over, unless it has ended by then: with a checkpoint it has.
    f"if [ $code = {StoppedError.exit_code} ] && {_PREEMPTED}; then scontrol requeue $SLURM_JOB_ID; fi",
    "exit $code",
)


def _environment(job: Job) -> dict[str, str]:
    """What every task gets: shell words, expanded on the job's first node."""
    body = {"metadata": job.metadata.model_dump(mode="json"), "spec": job.as_manifest()["spec"]}
    port = f"$(({RDZV_PORT} - SLURM_JOB_ID % {RDZV_PORTS}))"
    return {
        ENV_JOB: shlex.quote(json.dumps(body, sort_keys=True, ensure_ascii=False)),
        ENV_NUM_NODES: '"$SLURM_NNODES"',
        ENV_ATTEMPT: '"${SLURM_RESTART_COUNT:-0}"',
        ENV_PROGRESS_PORT: "0",
        ENV_RDZV_ENDPOINT: f'"$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):{port}"',
        # Slurm signals every process of a step. torchrun answers SIGTERM by killing the ranks, after 30 seconds
        # unless told otherwise; they need theirs to commit a checkpoint.
        "PET_SHUTDOWN_TIMEOUT": str(job.spec.recovery.grace_period_seconds),
    }


def _srun(options: dict[str, object]) -> str:
    """Starts one task on each node.

    Where one ends, the others get some time to end by themselves, whatever the site's default: srun ends with the
    highest exit code, and that of a killed task (137) hides the one that says why.
    """
    cpus = options["cpus-per-task"]
    # Where a site or a user sets SBATCH_EXPORT, srun would hand on as little as sbatch did.
    flags = ["--export=ALL", "--kill-on-bad-exit=0", f"--wait={STRAGGLER_SECONDS}"]
    flags += [f"--cpus-per-task={cpus}"] if cpus else []  # srun does not take it from sbatch since 22.05.
    # The rank of a node is known on that node only; exec, so that Slurm's signal reaches the entrypoint.
    start = f"export {ENV_NODE_INDEX}=$SLURM_NODEID; exec {shlex.quote(sys.executable)} -m nexa_train.entrypoint"
    return shlex.join(["srun", *flags, "bash", "-c", start])


def submit_or_print(job: Job) -> str:
    """Submit by sbatch where there is one, else return the script with how to submit it.

    Raises:
        RefusedError: sbatch said no.
    """
    script = render_script(job)
    if shutil.which("sbatch") is None:
        return f"# there is no sbatch on this machine; save this and submit it where there is: sbatch FILE\n{script}"
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RefusedError(f"sbatch refused {job.metadata.name}: {done.stderr.strip()}")
    number = re.split(r"[;\s]", done.stdout.strip())[0]
    return f"submitted {job.metadata.name} to Slurm as job {number}; its log is {job.metadata.name}-{number}.log"


def _megabytes(memory: str | None) -> str | None:
    return f"{round(parse_quantity(memory) / (1 << 20))}M" if memory else None


def _grace(job: Job) -> int:
    """How long before its end it is asked to stop: less for a short job, which would be stopped as it starts."""
    grace, limit = job.spec.recovery.grace_period_seconds, job.spec.schedule.active_deadline_seconds
    return min(grace, limit // 2) if limit else grace


def _minutes(seconds: int | None) -> int | None:
    return -(-seconds // 60) if seconds else None

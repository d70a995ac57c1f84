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
from nexa_train.errors import RefusedError
from nexa_train.plan import parse_quantity

GRACE_SECONDS = 120
"""How long before the end of its time Slurm asks a job to stop, so that it can commit a checkpoint."""


def render_script(job: Job) -> str:
    """The batch script. Pure but for the path of this Python, which must be the same on the nodes."""
    cluster = job.spec.cluster
    options = {
        "job-name": job.metadata.name,
        "nodes": cluster.num_nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": cluster.gpus_per_node or None,
        "cpus-per-task": int(parse_quantity(cluster.resources.cpu)) or None if cluster.resources.cpu else None,
        "mem": _megabytes(cluster.resources.memory),
        "time": _minutes(job.spec.schedule.active_deadline_seconds),
        "partition": job.spec.schedule.queue_name,
        "signal": f"TERM@{GRACE_SECONDS}",
        "output": f"{job.metadata.name}-%j.log",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    body = {"metadata": job.metadata.model_dump(mode="json"), "spec": job.spec.model_dump(mode="json")}
    environment = {
        ENV_JOB: shlex.quote(json.dumps(body, sort_keys=True)),
        ENV_NUM_NODES: '"$SLURM_NNODES"',
        ENV_ATTEMPT: '"${SLURM_RESTART_COUNT:-0}"',
        ENV_PROGRESS_PORT: "0",
        ENV_RDZV_ENDPOINT: f'"$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):{RDZV_PORT}"',
    }
    exports = [f"export {name}={value}" for name, value in environment.items()]
    # The rank of a node is known on that node only; exec, so that Slurm's signal reaches the entrypoint.
    start = f"export {ENV_NODE_INDEX}=$SLURM_NODEID; exec {shlex.quote(sys.executable)} -m nexa_train.entrypoint"
    return "\n".join(["#!/bin/bash", *lines, "set -eu", *exports, f"exec srun bash -c {shlex.quote(start)}", ""])


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


def _minutes(seconds: int | None) -> int | None:
    return -(-seconds // 60) if seconds else None

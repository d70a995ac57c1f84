"""The process of a pod, or of a Slurm task: runs this node's ranks, answers for them, outlives them.

`python -m nexa_train.entrypoint`. Reads its environment (`config/protocol.py`), serves

    GET /progress   protocol.Progress as JSON     GET /metrics   the same for Prometheus
    GET /healthz    200 while this process lives

and writes its last words to the pod's termination message, so that a job of one second reports as much as
one of a week. SIGTERM has the ranks commit a checkpoint and ends with 75.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    # The first process of a container has no default action: what comes before there is a handler would be lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

import json
import os
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from nexa_train.config import Job
from nexa_train.config.load import job_from_object
from nexa_train.config.protocol import (
    ENV_ATTEMPT,
    ENV_GANG,
    ENV_JOB,
    ENV_NODE_ADDRESS,
    ENV_NODE_INDEX,
    ENV_NUM_NODES,
    ENV_OUT_OF_MEMORY,
    ENV_PROGRESS_PORT,
    ENV_RDZV_ENDPOINT,
    PROGRESS_PORT,
    TERMINATION_LOG,
    Progress,
    Termination,
)
from nexa_train.errors import ConfigError, NexaError, StoppedError
from nexa_train.launch.lifeline import leave
from nexa_train.launch.meeting import Meeting
from nexa_train.launch.node import Node, adopt_environment, failed_outcome, run_node
from nexa_train.launch.tail import Tail
from nexa_train.rundir import RunDir

RUN_FOLDERS = "nexa-run-"
"""How their names begin, among the temporary files of all."""
GAUGES = ("step", "total_steps", "loss", "validation_loss", "tokens_per_second", "eta_seconds")


def main() -> int:
    """Run this node's part; returns the exit code."""
    try:
        job, node = read_environment(os.environ)
        port = read_port(os.environ)
    except NexaError as exc:
        return end(
            Termination(run_id="", exit_code=exc.exit_code, cause=type(exc).__name__, message=str(exc), retryable=False)
        )
    adopt_environment(job)
    with tempfile.TemporaryDirectory(prefix=RUN_FOLDERS) as folder:
        return end(_run(job, node, RunDir(Path(folder)), port=port))


def _run(job: Job, node: Node, rundir: RunDir, *, port: int) -> Termination:
    rundir.stop_on_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        server = serve(rundir, job, node, port=port)
        with rundir.held(f"{RUN_FOLDERS}*"), Tail(sys.stdout.buffer) as output:
            outcome = run_node(job, node, rundir, say=end, output=output.sink)
        server.shutdown()
    except NexaError as exc:
        return failed_outcome(job, node, exc)
    except Exception as exc:  # noqa: BLE001 - whatever it was, the pod's last words must name it
        traceback.print_exception(exc)
        return Termination(
            run_id=job.run_id, attempt=node.attempt, exit_code=1, cause=type(exc).__name__, message=str(exc)
        )
    failed = outcome.exit_code not in (0, StoppedError.exit_code)
    return outcome.model_copy(update={"log": output.text()}) if failed else outcome


def read_environment(environment: Mapping[str, str]) -> tuple[Job, Node]:
    """The job and this node's place in it.

    Raises:
        ConfigError: a variable is missing or does not fit, also where it does not fit the job.
    """
    job = read_job(environment)
    try:
        node_count, index = int(environment.get(ENV_NUM_NODES, "1")), int(environment.get(ENV_NODE_INDEX, "0"))
        attempt, starved = int(environment.get(ENV_ATTEMPT, "0")), environment.get(ENV_OUT_OF_MEMORY)
        out_of_memory = int(starved) if starved else None
    except ValueError as exc:
        raise ConfigError(f"environment: a number of NEXA_* or {ENV_NODE_INDEX} cannot be read: {exc}") from exc
    if node_count != job.spec.cluster.num_nodes:
        # Each rank takes its share by the plan, so those of a node too many would train on nothing, or twice.
        raise ConfigError(
            f"environment: {ENV_NUM_NODES} is {node_count}, the job has cluster.num_nodes "
            f"{job.spec.cluster.num_nodes}; change it in the job"
        )
    if not 0 <= index < node_count:
        raise ConfigError(f"environment: {ENV_NODE_INDEX} is {index}, expected 0 to {node_count - 1}")
    endpoint = _endpoint(environment, node_count) if node_count > 1 else None
    return job, Node(index, node_count, job.spec.cluster.ranks_per_node, endpoint, attempt, out_of_memory)


def read_job(environment: Mapping[str, str]) -> Job:
    """The job alone.

    Raises:
        ConfigError: it is missing, or wrong.
    """
    try:
        body = json.loads(environment[ENV_JOB])
    except KeyError as exc:
        raise ConfigError(f"environment: {exc.args[0]} is not set; it holds the job as JSON") from exc
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"environment: {ENV_JOB} cannot be read: {exc}") from exc
    if not isinstance(body, dict):
        raise ConfigError(f"environment: {ENV_JOB} holds {type(body).__name__}, expected the job as an object")
    return job_from_object(body)


def _endpoint(environment: Mapping[str, str], node_count: int) -> str | Meeting:
    """Where node 0 is, or how it is found."""
    if endpoint := environment.get(ENV_RDZV_ENDPOINT):
        return endpoint
    gang, address = environment.get(ENV_GANG), environment.get(ENV_NODE_ADDRESS)
    if not gang or not address:
        raise ConfigError(
            f"environment: {ENV_RDZV_ENDPOINT} is not set, nor are both {ENV_GANG} and {ENV_NODE_ADDRESS}, and "
            f"{node_count} nodes must meet somewhere"
        )
    try:
        return Meeting(gang, str(ip_address(address)))
    except ValueError:
        raise ConfigError(f"environment: {ENV_NODE_ADDRESS} is {address!r}, expected an IP address") from None


def read_port(environment: Mapping[str, str]) -> int:
    """Where to serve progress; 0: any free port.

    Raises:
        ConfigError: not the number of a port.
    """
    given = environment.get(ENV_PROGRESS_PORT) or str(PROGRESS_PORT)
    if not given.isdecimal() or int(given) > 65_535:
        raise ConfigError(f"environment: {ENV_PROGRESS_PORT} is {given!r}, expected a port, or 0 for any free one")
    return int(given)


def serve(rundir: RunDir, job: Job, node: Node, *, port: int) -> ThreadingHTTPServer:
    """Answer for this node's ranks from now on, in a thread."""

    def progress() -> Progress:
        return rundir.read_progress() or Progress(run_id=job.run_id, attempt=node.attempt)

    registry = CollectorRegistry()
    registry.register(_Collector(progress))

    answers: dict[str, Callable[[], bytes]] = {
        "/progress": lambda: progress().model_dump_json().encode(),
        "/metrics": lambda: generate_latest(registry),
        "/healthz": lambda: b"ok",
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name that http.server calls
            answer = answers.get(self.path)
            body = answer() if answer else b"not found"
            self.send_response(200 if answer else 404)
            self.send_header("Content-Type", "application/json" if self.path == "/progress" else "text/plain")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Polls every few seconds are not worth a line each."""

    server = _listening(port, Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), name="progress", daemon=True).start()
    return server


class _DualStack(ThreadingHTTPServer):
    """On IPv6 and IPv4: a pod may have either address."""

    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def _listening(port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    try:
        return _DualStack(("", port), handler)
    except OSError:  # a kernel without IPv6; what else is wrong is wrong with IPv4 too
        return ThreadingHTTPServer(("", port), handler)


class _Collector:
    def __init__(self, progress: Callable[[], Progress]) -> None:
        self.progress = progress

    def collect(self) -> list[GaugeMetricFamily]:
        """Gauges of what is known now."""
        facts = self.progress().model_dump()
        known = [(name, facts[name]) for name in GAUGES if facts[name] is not None]
        return [GaugeMetricFamily(f"nexa_{name}", f"{name} of the run on this node", value=v) for name, v in known]


def end(outcome: Termination) -> int:
    """Say it to whoever reads the log, and to the kubelet where there is one."""
    print(outcome.model_dump_json(exclude={"log"}), flush=True)  # its lines stand right above
    if os.path.exists(TERMINATION_LOG):
        Path(TERMINATION_LOG).write_bytes(outcome.as_bytes())
    return outcome.exit_code


if __name__ == "__main__":
    leave(main())

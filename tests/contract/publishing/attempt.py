"""What an attempt does to its run's artifacts, in a process of its own that can be killed: a rank 0 without a model.

`python -m tests.contract.publishing.attempt SOCKET_FD` is the nursery: it has imported what an attempt needs, and forks
one for each `Task` it is sent, in milliseconds. A store's client makes threads when it is first used, so the nursery
itself never opens one.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import stamina
from stamina.instrumentation import set_on_retry_hooks

import nexa_train.store.local
import nexa_train.store.s3  # noqa: F401 - here, and not in each attempt
from nexa_train.artifact.manifest import ManifestDraft
from nexa_train.artifact.publish import Publisher, claim_run
from nexa_train.artifact.retention import apply_retention
from nexa_train.errors import NexaError
from nexa_train.store import open_store

RETRIES_AT_ONCE = 12
Moment = Literal["killed", "full disk"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One attempt.

    Attributes:
        steps: the steps that are saved, each after the one before.
        scratch: a folder for the files before they are published.
        local_fault: number of a change to the file system, and what happens there; folder stores only.
    """

    uri: str
    run_id: str
    name: str
    steps: tuple[int, ...]
    keep_last: int | None
    scratch: str
    env: Mapping[str, str] = field(default_factory=dict)
    local_fault: tuple[int, Moment] | None = None


def contents(name: str, step: int) -> dict[str, bytes]:
    """What an attempt saves at a step: two files that differ between attempts, one that does not."""
    return {
        "model.safetensors": f"{name} {step} ".encode() * 200,
        "optimizer.safetensors": f"{step} {name} ".encode() * 300,
        "state/rng.json": b'{"step": %d}' % step,
    }


def run(task: Task, tell: Callable[..., None]) -> None:
    """As `TrainingPipeline` does it: claim, resume, then save, publish, thin out, step by step."""
    os.environ.update(task.env)
    store = open_store(task.uri)
    store.probe()
    claim_run(store, task.run_id, {"seed": 7})
    publisher = Publisher(store, task.run_id, task.name)
    found = publisher.resume().committed
    begin = found.manifest.step if found else 0
    tell(resumed=begin)
    parent = found.digest if found else None
    for step in (step for step in task.steps if step > begin):
        files = _save(Path(task.scratch, task.name, str(step)), contents(task.name, step))
        committed = publisher.publish(step, files, ManifestDraft(config={"seed": 7}, parent=parent))
        tell(step=step, digest=committed.digest, key=committed.key)
        parent = committed.digest
        apply_retention(store, task.run_id, task.keep_last)
    apply_retention(store, task.run_id, task.keep_last)


def _save(folder: Path, files: Mapping[str, bytes]) -> dict[str, Path]:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return {path: folder / path for path in files}


class LocalFaults:
    """Counts the changes that this process makes below a folder, and strikes at one of them."""

    CALLS = ("link", "unlink", "mkdir", "rmdir", "fsync", "rename", "replace")

    def __init__(self, root: str, number: int, moment: Moment) -> None:
        self.root, self.number, self.moment, self.count = root, number, moment, 0
        self._counting_one = threading.Lock()

    def install(self) -> None:
        for name in self.CALLS:
            setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._counting_one:
                counts = self._is_below(args[0])
                self.count += counts
                struck = counts and self.count == self.number
            if struck and self.moment == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if struck and self.moment == "full disk" and call.__name__ not in ("unlink", "rmdir"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return call(*args, **kwargs)

        return counted

    def _is_below(self, place: int | str | os.PathLike[str]) -> bool:
        path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else os.fspath(place)
        return path.startswith(f"{self.root}/")


def _attempt(task: Task, out: int) -> None:
    """In the forked process: report line by line, the last one says how it ended."""

    def tell(**facts: Any) -> None:
        os.write(out, json.dumps(facts).encode() + b"\n")

    os.read(0, 1)  # who kills must know us first
    stamina.set_testing(True, attempts=RETRIES_AT_ONCE, cap=True)
    set_on_retry_hooks([])  # what logs a retry takes longer to import than all else here takes
    faults = LocalFaults(task.uri, *(task.local_fault or (0, "killed")))
    faults.install()
    try:
        run(task, tell)
        tell(ended="", changes=faults.count, cpu_seconds=time.process_time())
    except NexaError as exc:
        tell(ended=type(exc).__name__, message=str(exc))
    except BaseException:  # noqa: BLE001 - told to the one who asked
        tell(ended="bug", message=traceback.format_exc())


def nursery(requests: socket.socket) -> None:
    """Fork an attempt for each task that comes with a pipe to report to and one to wait for; answer with its pid."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: their pipe's end says that they are gone
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 16, 2)
        if not message:
            return
        document = json.loads(message)
        pid = os.fork()
        if pid == 0:
            requests.close()
            out, wait = descriptors
            os.dup2(wait, 0)
            document["steps"] = tuple(document["steps"])
            _attempt(Task(**document), out)
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(struct.pack("i", pid))


@dataclass
class Running:
    """An attempt that was started."""

    pid: int
    _out: int
    _go: int

    def go(self) -> None:
        """Let it begin."""
        os.write(self._go, b"g")
        os.close(self._go)

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def reports(self) -> list[dict[str, Any]]:
        """Wait until it is gone and return all that it said."""
        with os.fdopen(self._out, "rb") as stream:
            return [json.loads(line) for line in stream.read().splitlines()]


class Nursery:
    """The other side: starts attempts."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests, self._one_at_a_time = requests, threading.Lock()

    def start(self, task: Task) -> Running:
        """Start an attempt, which waits for `go`."""
        out_read, out_write = os.pipe()
        wait_read, wait_write = os.pipe()
        with self._one_at_a_time:
            socket.send_fds(self._requests, [json.dumps(asdict(task)).encode()], [out_write, wait_read])
            [pid] = struct.unpack("i", self._requests.recv(4))
        os.close(out_write)
        os.close(wait_read)
        return Running(pid, out_read, wait_write)


if __name__ == "__main__":
    nursery(socket.socket(fileno=int(sys.argv[1])))

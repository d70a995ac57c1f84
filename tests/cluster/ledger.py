"""What a cluster has put on this machine, written down as it happens, so that all of it can be taken away again.

Every cluster has one folder with one ledger in it. `undo` reads the ledger backwards; it is the same whether a cluster
is stopped, failed half-way, was left by a process that was killed (a watcher sees the owner go), or belongs to an `up`
that a later `down` ends. Processes are known by pid and start time, everything else by a name that
only this cluster uses.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.errors import ClusterError, CommandFailed, TimedOut
from tests.cluster.paths import REPOSITORY
from tests.cluster.run import run, tail, wait_until

_PREFIX = "nexa-cluster-"


@dataclass(frozen=True)
class ProcessId:
    """A pid that cannot be mistaken for a later process with the same number."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        return cls(pid, _stat(pid)[1])

    @property
    def alive(self) -> bool:
        try:
            state, start_ticks = _stat(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return False
        return start_ticks == self.start_ticks and state != "Z"

    def end(self, *, grace_seconds: float = 0) -> None:
        """End the process and the group it leads: TERM if there is grace, then KILL."""
        if grace_seconds and self.alive:
            os.killpg(self.pid, signal.SIGTERM)
            with contextlib.suppress(TimedOut):
                wait_until(lambda: not self.alive, timeout_seconds=grace_seconds, what="end", interval_seconds=0.02)
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            wait_until(lambda: not self.alive, timeout_seconds=30, what=f"process {self.pid} is gone")
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)


def _stat(pid: int) -> tuple[str, int]:
    """State and start time; the name before them may hold spaces and parentheses."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


class Ledger:
    """The folder of one cluster and the list of what it has outside that folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "ledger.jsonl"
        self._watcher: subprocess.Popen[bytes] | None = None

    @classmethod
    def open(cls) -> Ledger:
        """A new folder, which a watcher undoes when this process is killed."""
        sweep()
        ledger = cls(Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_parent())))
        owner = ProcessId.of(os.getpid())
        ledger.note("owner", **vars(owner))
        ledger._watch(owner)
        return ledger

    def outlive_me(self) -> None:
        """From now on nobody undoes it but who is told to: `up` leaves it to `down`."""
        self.note("owner")
        self._stop_watching()

    def note(self, kind: str, **facts: int | str) -> None:
        """Written before the thing is made where its name is known by then: undoing what never was does no harm."""
        with self._file.open("a") as file:
            file.write(json.dumps({"kind": kind, **facts}) + "\n")

    def entries(self, kind: str | None = None) -> list[dict[str, int | str]]:
        if not self._file.exists():
            return []
        entries = [json.loads(line) for line in self._file.read_text().splitlines()]
        return [entry for entry in entries if kind in (None, entry["kind"])]

    def processes(self) -> Iterator[ProcessId]:
        for entry in self.entries("process"):
            yield ProcessId(int(entry["pid"]), int(entry["start_ticks"]))

    def undo(self) -> None:
        """Take everything away, the newest first; twice does no harm. What resists is named once the rest is gone."""
        self._stop_watching()
        resisted = []
        for entry in reversed(self.entries()):
            try:
                _UNDO[str(entry["kind"])](entry)
            except ClusterError as error:
                resisted.append(f"{entry}: {error}")
        _unmount_below(self.folder)
        wait_until(lambda: _deleted(self.folder), timeout_seconds=120, what=f"folder {self.folder} is gone")
        if resisted:
            raise ClusterError("could not be taken away, please do it by hand:\n" + "\n".join(resisted))

    def abandoned(self) -> bool:
        """Its owner is gone, and so is the watcher, or it would have undone this."""
        owner = next(reversed(self.entries("owner")), None)
        if owner is None or "pid" not in owner:
            return False
        return not ProcessId(int(owner["pid"]), int(owner["start_ticks"])).alive

    def _watch(self, owner: ProcessId) -> None:
        """In a session of its own, so that what kills the owner's process group does not reach it."""
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.ledger", str(self.folder), str(owner.pid)],
            cwd=REPOSITORY,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _stop_watching(self) -> None:
        if self._watcher:
            self._watcher.kill()
            self._watcher.wait()
            self._watcher = None


def sweep() -> None:
    """Undo what owners left that were killed together with their watchers."""
    for folder in _parent().glob(f"{_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # another process sweeps too
            if folder.stat().st_uid == os.geteuid() and Ledger(folder).abandoned():
                Ledger(folder).undo()


def _parent() -> Path:
    """On disk by convention, where /tmp is often memory: images weigh gigabytes."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")


def _end_process(entry: dict[str, int | str]) -> None:
    ProcessId(int(entry["pid"]), int(entry["start_ticks"])).end()


def _delete_interface(entry: dict[str, int | str]) -> None:
    here = Path(f"/sys/class/net/{entry['name']}")
    done = run(["ip", "link", "delete", str(entry["name"])], check=False)
    if here.exists():
        raise CommandFailed(f"`ip link delete {entry['name']}`: {tail(done.stderr)}")


def _remove_cgroup(entry: dict[str, int | str]) -> None:
    """Removable once the kernel has buried the processes in it, which takes a moment after they were killed."""
    for top in cgroup_folders(str(entry["name"])):
        wait_until(lambda top=top: _removed(top), timeout_seconds=30, what=f"cgroup {top} is empty")  # type: ignore[misc]


def _removed(top: Path) -> bool:
    for folder, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    return not top.exists()


def _deleted(folder: Path) -> bool:
    """Not at once where the kernel still takes down the mounts of a dead node."""
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def cgroup_folders(name: str) -> list[Path]:
    """A cgroup of this name in every hierarchy that is mounted: one with cgroup v2, one a controller with v1."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return [Path(mount[1]) / name for mount in mounts if mount[2] in ("cgroup", "cgroup2")]


def _unmount_below(folder: Path) -> None:
    points = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for point in reversed([point for point in points if point.startswith(f"{folder}/")]):
        run(["umount", "--lazy", point], check=False)


def _nothing(entry: dict[str, int | str]) -> None:
    return None


_UNDO: dict[str, Callable[[dict[str, int | str]], None]] = {
    "owner": _nothing,
    "process": _end_process,
    "interface": _delete_interface,
    "cgroup": _remove_cgroup,
}


def _undo_after(folder: Path, owner_pid: int) -> None:
    """The watcher: wait for the owner to end, however it ends, then undo what it left."""
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(owner_pid)], [], [])
    ledger = Ledger(folder)
    if ledger.abandoned():
        ledger.undo()


if __name__ == "__main__":
    _undo_after(Path(sys.argv[1]), int(sys.argv[2]))

"""What processes did, from /proc, and signals to them. For `watchdog` and `guard`."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it ended meanwhile
            found += [each for child in task.read_text().split() for each in descendants(int(child))]
    return found


def processor_seconds(pid: int, *, of_children: bool = False) -> float:
    """Processor time that a process took (proc(5), stat), and its children that have ended if asked. 0: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11 : 15 if of_children else 13])) / os.sysconf("SC_CLK_TCK")


def bytes_moved(pid: int) -> int:
    """Bytes that a process and its children that have ended read and wrote (proc(5), io), but not through sockets.

    0: it is gone, or somebody else's.
    """
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    counted = {key: int(value) for key, _, value in (line.partition(": ") for line in lines)}
    return counted["rchar"] + counted["wchar"]


def bytes_received() -> int:
    """Bytes that came in by all network interfaces but the loopback, as this process sees them (proc(5), net/dev)."""
    try:
        lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    except OSError:
        return 0
    counted = {name.strip(): int(values.split()[0]) for name, _, values in (line.partition(":") for line in lines)}
    return sum(received for name, received in counted.items() if name != "lo")


def send(pid: int, number: signal.Signals) -> None:
    """Send it a signal, if it is there still."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)

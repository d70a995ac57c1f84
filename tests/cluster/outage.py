"""Taking the API server of a running cluster away, and back. After `control_plane`; etcd and all else stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.control_plane import ControlPlane
from tests.cluster.ledger import ProcessId
from tests.cluster.process import start

_NAME = "kube-apiserver"
_BACK_SECONDS = 120


@contextmanager
def api_server_away(plane: ControlPlane) -> Iterator[None]:
    """Killed for as long as the block lasts, so that it says goodbye to nobody; behind the block it is ready again."""
    entry = next(each for each in reversed(plane.ledger.entries("process")) if each["name"] == _NAME)
    process = ProcessId(int(entry["pid"]), int(entry["start_ticks"]))
    # As it was started: the same address, so that whoever knew it finds it again.
    command = Path(f"/proc/{process.pid}/cmdline").read_text().rstrip("\0").split("\0")
    process.end()
    try:
        yield
    finally:
        again = start(plane.ledger, _NAME, command)
        ready = lambda: plane.kubectl("get", "--raw=/readyz", check=False).returncode == 0  # noqa: E731
        again.wait_until(ready, timeout_seconds=_BACK_SECONDS, what="/readyz")

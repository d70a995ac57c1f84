"""The nursery of attempts: started once, it costs an attempt some milliseconds instead of half a second."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.contract.publishing.attempt import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.contract.publishing.attempt", str(theirs.fileno())]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
    theirs.close()
    yield Nursery(ours)
    ours.close()
    process.wait(10)

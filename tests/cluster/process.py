"""Starting a long-running program of the cluster and waiting until it answers. `ledger` ends it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.errors import CommandFailed
from tests.cluster.ledger import Ledger, ProcessId
from tests.cluster.run import tail, wait_until


@dataclass(frozen=True)
class Process:
    """A program that was started, and where it writes."""

    name: str
    id: ProcessId
    log: Path

    def said(self) -> str:
        """The end of its log, for messages."""
        return f"the end of {self.log}:\n{tail(self.log.read_text(errors='replace'))}"

    def wait_until(self, condition: Callable[[], bool], *, timeout_seconds: float, what: str) -> None:
        """Wait for it to be ready; if it ends before that, say so at once."""

        def met() -> bool:
            if condition():
                return True
            if not self.id.alive:
                raise _Ended
            return False

        try:
            wait_until(met, timeout_seconds=timeout_seconds, what=f"{self.name}: {what}", detail=self.said)
        except _Ended:
            raise CommandFailed(f"{self.name} ended before it was ready ({what}); {self.said()}") from None

    def stop(self) -> None:
        self.id.end(grace_seconds=5)


class _Ended(Exception):
    """Leaves the polling loop, which takes `CommandFailed` for "not yet"."""


def start(ledger: Ledger, name: str, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None) -> Process:
    """Start in a session of its own, so that Ctrl-C in a terminal does not reach it before it is stopped in order."""
    log = ledger.folder / f"{name}.log"
    with log.open("ab") as out:
        started = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=ledger.folder,
            env={**os.environ, **(env or {})},
        )
    started.returncode = 0  # the ledger waits for it; without this, Popen warns of a child that still runs
    id = ProcessId.of(started.pid)
    ledger.note("process", name=name, **vars(id))
    return Process(name, id, log)

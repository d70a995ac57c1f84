"""Running a command to its end, and waiting for a condition. Every other module builds on these two."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tests.cluster.errors import ClusterError, CommandFailed, TimedOut

T = TypeVar("T")


def run(
    command: Sequence[str | Path],
    *,
    input: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    timeout_seconds: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end and keep the output; an error carries the end of it."""
    argv = [str(part) for part in command]
    done = subprocess.run(
        argv,
        input=input,
        stdin=subprocess.DEVNULL if input is None else None,
        capture_output=True,
        text=True,
        env={**os.environ, **env} if env else None,
        cwd=cwd,
        timeout=timeout_seconds,
        check=False,
    )
    if check and done.returncode:
        raise CommandFailed(f"`{shlex.join(argv)}` ended with {done.returncode}:\n{tail(done.stdout + done.stderr)}")
    return done


def tail(text: str, *, num_lines: int = 25) -> str:
    """The last lines, which is where programs say why they stopped."""
    return "\n".join(text.strip().splitlines()[-num_lines:]) or "(it wrote nothing)"


def wait_until(
    condition: Callable[[], T | None],
    *,
    timeout_seconds: float,
    what: str,
    interval_seconds: float = 0.1,
    detail: Callable[[], str] = lambda: "",
) -> T:
    """Poll until `condition` gives something true, and return it.

    `CommandFailed` inside the condition counts as "not yet"; its text is shown if time runs out.
    """
    deadline = time.monotonic() + timeout_seconds
    last = ""
    while True:
        try:
            if seen := condition():
                return seen
        except CommandFailed as exc:
            last = str(exc)
        if time.monotonic() > deadline:
            raise TimedOut("\n".join(filter(None, [f"{what}: not so after {timeout_seconds:g} s", last, detail()])))
        time.sleep(interval_seconds)


def first_line(error: ClusterError) -> str:
    """A reason short enough for a skipped test."""
    return str(error).splitlines()[0]

"""Processes that end when the one that started them is gone, even by SIGKILL; and at once where they have said all."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import sys
from typing import NoReturn

PARENT = "NEXA_PARENT_PROCESS"
"""Variable in which a process tells those that it starts its number."""
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies (Linux; see prctl(2)); elsewhere nothing.

    To be called before anything that takes time is imported: a parent that dies meanwhile would not be missed. Where it
    was gone before, this process ends at once. Process 1 may be a parent as any other, in a pod.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)


def leave(exit_code: int) -> NoReturn:
    """End the process, without waiting for its threads and without taking the interpreter apart.

    A thread of gloo may be the last to let go of a tensor. Where it asks for the GIL while the interpreter is being
    finalised, it ends the process by SIGABRT after all work was done (github.com/pytorch/pytorch/pull/179291 has it).
    Threads that still download, after a stop, would be joined before.
    """
    try:
        atexit._run_exitfuncs()  # temporary folders are removed by these
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(exit_code)

"""Processes that end when the one that started them is gone, even by SIGKILL."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

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

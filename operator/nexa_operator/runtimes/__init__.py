"""RunPlan -> Kubernetes objects and back to facts, one module a runtime; pure. After `plan.py`, before `cluster.py`.

Everything that differs between runtimes is in these modules. `observe.py` asks them what it reads, and nothing
after it knows which one carries the ranks.
"""

from __future__ import annotations

from nexa_operator.reading import Body
from nexa_operator.runtimes import job, jobset, pytorchjob
from nexa_operator.runtimes.base import Runtime, State

__all__ = ["RUNTIMES", "Runtime", "State", "runtime_of"]

RUNTIMES: dict[str, Runtime] = {"job": job, "jobset": jobset, "pytorchjob": pytorchjob}


def runtime_of(body: Body) -> Runtime:
    """The runtime that a NexaTrainingJob asks for; asked before parsing, for children must be seen whatever it says."""
    named = ((body.get("spec") or {}).get("schedule") or {}).get("runtime")
    return RUNTIMES.get(named or "job", RUNTIMES["job"])

"""What is remembered of microbatches that did not fit, for `microbatch_size_per_gpu: auto`.

One object a size, `out-of-memory/SIZE.json` beside the run's checkpoints, so that every node of every later
attempt comes to the same smaller microbatch; `SIZE-attempt-N.json` where the kernel killed the whole container, and
the next attempt notes it. The global batch stays what it is: accumulation makes up for it.
One sequence is never noted: what it needs may be there next time, in more memory or over more ranks.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from nexa_train.artifact.manifest import canonical_json, run_folder
from nexa_train.errors import AlreadyExistsError
from nexa_train.launch.work import RankWork
from nexa_train.store import Store

OOM_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control"))
"""Where the kernel counts the processes that it killed for memory, of this container: cgroup v2, v1."""


def remember_too_large(store: Store, work: RankWork) -> None:
    """Note that this attempt's microbatch ran out of memory."""
    _note(store, work, f"{work.plan.microbatch}.json")


def remember_attempt_too_large(store: Store, work: RankWork, attempt: int) -> None:
    """Note, once, that an earlier attempt ran out of memory with the microbatch that this one was about to take."""
    noted = f"-attempt-{attempt}.json"
    if not any(stored.key.endswith(noted) for stored in store.list(_folder(work.job.run_id))):
        _note(store, work, f"{work.plan.microbatch}{noted}")


def _note(store: Store, work: RankWork, name: str) -> None:
    content = canonical_json({"microbatch": work.plan.microbatch, "world": work.world_facts()})
    with suppress(AlreadyExistsError):  # another node was first
        store.create(f"{_folder(work.job.run_id)}/{name}", content)


def smallest_too_large(store: Store, run_id: str) -> int | None:
    """The smallest microbatch that is known not to fit; None: none is."""
    names = (stored.key.rpartition("/")[2] for stored in store.list(_folder(run_id)))
    return min((int(found[0]) for name in names if (found := re.match(r"\d+", name))), default=None)


def out_of_memory_kills() -> int:
    """How often the kernel has killed a process of this container for memory; 0 where it does not count."""
    for path in OOM_COUNTERS:
        with suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            return int(found[1]) if found else 0
    return 0


def _folder(run_id: str) -> str:
    return f"{run_folder(run_id)}/out-of-memory"

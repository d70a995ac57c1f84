"""How many pods a job goes on with when there is not room for all. Used by `decide.py`; pure, the clock is passed in.

`cluster.minNodes` allows fewer. Where pods of a gang have found no node for `shrinkAfterSeconds`, or a quota has
refused them for as long, the next attempt has as many as found one. While it runs, pods that do nothing but ask for the
same resources (`runtimes/beside.py`) show when there is room again; the gang then commits a checkpoint and goes on with
more. The global batch and the order of samples stay what they were: the trainer shares them out over the ranks that
there are.
"""

from __future__ import annotations

import datetime

from nexa_operator.observe import Gang, Observed
from nexa_train.config.spec import JobSpec

PAUSE_SECONDS = 600.0
"""Between two times that room is kept free of which the job may be able to make nothing."""


def smaller(seen: Observed, gang: Gang, spec: JobSpec, now: datetime.datetime) -> int | None:
    """Pods to go on with instead of those that have no room; None: as it is."""
    if patience_seconds(seen, gang, spec, now) != 0.0:
        return None
    most = min(gang.num_placed, size(seen, spec) - 1)
    return next((nodes for nodes in range(most, least(spec) - 1, -1) if divides(spec, nodes)), None)


def larger(seen: Observed, spec: JobSpec, now: datetime.datetime) -> int | None:
    """Pods to go on with now that there is room for more; None: not yet.

    Room for all is taken at once. Room for some is taken when no more was found for a while, if the job can use it.
    """
    current, full = size(seen, spec), spec.cluster.num_nodes
    if current + seen.room >= full:
        return full
    if not _is_all_there_is(seen, spec, now):
        return None
    return next((nodes for nodes in range(current + seen.room, current, -1) if divides(spec, nodes)), None)


def pause_seconds(seen: Observed, spec: JobSpec, now: datetime.datetime) -> float:
    """How long to ask for no room: there is some, of which the job can make nothing, and others could use it. 0: ask.

    To be asked where `larger` finds nothing.
    """
    if seen.room and _is_all_there_is(seen, spec, now):
        return PAUSE_SECONDS
    since = seen.room_useless_at
    return 0.0 if since is None else max(0.0, PAUSE_SECONDS - (now - since).total_seconds())


def _is_all_there_is(seen: Observed, spec: JobSpec, now: datetime.datetime) -> bool:
    """Whether no more room was found for a while."""
    waited = 0.0 if seen.room_since is None else (now - seen.room_since).total_seconds()
    return waited >= spec.cluster.shrink_after_seconds


def size(seen: Observed, spec: JobSpec) -> int:
    """Pods of the gang on record."""
    return seen.record.num_nodes or spec.cluster.num_nodes


def unplaced_seconds(gang: Gang, now: datetime.datetime) -> float:
    """How long some pods have found no node, all of them; 0: none waits."""
    since = [rank.unplaced_since for rank in gang.ranks if rank.unplaced_since is not None]
    return (now - max(since)).total_seconds() if since else 0.0


def patience_seconds(seen: Observed, gang: Gang, spec: JobSpec, now: datetime.datetime) -> float | None:
    """Until pods without a node, or that may not be made, have waited long enough; None: none waits, or the job may not
    be smaller.

    They stand in line for room that is kept free, and only get it once it is given up.
    """
    waits = [unplaced_seconds(gang, now)] if any(rank.unplaced_since for rank in gang.ranks) else []
    if seen.refusal and gang.begun_at is not None:
        waits.append((now - gang.begun_at).total_seconds())
    if spec.cluster.min_nodes is None or not waits:
        return None
    waited = min(waits)
    if seen.rooms:
        waited = 0.0  # what keeps room free for them is in their way
    elif seen.room_left_at is not None:
        waited = min(waited, (now - seen.room_left_at).total_seconds())
    return max(0.0, spec.cluster.shrink_after_seconds - waited)


def least(spec: JobSpec) -> int:
    """The fewest pods allowed."""
    return spec.cluster.min_nodes or spec.cluster.num_nodes


def divides(spec: JobSpec, nodes: int) -> bool:
    """Whether so many nodes can share out the global batch: what `JobSpec` demands of `cluster.num_nodes`."""
    training, world = spec.training, nodes * spec.cluster.ranks_per_node
    given = [value for value in (training.microbatch_size_per_gpu, training.grad_accumulation_steps) if value != "auto"]
    known = 1
    for value in given:
        known *= int(value)
    if training.global_batch_size % world or (training.global_batch_size // world) % known:
        return False
    return len(given) < 2 or known * world == training.global_batch_size

"""The beats of each node, told to all: ranks that wait while another node restores or saves have not stalled.

Run by the first rank of a node, where there are several nodes, in a thread beside training. Before: ranks write beats
(`RunDir.beat`). After: the launcher's watchdog.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

import torch.distributed as dist

from nexa_train.rundir import RunDir

INTERVAL_SECONDS = 1.0
_KEY = "nexa/beats"
_END_SECONDS = 5.0


@contextmanager
def beats_of_all_nodes(rundir: RunDir, *, local_rank: int, world: int) -> Iterator[None]:
    """Meanwhile, other nodes' beats count here and ours there."""
    if local_rank or int(os.environ.get("LOCAL_WORLD_SIZE", world)) == world:
        yield
        return
    # A connection of its own: training's is locked while a group is made.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))  # type: ignore[attr-defined]
    ended = Event()
    thread = Thread(target=_relay, args=(store.add, rundir, ended), name="beats", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_END_SECONDS)


def _relay(add: Callable[[str, int], int], rundir: RunDir, ended: Event) -> None:
    """Until `ended`. `add` adds to a number that all nodes share, and returns it."""
    told = relayed = theirs = 0
    with suppress(RuntimeError):  # the node that counts is gone: ranks learn that, too
        while not ended.wait(INTERVAL_SECONDS):
            own = rundir.beats() - relayed
            all_nodes = add(_KEY, own - told)
            told = own
            if all_nodes - own > theirs:
                theirs = all_nodes - own
                rundir.beat()
                relayed += 1

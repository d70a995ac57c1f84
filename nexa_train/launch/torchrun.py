"""torchrun, tied to the launcher that started it: `python -m nexa_train.launch.torchrun ARGUMENTS`.

Behind `meet STORE KEY INDEX ADDRESS` as first arguments the nodes meet in the artifact store first (`meeting.py`), and
torchrun is told where.
"""

from __future__ import annotations

import sys
import time

from torch.distributed.run import main

from nexa_train.errors import NexaError
from nexa_train.launch import meeting
from nexa_train.launch.lifeline import die_with_parent
from nexa_train.store import open_store


def met(uri: str, key: str, index: str, address: str) -> list[str]:
    """torchrun's arguments for where node 0 is, and for how long to wait there; see `meeting`."""
    store, began = open_store(uri), time.monotonic()
    if index == "0":
        meeting.say(store, key, address)
    else:
        address = meeting.hear(store, key)
    left = meeting.MEETING_SECONDS - (time.monotonic() - began)
    return [
        f"--rdzv-endpoint={meeting.endpoint(address)}",
        f"--rdzv-conf=timeout={max(meeting.LEAST_SECONDS, left):.0f}",
    ]


if __name__ == "__main__":
    die_with_parent()
    arguments = sys.argv[1:]
    if arguments[0] == meeting.MEET:
        try:
            arguments = [*met(*arguments[1:5]), *arguments[5:]]
        except NexaError as exc:
            sys.exit(f"nexa: {exc}")
    main(arguments)

"""torchrun, tied to the launcher that started it: `python -m nexa_train.launch.torchrun ARGUMENTS`.

Behind `meet STORE KEY INDEX ADDRESS` as first arguments the nodes meet in the artifact store first (`meeting.py`), and
torchrun is told where.
"""

from __future__ import annotations

import os
import sys

from nexa_train.launch.lifeline import PARENT, die_with_parent

if __name__ == "__main__":
    die_with_parent()  # before torch, which takes seconds
    os.environ[PARENT] = str(os.getpid())  # of the ranks

from torch.distributed.run import main

from nexa_train.errors import NexaError
from nexa_train.launch import meeting
from nexa_train.store import open_store

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments[0] == meeting.MEET:
        _, uri, key, index, address, *arguments = arguments
        try:
            arguments = [*meeting.met(open_store(uri), key, int(index), address), *arguments]
        except NexaError as exc:
            sys.exit(f"nexa: {exc}")
    main(arguments)

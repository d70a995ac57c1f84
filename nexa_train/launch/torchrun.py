"""torchrun, tied to the launcher that started it. Run as `python -m nexa_train.launch.torchrun ARGUMENTS`."""

from __future__ import annotations

from torch.distributed.run import main

from nexa_train.launch.lifeline import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    main()

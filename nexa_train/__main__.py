"""`nexa` and `python -m nexa_train`: errors become one clear message and an exit code, here and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Callable

from nexa_train.errors import NexaError


def main() -> int:
    """Run the command line; returns the exit code."""
    from nexa_train.cli import app  # noqa: PLC0415 - `guarded` is also used without the command line

    return guarded(lambda: app(prog_name="nexa"))  # ends by SystemExit: 2 for an unknown option or command


def guarded(command: Callable[[], object]) -> int:
    """Call `command`; its NexaError is printed to stderr, a line a problem, and gives the exit code."""
    try:
        result = command()
    except NexaError as exc:
        for line in str(exc).splitlines():
            print(f"nexa: error: {line}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())

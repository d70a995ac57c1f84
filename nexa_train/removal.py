"""The process of a pod that deletes a run: `python -m nexa_train.removal`, for jobs with deletionPolicy Delete.

Reads the job from its environment as the entrypoint does. Nobody may be writing there any more.
"""

from __future__ import annotations

import os
import sys

from nexa_train.artifact.retention import remove_run
from nexa_train.config.protocol import Termination
from nexa_train.entrypoint import end, read_job
from nexa_train.errors import NexaError
from nexa_train.store import open_store


def main() -> int:
    """Delete the run; returns the exit code."""
    run_id = ""
    try:
        job = read_job(os.environ)
        run_id = job.run_id
        count = remove_run(open_store(job.spec.artifacts.uri), run_id)
    except NexaError as exc:
        cause = type(exc).__name__
        return end(Termination(run_id=run_id, exit_code=exc.exit_code, cause=cause, message=str(exc)))
    return end(Termination(run_id=run_id, exit_code=0, cause="Removed", message=f"{count} objects"))


if __name__ == "__main__":
    sys.exit(main())

"""Which keys of a job its training reads: `python -m tests.training.reads JOB FOLDER` prints them as JSON.

In a process of its own, because libraries leave much behind in theirs. Writing a model out, comparing it, and the look
whether a key is supported do not count: only what is read as an attribute.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from nexa_train import rank
from nexa_train.config.base import Strict
from nexa_train.config.load import load_job
from nexa_train.launch import node as launcher
from nexa_train.launch.node import Node, make_ready
from nexa_train.rundir import RunDir

seen: set[tuple[type, str]] = set()


def _recorded(self: Strict, name: str) -> Any:
    if name in type(self).model_fields:
        seen.add((type(self), name))
    return object.__getattribute__(self, name)


def main(job_file: Path, folder: Path) -> None:
    """Train, and print every GROUP.KEY that was read."""
    job, rundir = load_job(job_file), RunDir(folder)
    launcher.check_supported(job.spec)
    launcher.check_supported = lambda spec: None
    Strict.__getattribute__ = _recorded  # type: ignore[method-assign]
    rundir.write_run(make_ready(job, Node()).to_dict())
    code = rank.main(str(folder))
    del Strict.__getattribute__
    assert code == 0, rundir.read_outcomes()
    groups = ((name, getattr(job.spec, name)) for name in type(job.spec).model_fields)
    keys = [
        f"{name}.{key}"
        for name, group in groups
        if isinstance(group, Strict)
        for key in type(group).model_fields
        if (type(group), key) in seen
    ]
    print(json.dumps(keys))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""The folder through which the launcher and the ranks of one attempt on one node talk: small JSON files.

    run.json             what the ranks are to do (launcher -> ranks)
    stop                 exists: commit a checkpoint and end (launcher -> ranks)
    stop-ranks           the same, but said to a rank by a signal: it ends these ranks, not those that may follow
    progress.json        `protocol.Progress` of this node (local rank 0 -> launcher)
    beats                one byte for everything that ranks got done (ranks -> launcher)
    outcome-RANK.json    `protocol.Termination` of a rank that failed (ranks -> launcher)
    stacks-RANK-PROCESS  what a rank did when it was asked, once nothing moved any more (ranks -> launcher)
    warnings             what a person should read (ranks -> launcher)
    save-STEP-RANK, restore   files of a checkpoint on their way to or from the store (ranks alone)
    lock                 locked while a launcher uses the folder; the lock ends with its process (launchers alone)

Files are replaced in one rename, so a reader never sees half of one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from nexa_train.config.protocol import Progress, Termination


@dataclass(frozen=True)
class RunDir:
    """See the module."""

    path: Path

    @contextmanager
    def held(self, siblings: str) -> Iterator[None]:
        """Keep this folder for us meanwhile, and drop the tensors of those beside it that nobody holds any more.

        Args:
            siblings: a pattern for the names of run folders beside this one.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / "lock").open("wb") as lock:
            with suppress(OSError):  # a file system without locks is not swept either
                fcntl.flock(lock, fcntl.LOCK_EX)
            for folder in self.path.parent.glob(siblings):
                if folder != self.path:
                    RunDir(folder)._drop_abandoned_tensors()
            yield

    def write_run(self, document: dict[str, Any]) -> Path:
        """Hand the ranks their work and forget what earlier ones told. A stop that was asked for stays asked for."""
        self.path.mkdir(parents=True, exist_ok=True)
        told = [self.path / name for name in ("progress.json", "beats", "warnings")]
        for path in [*told, *self.path.glob("outcome-*.json"), *self.path.glob("stacks-*")]:
            path.unlink(missing_ok=True)
        _replace(self.path / "run.json", json.dumps(document))
        return self.path / "run.json"

    def read_run(self) -> dict[str, Any]:
        """What `write_run` wrote."""
        return dict(json.loads((self.path / "run.json").read_text(encoding="utf-8")))

    def ask_to_stop(self, name: str = "stop") -> None:
        """Have the ranks commit a checkpoint after the current step and end."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / name).touch()

    def forget_ranks_stop(self) -> None:
        """Let other ranks follow those that were ended by a signal; what the launcher was asked stays asked for."""
        (self.path / "stop-ranks").unlink(missing_ok=True)

    def stop_on_signals(self, *, of_a_rank: bool = False) -> None:
        """SIGTERM and Ctrl-C ask to stop from now on; nothing is torn down in the handler.

        Args:
            of_a_rank: torchrun sends SIGTERM to the ranks that are left when one has failed, which says nothing about
                those that the launcher may start next.
        """

        def ask(_signal: int, _frame: FrameType | None) -> None:
            self.ask_to_stop("stop-ranks" if of_a_rank else "stop")

        signal.signal(signal.SIGTERM, ask)
        signal.signal(signal.SIGINT, ask)

    def stop_asked(self) -> bool:
        """Whether these ranks are to stop: the launcher was asked, or one of them by a signal."""
        return self.launcher_stop_asked() or (self.path / "stop-ranks").exists()

    def launcher_stop_asked(self) -> bool:
        """Whether whoever stands before the launcher wants it to end; torchrun, for one, stops ranks alone."""
        return (self.path / "stop").exists()

    def saving(self, step: int, rank: int) -> Path:
        """Where a rank writes its files of a checkpoint before they are published."""
        return self.path / f"save-{step}-{rank}"

    @property
    def restoring(self) -> Path:
        """Where the files of the checkpoint to go on from are fetched to."""
        return self.path / "restore"

    def drop_tensors(self) -> None:
        """Remove what ranks that were killed left of both; they may be many gigabytes."""
        for folder in [*self.path.glob("save-*"), self.restoring]:
            shutil.rmtree(folder, ignore_errors=True)

    def _drop_abandoned_tensors(self) -> None:
        """See `drop_tensors`; nothing where somebody holds the folder, it is somebody else's, or it has no lock."""
        with suppress(OSError):
            found = self.path.lstat()  # no link: in a folder for all, it may be anybody's and lead anywhere
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                return
            with (self.path / "lock").open("r+b") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.drop_tensors()

    def write_progress(self, progress: Progress) -> None:
        """Publish where this node stands."""
        _replace(self.path / "progress.json", progress.model_dump_json())

    def read_progress(self) -> Progress | None:
        """Where this node stands, with the seconds since it last said so; None: it said nothing yet."""
        path = self.path / "progress.json"
        try:
            text, written = path.read_text(encoding="utf-8"), path.stat().st_mtime
        except FileNotFoundError:
            return None
        silent = round(max(0.0, time.time() - written), 3)
        return Progress.model_validate_json(text).model_copy(update={"seconds_since_last_step": silent})

    def beat(self) -> None:
        """Something was done: a step, a batch of the validation split, a file of a checkpoint."""
        with (self.path / "beats").open("ab", buffering=0) as file:  # bytes of several processes all stay
            file.write(b".")

    def beats(self) -> int:
        """How often `beat` was called; a number that stands still tells of a stall without any clock."""
        try:
            return (self.path / "beats").stat().st_size
        except FileNotFoundError:
            return 0

    def own_stacks(self, rank: int) -> Path:
        """Where this process, a rank, writes its stacks when it is asked."""
        return self.path / f"stacks-{rank}-{os.getpid()}"

    def stacks(self) -> list[Path]:
        """Where each rank does, by rank."""
        return sorted(self.path.glob("stacks-*"), key=lambda path: int(path.name.split("-")[1]))

    def warn(self, message: str) -> None:
        """Tell the person at the launcher, of this node, one line."""
        with (self.path / "warnings").open("a", encoding="utf-8") as file:
            file.write(f"{message}\n")

    def warnings(self) -> list[str]:
        """All that `warn` told so far."""
        path = self.path / "warnings"
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []

    def write_outcome(self, rank: int, outcome: Termination) -> None:
        """A rank's last words; the first ones stay."""
        path = self.path / f"outcome-{rank}.json"
        if not path.exists():
            _replace(path, outcome.model_dump_json())

    def read_outcomes(self) -> list[Termination]:
        """Last words of this node's ranks, first spoken first: the one that failed first is the cause."""
        paths = sorted(
            self.path.glob("outcome-*.json"),
            key=lambda path: (path.stat().st_mtime_ns, int(path.stem.rpartition("-")[2])),
        )
        return [Termination.model_validate_json(path.read_text(encoding="utf-8")) for path in paths]


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)

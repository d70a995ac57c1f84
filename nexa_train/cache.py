"""Where costly results are kept between runs: outside every project, shared by them all."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nexa_train.errors import ConfigError, NexaError, is_for_good

ABANDONED_SECONDS = 24 * 3600
"""A half-made folder in which nothing was written for so long belongs to a process that was killed."""


def cache_folder(*parts: str) -> Path:
    """`$NEXA_CACHE`, else `$XDG_CACHE_HOME/nexa`, else `~/.cache/nexa`, and below; made if absent.

    Raises:
        ConfigError: it cannot be there. NexaError: its disk has no room for it, or fails.
    """
    root = os.environ.get("NEXA_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nexa"
    )
    folder = Path(root, *parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        kind = ConfigError if is_for_good(exc) or exc.errno in (errno.EEXIST, errno.EROFS) else NexaError
        said = f"{folder} cannot be made: {exc.strerror}; set NEXA_CACHE to a folder where you may write"
        raise kind(said) from exc
    return folder


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """Yield a folder to fill that becomes `target` in one rename, or disappears if the body fails.

    Two processes may fill the same target at once: the first to finish wins, and both see whole content. What
    killed processes left half-made beside it is removed once it is old.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep(target.parent)
    draft = _beside(target)
    draft.mkdir()
    try:
        yield draft
        _write_out(draft)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a folder that `made_whole` made, in one moment for whoever looks for it."""
    doomed = _beside(folder)
    with suppress(FileNotFoundError):  # another process was faster
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _write_out(folder: Path) -> None:
    """Onto the disk with all of it: a name that outlives a power cut must not stand for files that did not."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def _sweep(folder: Path) -> None:
    for draft in folder.glob(".*.????????"):
        with suppress(FileNotFoundError):  # it was finished, or swept by another
            touched = max(path.stat().st_mtime for path in (draft, *draft.rglob("*")))
            if time.time() - touched > ABANDONED_SECONDS:
                shutil.rmtree(draft, ignore_errors=True)

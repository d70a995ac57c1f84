"""Where costly results are kept between runs: outside every project, shared by them all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """`$NEXA_CACHE`, else `$XDG_CACHE_HOME/nexa`, else `~/.cache/nexa`, and below; made if absent."""
    root = os.environ.get("NEXA_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "nexa"
    )
    folder = Path(root, *parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def made_whole(target: Path) -> Iterator[Path]:
    """Yield a folder to fill that becomes `target` in one rename, or disappears if the body fails.

    Two processes may fill the same target at once: the first to finish wins, and both see whole content.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        yield draft
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)

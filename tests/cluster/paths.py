"""Where things are: the repository, the cache that outlives runs, the state of a cluster that is up."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def cache_folder() -> Path:
    """The user's cache; only the first run pays for what lies in it."""
    if chosen := os.environ.get("NEXA_CACHE"):
        return Path(chosen)
    return _xdg("XDG_CACHE_HOME", ".cache") / "nexa"


def state_folder() -> Path:
    """Where `up` leaves the kubeconfig, the exports and the way to what it started."""
    return _xdg("XDG_STATE_HOME", ".local/state") / "nexa" / "cluster"


def _xdg(variable: str, below_home: str) -> Path:
    chosen = os.environ.get(variable)
    return Path(chosen) if chosen else Path.home() / below_home

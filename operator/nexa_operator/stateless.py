"""kopf without memory: nothing is kept on objects, nothing is copied to compare. Used by `main.py`.

kopf can remember in annotations what it has handled, and to that end copies every object of every event twice.
Only `on.event` is used here, which remembers nothing; the copies were half of the operator's time.
"""

from __future__ import annotations

from typing import Any

import kopf


class NoEssence(kopf.DiffBaseStorage):
    """Nothing to compare an object with."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        return None


class NoProgress(kopf.ProgressStorage):
    """Nothing in progress between two events."""

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        return None

    def purge(self, **_: Any) -> None:
        return None

    def touch(self, **_: Any) -> None:
        return None

    def clear(self, *, essence: Any) -> Any:
        return essence

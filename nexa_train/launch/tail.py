"""The end of what ranks wrote, kept by the process that outlives them: killed ones leave nothing else behind."""

from __future__ import annotations

import os
from contextlib import suppress
from threading import Thread
from typing import IO

KEPT_BYTES = 2048
_DRAIN_SECONDS = 5.0
"""How long output is waited for once ranks are gone; what they started may hold it open for ever."""


class Tail:
    """Hands on what is written to `sink`, as it comes, and keeps its last lines. Use `with`.

    Args:
        into: a binary stream.
    """

    def __init__(self, into: IO[bytes]) -> None:
        self.into = into
        self._source, sink = os.pipe()
        self.sink: IO[bytes] = os.fdopen(sink, "wb", buffering=0)
        self._kept, self._cut = b"", False
        self._thread = Thread(target=self._pass_on, name="output", daemon=True)

    def __enter__(self) -> Tail:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.sink.close()
        self._thread.join(_DRAIN_SECONDS)

    def text(self) -> str:
        """The last lines, whole ones unless a single one is longer than what is kept."""
        kept = self._kept
        whole_lines = kept.partition(b"\n")[2] if self._cut else kept
        return (whole_lines or kept).decode("utf-8", "replace")

    def _pass_on(self) -> None:
        with os.fdopen(self._source, "rb", buffering=0) as source:
            while chunk := source.read(1 << 16):
                with suppress(OSError):  # nobody reads our output any more; the ranks must not hang for that
                    self.into.write(chunk)
                    self.into.flush()
                whole = self._kept + chunk
                self._kept, self._cut = whole[-KEPT_BYTES:], self._cut or len(whole) > KEPT_BYTES

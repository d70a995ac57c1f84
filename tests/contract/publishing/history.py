"""All that was done to a store, in order, and whether each moment of it was right.

The proxies of a round carry out one write at a time and note it here; so "at every moment" is meant so, not polled.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from nexa_train.artifact.manifest import Manifest
from nexa_train.artifact.steps import StepState, step_states
from nexa_train.store.base import Stored
from tests.cluster.http_proxy import Answer, Request


@dataclass
class History:
    """The objects of one run as the store's answers have it, and what was found to be wrong.

    Attributes:
        root: what comes before the store's keys in a request: `/BUCKET/PREFIX/`.
        visible: by step, every manifest digest under which it was ever committed, in order.
        damaged: digests of manifests whose bytes the test has damaged.
    """

    root: str
    keep_last: int | None
    in_order: bool = True
    objects: dict[str, bytes] = field(default_factory=dict)
    visible: dict[int, list[str]] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)
    _now: dict[int, str] = field(default_factory=dict)
    _turn: threading.Lock = field(default_factory=threading.Lock)

    def around(self, request: Request, carry_out: Callable[[], Answer]) -> Answer:
        """For `FaultProxy`: one write at a time."""
        if not request.writes or not self.in_order:
            return carry_out()
        with self._turn:
            answer = carry_out()
            self._note(request, answer)
            return answer

    def damage(self, key: str, content: bytes, *, of: str) -> None:
        """The test has put other bytes there."""
        self.objects[key] = content
        self.damaged.add(of)

    def states(self) -> list[StepState]:
        """As a listing would show them now."""
        return step_states(Stored(key=key, size=len(content)) for key, content in self.objects.items())

    def _note(self, request: Request, answer: Answer) -> None:
        key = unquote(urlsplit(request.target).path).removeprefix(self.root)
        if request.method == "PUT" and answer.status == 200:
            if key in self.objects:
                self.wrong.append(f"{key} was overwritten")
            self.objects[key] = request.body
        elif request.method == "DELETE" and answer.status == 204:
            self.objects.pop(key, None)
        else:
            return
        self._look(f"after {request.method} {key}")

    def _look(self, when: str) -> None:
        before, self._now = self._now, {}
        for state in self.states():
            if state.committed:
                self._now[state.number] = self._committed(state, when)
        for step in before.keys() - self._now.keys():
            newer = sum(other > step for other in self._now)
            if before[step] not in self.damaged and (self.keep_last is None or newer < self.keep_last):
                self.wrong.append(f"{when}: step {step} ({before[step]}) is gone, and only {newer} newer are there")
        for step in before.keys() & self._now.keys():
            if before[step] != self._now[step]:
                self.wrong.append(f"{when}: step {step} was {before[step]}, is {self._now[step]}")

    def _committed(self, state: StepState, when: str) -> str:
        content = self.objects[state.key]
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self.damaged:
            for entry in Manifest.from_bytes(content).files:
                found = self.objects.get(f"{state.folder}/{entry.object}")
                if found is None or hashlib.sha256(found).hexdigest() != entry.sha256:
                    self.wrong.append(f"{when}: step {state.number} is visible without {entry.object}")
        seen = self.visible.setdefault(state.number, [])
        if digest not in seen:
            seen.append(digest)
        return digest

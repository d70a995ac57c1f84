"""The children of jobs, listed for many jobs at once. Between the reconciler and the cluster.

A list walks through all objects of its namespace, whatever labels it asks for: with one list a look, ten times the
jobs are a hundred times the work. So looks that ask while a list is under way, or was begun a moment ago, share the
next one. Nobody gets an answer that was begun before it asked, and a look alone waits for nobody.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeAlias

from nexa_operator.cluster import Cluster, Object
from nexa_operator.kinds import Kind
from nexa_operator.naming import LABEL_JOB_UID

_MOST_AT_ONCE = 100
"""UIDs of one request: its address must stay shorter than what proxies take, 8 KiB."""

Place: TypeAlias = tuple[Kind, str]
Answer: TypeAlias = asyncio.Future[list[Object]]


@dataclass(kw_only=True)
class Children:
    """For one event loop; not for threads.

    Attributes:
        apart_seconds: from one list to the next of the same kind and namespace, at least, so that more looks share it.
    """

    cluster: Cluster
    apart_seconds: float = 0.1
    _asked: dict[Place, dict[str, Answer]] = field(default_factory=dict)
    _listing: dict[Place, asyncio.Task[None]] = field(default_factory=dict)

    async def of(self, kind: Kind, namespace: str, uid: str) -> list[Object]:
        """All of one job. Raises ApiError."""
        place = (kind, namespace)
        answer: Answer = asyncio.get_running_loop().create_future()
        answer = self._asked.setdefault(place, {}).setdefault(uid, answer)
        if place not in self._listing:
            self._listing[place] = asyncio.create_task(self._answer(place))
        return await answer

    async def _answer(self, place: Place) -> None:
        try:
            while asked := self._asked.get(place):
                now = {uid: asked.pop(uid) for uid in list(islice(asked, _MOST_AT_ONCE))}
                await asyncio.gather(self._list(place, now), asyncio.sleep(self.apart_seconds))
        finally:
            del self._listing[place]
            self._asked.pop(place, None)

    async def _list(self, place: Place, asked: dict[str, Answer]) -> None:
        kind, namespace = place
        try:
            found = _by_uid(await self.cluster.list(kind, namespace, f"{LABEL_JOB_UID} in ({','.join(asked)})"))
        except Exception as exc:  # noqa: BLE001 - it belongs to those who asked
            for answer in asked.values():
                if not answer.done():
                    answer.set_exception(exc)
            return
        for uid, answer in asked.items():
            if not answer.done():
                answer.set_result(found.get(uid, []))


def _by_uid(children: Iterable[Object]) -> dict[str, list[Object]]:
    found: dict[str, list[Object]] = {}
    for child in children:
        found.setdefault(child["metadata"]["labels"][LABEL_JOB_UID], []).append(child)
    return found

"""Looks that list at the same time share a request, and none gets an answer that is older than its question."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nexa_operator.children import Children
from nexa_operator.errors import ApiError
from nexa_operator.kinds import JOBS, PODS, Kind
from nexa_operator.naming import LABEL_JOB_UID

pytestmark = pytest.mark.anyio


class Server:
    """Answers a list with what there was when it began, once it is let go on."""

    def __init__(self) -> None:
        self.there: list[str] = []
        self.asked: list[tuple[str, str]] = []
        self.refusal: ApiError | None = None
        self.go_on = asyncio.Event()

    async def list(self, kind: Kind, namespace: str, labels: str = "") -> list[dict[str, Any]]:
        self.asked.append((kind.plural, labels))
        there = list(self.there)
        await self.go_on.wait()
        if self.refusal:
            raise self.refusal
        return [{"metadata": {"labels": {LABEL_JOB_UID: uid}}} for uid in there if uid in labels]


async def begin(*lists: Any) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(each) for each in lists]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_who_asks_during_a_list_shares_the_next_and_sees_what_came_meanwhile() -> None:
    server = Server()
    children = Children(cluster=server)  # type: ignore[arg-type]
    first = await begin(children.of(PODS, "team", "a"))
    server.there = ["a", "b", "b", "c"]
    others = await begin(*(children.of(PODS, "team", uid) for uid in "bcd"))
    assert server.asked == [("pods", f"{LABEL_JOB_UID} in (a)")]
    server.go_on.set()
    found = [len(await task) for task in (*first, *others)]
    assert found == [0, 2, 1, 0]
    assert server.asked[1:] == [("pods", f"{LABEL_JOB_UID} in (b,c,d)")]


async def test_who_asks_soon_after_a_list_shares_the_next_and_who_asks_first_does_not_wait() -> None:
    server = Server()
    server.there = [*"abc"]
    server.go_on.set()
    children = Children(cluster=server, apart_seconds=1.0)  # type: ignore[arg-type]
    begun = asyncio.get_running_loop().time()
    first = await begin(children.of(PODS, "team", "a"))
    assert [labels for _, labels in server.asked] == [f"{LABEL_JOB_UID} in (a)"]
    await asyncio.gather(*first)
    others = [*await begin(children.of(PODS, "team", "b")), *await begin(children.of(PODS, "team", "c"))]
    assert [len(await task) for task in others] == [1, 1]
    assert [labels for _, labels in server.asked[1:]] == [f"{LABEL_JOB_UID} in (b,c)"]
    assert asyncio.get_running_loop().time() - begun >= children.apart_seconds


async def test_other_kinds_and_namespaces_do_not_wait() -> None:
    server = Server()
    children = Children(cluster=server)  # type: ignore[arg-type]
    tasks = await begin(*(children.of(kind, place, "a") for kind in (JOBS, PODS) for place in ("team", "other")))
    assert len(server.asked) == 4
    server.go_on.set()
    await asyncio.gather(*tasks)


async def test_a_refusal_reaches_all_who_asked_and_nobody_after_them() -> None:
    server = Server()
    children = Children(cluster=server)  # type: ignore[arg-type]
    server.go_on.set()
    server.refusal = ApiError("GET", status=500, message="no")
    tasks = await begin(*(children.of(PODS, "team", uid) for uid in "ab"))
    for task in tasks:
        with pytest.raises(ApiError):
            await task
    server.refusal, server.there = None, ["a"]
    assert len(await children.of(PODS, "team", "a")) == 1


async def test_one_who_gave_up_does_not_spoil_the_answers_of_the_others() -> None:
    server = Server()
    children = Children(cluster=server)  # type: ignore[arg-type]
    gone, stays = await begin(children.of(PODS, "team", "a"), children.of(PODS, "team", "b"))
    gone.cancel()
    server.there = ["b"]
    server.go_on.set()
    assert await stays == []
    assert len(await children.of(PODS, "team", "b")) == 1


async def test_a_request_asks_for_no_more_than_an_address_can_hold() -> None:
    server = Server()
    children = Children(cluster=server)  # type: ignore[arg-type]
    tasks = await begin(*(children.of(PODS, "team", f"u{number}") for number in range(250)))
    server.go_on.set()
    await asyncio.gather(*tasks)
    assert [labels.count(",") + 1 for _, labels in server.asked] == [100, 100, 50]

"""Who holds the Lease stops before anybody else may begin."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from nexa_operator.errors import ApiError
from nexa_operator.kinds import Kind
from nexa_operator.leadership import GIVE_UP_SECONDS, Lease, lead_forever

pytestmark = pytest.mark.anyio


class Server:
    """Each request takes as long as told, and is answered or not."""

    def __init__(self, *answers: tuple[float, bool]) -> None:
        self.seconds, self._answers = 100.0, iter(answers)
        self.asked = asyncio.Event()

    async def read(self, kind: Kind, namespace: str, name: str) -> dict[str, Any] | None:
        seconds, answered = next(self._answers, (0.0, False))
        self.seconds += seconds
        self.asked.set()
        if not answered:
            raise ApiError("get", status=0, message="no answer")
        return None

    async def create(self, kind: Kind, body: dict[str, Any]) -> bool:
        return True

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexa_operator.leadership.RETRY_SECONDS", 0)


async def held_after(*answers: tuple[float, bool]) -> bool:
    server, gate = Server(*answers), asyncio.Event()
    lease = Lease(cluster=server, namespace="n", name="nexa", identity="me", clock=server)  # type: ignore[arg-type]
    leading = asyncio.create_task(lead_forever(lease, gate=gate))
    for _ in answers:
        await server.asked.wait()
        server.asked.clear()
    await asyncio.sleep(0)
    held = gate.is_set()
    leading.cancel()
    return held


async def test_time_that_the_server_took_to_answer_is_time_that_the_lease_has_run() -> None:
    assert await held_after((4.0, True), (GIVE_UP_SECONDS - 4.0, False))
    assert not await held_after((4.0, True), (GIVE_UP_SECONDS - 3.5, False))


async def test_a_lease_that_is_renewed_is_held() -> None:
    assert await held_after((4.0, True), (4.0, True), (4.0, True), (3.0, False))

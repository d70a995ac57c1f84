"""Each object at most once in the queue and with at most one worker."""

from __future__ import annotations

import asyncio

import pytest

from nexa_operator.workqueue import LONGEST_DELAY_SECONDS, SOON_SECONDS, WorkQueue

pytestmark = pytest.mark.anyio


async def soon(queue: WorkQueue[str]) -> str | None:
    try:
        return await asyncio.wait_for(queue.take(), 0.05)
    except TimeoutError:
        return None


async def test_a_hundred_changes_are_one_look():
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(100):
        queue.add("a")
    assert len(queue) == 1
    assert await soon(queue) == "a"
    assert await soon(queue) is None


async def test_a_change_during_a_look_is_looked_at_afterwards_and_not_at_the_same_time():
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    assert await soon(queue) == "a"
    queue.add("a")
    assert await soon(queue) is None
    queue.done("a")
    assert await soon(queue) == "a"


async def test_objects_are_taken_in_the_order_in_which_they_came():
    queue: WorkQueue[str] = WorkQueue()
    for key in "abcab":
        queue.add(key)
    assert [await soon(queue) for _ in range(4)] == ["a", "b", "c", None]


async def test_a_worker_that_waits_is_woken():
    queue: WorkQueue[str] = WorkQueue()
    waiting = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.add("a")
    assert await asyncio.wait_for(waiting, 1) == "a"


async def test_what_comes_within_a_moment_is_one_look_and_it_is_not_put_off_by_what_comes_later():
    queue: WorkQueue[str] = WorkQueue()
    begun, looked = asyncio.get_running_loop().time(), asyncio.create_task(queue.take())
    for _ in range(20):
        queue.add_soon("a")
        await asyncio.sleep(SOON_SECONDS / 6)
        if looked.done():
            break
    assert looked.done(), "while more came"
    assert asyncio.get_running_loop().time() - begun > SOON_SECONDS / 2
    queue.done("a")
    assert await asyncio.wait_for(soon(queue), 1) is None


async def test_a_look_before_the_moment_is_over_has_seen_it_and_what_comes_during_a_look_is_looked_at_after_it():
    queue: WorkQueue[str] = WorkQueue()
    queue.add_soon("a")
    queue.add("a")
    assert await soon(queue) == "a"
    await asyncio.sleep(1.5 * SOON_SECONDS)
    queue.done("a")
    assert await soon(queue) is None
    queue.add("a")
    assert await soon(queue) == "a"
    queue.add_soon("a")
    queue.done("a")
    assert await asyncio.wait_for(queue.take(), 1) == "a"


async def test_a_cancelled_appointment_is_not_kept_and_another_can_be_made():
    queue: WorkQueue[str] = WorkQueue()
    queue.cancel("a")
    queue.add_after("a", 0.01)
    queue.add_soon("a")
    queue.cancel("a")
    await asyncio.sleep(1.5 * SOON_SECONDS)
    assert await soon(queue) is None
    queue.add_after("a", 0.01)
    assert await soon(queue) == "a"


async def test_the_earlier_of_two_appointments_counts():
    queue: WorkQueue[str] = WorkQueue()
    queue.add_after("a", 60)
    queue.add_after("a", 0.01)
    queue.add_after("a", 60)
    assert await asyncio.wait_for(queue.take(), 1) == "a"


async def test_failures_wait_longer_each_time_up_to_a_limit_and_success_forgets_them():
    queue: WorkQueue[str] = WorkQueue()
    delays = [queue.add_again("a") for _ in range(30)]
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays[-1] == LONGEST_DELAY_SECONDS
    queue.forget_failures("a")
    assert queue.add_again("a") == 0.5


async def test_a_failure_is_not_looked_at_again_as_soon_as_if_nothing_had_failed():
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(3):
        queue.add_after("a", 0.01)
        queue.add_again("a")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(queue.take(), 0.5)

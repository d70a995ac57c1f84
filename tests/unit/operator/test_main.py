"""kopf's end: in order, given up, or never."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any

import pytest

from nexa_operator.errors import WatchError
from nexa_operator.main import collect_seldom, run_until_wound_down

pytestmark = pytest.mark.anyio


class Anew(BaseException):
    """The process would be another one now."""


def begin_anew() -> None:
    raise Anew


async def fails() -> None:
    raise OSError("the watch said 500")


async def stays(release: asyncio.Event) -> None:
    """As kopf's watcher that is not cancelled."""
    while not release.is_set():
        try:
            await release.wait()
        except asyncio.CancelledError:
            continue


async def wind_down(tasks: list[asyncio.Task[None]]) -> None:
    """As kopf does it: when one has ended, the others are cancelled, and waited for as long as it takes."""
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()


async def begun(*coroutines: Coroutine[Any, Any, None]) -> tuple[list[asyncio.Task[None]], asyncio.Task[None]]:
    tasks = [asyncio.create_task(each) for each in coroutines]
    return tasks, asyncio.create_task(wind_down(tasks))


async def test_one_that_gives_up_and_winds_down_is_told_of() -> None:
    tasks, running = await begun(fails(), asyncio.sleep(60))
    with pytest.raises(WatchError) as caught:
        await run_until_wound_down(tasks, running, begin_anew=begin_anew)
    assert isinstance(caught.value.__cause__, OSError)


async def test_one_that_gives_up_and_never_winds_down_is_replaced() -> None:
    release = asyncio.Event()
    tasks, running = await begun(fails(), stays(release))
    with pytest.raises(Anew):
        await run_until_wound_down(tasks, running, limit_seconds=0.1, begin_anew=begin_anew)
    release.set()
    await asyncio.wait([running])
    assert isinstance(running.exception(), OSError)


async def test_one_that_ends_on_a_signal_is_waited_for_and_not_replaced() -> None:
    release = asyncio.Event()
    tasks, running = await begun(asyncio.sleep(0), stays(release))
    asyncio.get_running_loop().call_later(0.5, release.set)
    await run_until_wound_down(tasks, running, limit_seconds=0.1, begin_anew=begin_anew)
    assert running.done()


async def test_where_it_is_not_wanted_any_more_it_ends_first() -> None:
    tasks, running = await begun(asyncio.sleep(60))
    watching = asyncio.create_task(run_until_wound_down(tasks, running, begin_anew=begin_anew))
    await asyncio.sleep(0)
    watching.cancel()
    await asyncio.wait([watching])
    assert watching.cancelled()
    assert running.done()


def test_the_collector_is_spared() -> None:
    before = gc.get_threshold()
    try:
        collect_seldom()
        assert gc.get_threshold()[0] > before[0]
        assert gc.get_freeze_count() > 0
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()

"""What a pod says about its progress, read from a real HTTP server."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest

from nexa_operator.progress import MISSES_UNTIL_UNKNOWN, ProgressReader, Target
from nexa_train.config.protocol import PROGRESS_PORT, Progress

pytestmark = pytest.mark.anyio

TARGET = Target(ip="127.0.0.1", run_id="r", attempt=1)


class Pod:
    """Answers with `answer`; None: breaks the connection off; an iterator: part by part, as slowly as it likes."""

    answer: Any = None
    status: int = 200
    headers: dict[str, str] = {}
    cookie: str | None = None
    """The last that it was sent."""
    port: int = 0


@pytest.fixture
def pod() -> Iterator[Pod]:
    pod = Pod()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if pod.answer is None:
                self.close_connection = True
                return
            pod.cookie = self.headers["Cookie"]
            self.send_response(pod.status)
            for name, value in pod.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if isinstance(pod.answer, Iterator):
                with suppress(OSError):
                    for part in pod.answer:
                        self.wfile.write(part)
                        self.wfile.flush()
                return
            self.wfile.write(pod.answer if isinstance(pod.answer, bytes) else json.dumps(pod.answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pod.port = server.server_address[1]
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield pod
    server.shutdown()
    server.server_close()


@asynccontextmanager
async def reading(pod: Pod, news: list[str]) -> AsyncIterator[ProgressReader[str]]:
    """A reader whose requests to the pod's port go to the server of this test."""

    class ToPod(httpx.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            assert (request.url.port, request.url.path) == (PROGRESS_PORT, "/progress")
            request.url = request.url.copy_with(port=pod.port)
            return await super().handle_async_request(request)

    async with ToPod() as transport:
        yield ProgressReader(on_news=news.append, transport=transport)


async def test_news_wakes_the_reconciler_and_the_same_again_does_not(pod):
    news: list[str] = []
    pod.answer = {"run_id": "r", "attempt": 1, "step": 5}
    async with reading(pod, news) as reader:
        reader.watch("job", TARGET)
        await reader.read("job")
        await reader.read("job")
        assert reader.latest("job").step == 5
        assert news == ["job"]


@pytest.mark.parametrize("location", ["mailto:x", "http://[", "http://127.0.0.1:1/", "\xff", None])
async def test_where_a_pod_redirects_to_is_not_looked_at(pod, location):
    news: list[str] = []
    pod.answer, pod.status = {"run_id": "r", "attempt": 1, "step": 5}, 302
    pod.headers = {"Location": location} if location else {}
    async with reading(pod, news) as reader:
        reader.watch("job", TARGET)
        await reader.read("job")
        assert reader.latest("job") is None


async def test_nothing_of_an_answer_is_kept_but_progress(pod):
    pod.answer, pod.headers = {"run_id": "r", "attempt": 1, "step": 5}, {"Set-Cookie": "a=b; Max-Age=1000"}
    async with reading(pod, []) as reader:
        reader.watch("job", TARGET)
        await reader.read("job")
        await reader.read("job")
        assert reader.latest("job").step == 5
        assert pod.cookie is None


@pytest.mark.parametrize(
    "answer",
    [
        {"run_id": "another", "attempt": 1, "step": 5},
        {"run_id": "r", "attempt": 0, "step": 5},
        {"step": 5},
        {"run_id": "r", "attempt": 1, "step": 10**25},
        {"run_id": "r", "attempt": 1, "step": -1},
        b'{"run_id": "r", "attempt": 1, "trained_seconds": 1e400}',
        b"<html>",
        None,
    ],
    ids=[
        "another run on the same address",
        "an older attempt",
        "no run id",
        "a step that no status can hold",
        "a step before the first",
        "seconds without end",
        "no JSON",
        "no answer",
    ],
)
async def test_what_is_not_this_run_s_word_is_no_progress_and_after_some_looks_unknown(pod, answer):
    news: list[str] = []
    pod.answer = answer
    async with reading(pod, news) as reader:
        reader.watch("job", TARGET)
        for _ in range(MISSES_UNTIL_UNKNOWN - 1):
            await reader.read("job")
        assert reader.is_known("job"), "a pod that starts does not answer at once"
        await reader.read("job")
        assert not reader.is_known("job")
        assert reader.latest("job") is None
        assert news == ["job"]


async def test_a_pod_that_answers_again_is_known_again(pod):
    news: list[str] = []
    async with reading(pod, news) as reader:
        reader.watch("job", TARGET)
        for _ in range(MISSES_UNTIL_UNKNOWN):
            await reader.read("job")
        pod.answer = {"run_id": "r", "attempt": 1}
        await reader.read("job")
        assert reader.is_known("job")


async def test_a_new_attempt_forgets_what_the_old_one_said(pod):
    pod.answer = {"run_id": "r", "attempt": 1, "step": 5}
    async with reading(pod, []) as reader:
        reader.watch("job", TARGET)
        await reader.read("job")
        reader.watch("job", Target(ip="127.0.0.1", run_id="r", attempt=2))
        assert reader.latest("job") is None
        reader.forget("job")
        assert reader.is_known("job")


async def test_many_gangs_are_read_side_by_side(pod):
    pod.answer = {"run_id": "r", "attempt": 1, "step": 5}
    news: list[str] = []
    async with reading(pod, news) as reader:
        for index in range(100):
            reader.watch(f"job-{index}", TARGET)
        await asyncio.wait_for(asyncio.gather(*(reader.read(f"job-{index}") for index in range(100))), 20)
    assert len(news) == 100


def drops() -> Iterator[bytes]:
    """Each within any time that a read may take."""
    for _ in range(50):
        time.sleep(0.1)
        yield b" "


async def test_a_pod_that_never_comes_to_an_end_holds_up_nobody(pod, monkeypatch):
    monkeypatch.setattr("nexa_operator.progress._TIMEOUT_SECONDS", 0.3)
    pod.answer = drops()
    async with reading(pod, []) as reader:
        reader.watch("job", TARGET)
        await asyncio.wait_for(reader.read("job"), 2)
        assert reader.latest("job") is None


async def test_of_an_endless_answer_only_so_much_is_read(pod):
    sent = itertools.count()
    pod.answer = (b"x" * 65_536 for _ in iter(lambda: next(sent), 100_000))
    async with reading(pod, []) as reader:
        reader.watch("job", TARGET)
        await reader.read("job")
        assert reader.latest("job") is None
    assert next(sent) < 1_000, "the connection is closed, not drained"


async def test_nothing_is_unpacked(pod):
    pod.headers, pod.answer = {"Content-Encoding": "gzip"}, gzip.compress(b'{"run_id": "r", "attempt": 1}')
    async with reading(pod, []) as reader:
        reader.watch("job", TARGET)
        await reader.read("job")
        assert reader.latest("job") is None


class Street(httpx.AsyncBaseTransport):
    """Pods by address: those in `away` never answer, the others at once. `many`: a hundred pods were asked."""

    def __init__(self, *away: str) -> None:
        self.away, self.asked, self.many = set(away), Counter[str](), asyncio.Event()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked[request.url.host] += 1
        if len(self.asked) >= 100:
            self.many.set()
        if request.url.host in self.away:
            await asyncio.Event().wait()
        said = Progress(run_id="r", attempt=1, step=self.asked[request.url.host])

        async def parts() -> AsyncIterator[bytes]:
            yield said.model_dump_json().encode()

        return httpx.Response(200, content=parts())


def at(ip: str) -> Target:
    return Target(ip=ip, run_id="r", attempt=1)


async def test_pods_out_of_reach_hold_up_none_that_answer(monkeypatch):
    monkeypatch.setattr("nexa_operator.progress._TIMEOUT_SECONDS", 0.5)
    street, heard = Street(*(f"10.0.1.{number}" for number in range(200))), asyncio.Event()
    reader = ProgressReader(on_news=lambda _: heard.set(), transport=street, interval_seconds=0.02)
    reader.watch("healthy", at("10.0.0.1"))
    reading = asyncio.create_task(reader.read_forever())
    async with asyncio.timeout(20):
        await heard.wait()
        for number in range(200):
            reader.watch(f"away-{number}", at(f"10.0.1.{number}"))
        before = street.asked["10.0.0.1"]
        await street.many.wait()  # 32 at once, so for longer than a second
    assert street.asked["10.0.0.1"] >= before + 10
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)


async def test_a_pod_that_does_not_answer_is_asked_ever_less_often_and_one_that_does_as_often_as_before(monkeypatch):
    monkeypatch.setattr("nexa_operator.progress._TIMEOUT_SECONDS", 0.01)
    street, clock = Street("10.0.0.2"), Clock()
    reader = ProgressReader(on_news=lambda _: None, transport=street, clock=clock)
    for key, ip in (("here", "10.0.0.1"), ("away", "10.0.0.2")):
        reader.watch(key, at(ip))
    asked: dict[str, list[int]] = {"here": [], "away": []}
    for second in range(300):
        clock.seconds = second
        for key in list(reader.take_due()):
            asked[key].append(second)
            await reader.read(key)
    assert asked["here"] == list(range(0, 300, 10))
    assert asked["away"] == [0, 10, 20, 40, 80, 140, 200, 260]
    street.away.clear()
    clock.seconds = 320
    assert list(reader.take_due()) == ["here", "away"]
    await reader.read("away")
    clock.seconds = 330
    assert "away" in list(reader.take_due())


async def test_a_gang_is_asked_once_at_a_time():
    reader = ProgressReader(on_news=lambda _: None, transport=Street())
    reader.watch("job", TARGET)
    assert list(reader.take_due()) == ["job"]
    assert list(reader.take_due()) == []
    reader.watch("job", Target(ip="10.0.0.9", run_id="r", attempt=2))
    assert list(reader.take_due()) == ["job"], "another pod"


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

"""A proxy between one operator and the API server: it numbers what the operator does for a job, and strikes as told.

Numbered, each from 1: the writes (POST, PATCH, DELETE) but those of Events and Leases, on which nothing is decided;
the lists and reads of one job; the watch's events about it; the requests that concern all jobs, watches above all.
The operator speaks plain HTTP to the proxy and sends its own token; the proxy speaks TLS to the server.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPResponse, HTTPSConnection
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from nexa_train.config import GROUP, PLURAL
from tests.cluster.api import trust_of
from tests.cluster.cluster import Cluster
from tests.cluster.http_proxy import Answer, Cut, HttpProxy, Request, answer_of, refusal, reset

What = Literal["write", "list", "read", "watch", "event"]
"""Of one job: its writes, its children's lists, its own reads, its events. `watch`: lists and watches of all jobs."""

Fault = Literal[
    "kill before",
    "kill after",  # the operator is killed: the request has not been sent, has been carried out
    "reset before",  # the connection is reset and the server sees nothing
    "lost reply",  # carried out, then the connection is reset
    "no answer",  # carried out, and the client waits for the answer until it gives up
    "401",
    "409",
    "429",
    "500",  # answered so, and the server sees nothing
    "stale",  # answered as an earlier time, when the answer was another; comes about where it ever was another
    "drop",  # the event never arrives
    "delay",  # it and all behind it arrive later
    "freeze",  # from it on the watch stays open and says nothing
    "410",  # the watch says that it cannot go on from where it is
    "error",  # the watch says that something else went wrong
    "torn",  # half of the event arrives, then the connection ends in order
]
FAULTS: dict[What, tuple[Fault, ...]] = {
    "write": ("kill before", "kill after", "reset before", "lost reply", "no answer", "409", "429", "500"),
    "list": ("stale", "reset before", "no answer", "401", "429", "500"),
    "read": ("reset before", "no answer", "500"),
    "watch": ("reset before", "no answer", "401", "429", "500"),
    "event": ("drop", "delay", "freeze", "410", "error", "torn"),
}
"""What can befall what."""

_DELAY_SECONDS = 1.5
_REASONS = {401: "Unauthorized", 409: "Conflict", 410: "Expired", 429: "TooManyRequests", 500: "InternalError"}
_LABEL_UID, _LABEL_NAME = f"{GROUP}/job-uid", f"{GROUP}/job-name"
_OF_JOBS = re.compile(rf"{re.escape(_LABEL_UID)}(?:=(?P<one>[^,()]+)| in \((?P<many>[^()]+)\))")
"""A selector that names jobs by their UIDs; what watches all children asks for the label alone."""
_NOT_FORWARDED = ("host", "connection", "accept-encoding", "content-length")


@dataclass(kw_only=True)
class Story:
    """What is to happen, and what happened, while one job lives.

    Attributes:
        job: name of the NexaTrainingJob; requests for others pass.
        strikes: what befalls the nth of its kind.
        counts: how many there were so far.
        struck: how often which strike came about, at what.
        created: how often the server said 201, by the child's path.
        log: what was asked, in order, and what was done with it.
    """

    job: str
    strikes: Mapping[tuple[What, int], Fault] = field(default_factory=dict)
    counts: Counter[What] = field(default_factory=Counter)
    struck: Counter[tuple[What, Fault]] = field(default_factory=Counter)
    created: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class ApiProxy(HttpProxy):
    """Serves from the moment it is made until `close`; one story at a time.

    Attributes:
        cluster: whose API server it stands before.
        kill: kills the operator.
        story: what happens now.
        watches: requests of watches so far, by resource.
    """

    cluster: Cluster
    kill: Callable[[], None] = lambda: None
    story: Story = field(default_factory=lambda: Story(job=""))
    watches: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        server = urlsplit(self.cluster.server)
        self._server = (server.hostname or "", server.port or 443)
        self._trust: ssl.SSLContext = trust_of(self.cluster)
        self._local = threading.local()
        self._names: dict[str, str] = {}
        self._answers: dict[str, list[Answer]] = {}
        self._counting = threading.Lock()
        self._muted: int = 0
        self.listen()
        self._port = self._listener.getsockname()[1]

    def begin(self, story: Story) -> None:
        """From now on this one counts."""
        self._answers.clear()
        self.story = story

    def go_away(self) -> None:
        """As an API server that ends: connections are closed and refused."""
        self.close()

    def come_back(self) -> None:
        """At the same port."""
        self.listen(self._port)

    def mute(self) -> None:
        """The watches that there are stay open and say nothing any more; new ones speak."""
        self._muted = self.watches.total()

    def one(self, connection: socket.socket, request: Request) -> None:
        what, job = self._kind_of(request)
        fault = self._next(what, job, f"{request.method} {request.target}")
        match fault:
            case "kill before":
                self.kill()
                raise Cut
            case "reset before":
                reset(connection)
            case "401" | "409" | "429" | "500":
                connection.sendall(_status_answer(int(fault)).content)
            case "no answer" if _is_watch(request):
                _wait_until_closed(connection)
            case _:
                with self._asked(request) as response:
                    if _is_watch(request) and response.status == 200:
                        self._stream(connection, request, response)
                    else:
                        self._carry_out(connection, request, response, job, fault)

    def _carry_out(
        self,
        connection: socket.socket,
        request: Request,
        response: HTTPResponse,
        job: str,
        fault: Fault | None,
    ) -> None:
        answer = answer_of(response, request.method)
        self._learn(request, answer, job)
        match fault:
            case "kill after":
                self.kill()
                raise Cut
            case "lost reply":
                reset(connection)
            case "no answer":
                _wait_until_closed(connection)
            case "stale":
                answer = self._earlier(request, answer) or answer
        connection.sendall(answer.content)

    @contextmanager
    def _asked(self, request: Request) -> Iterator[HTTPResponse]:
        """The server's response, over a connection that lasts as long as the client's."""
        watching = _is_watch(request)
        upstream = None if watching else getattr(self._local, "upstream", None)
        upstream = upstream or HTTPSConnection(*self._server, context=self._trust)
        headers = {name: value for name, value in request.headers.items() if name not in _NOT_FORWARDED}
        upstream.request(request.method, request.target, body=request.body or None, headers=headers)
        if not watching:
            self._local.upstream = upstream
            yield upstream.getresponse()
            return
        with self.tracked(upstream.sock):
            yield upstream.getresponse()

    def _stream(self, connection: socket.socket, request: Request, response: HTTPResponse) -> None:
        with self._counting:
            self.watches[_last(request)] += 1
            number = self.watches.total()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head)
        while line := response.readline():
            if number <= self._muted:
                _wait_until_closed(connection)
            self._pass_on(connection, line)
        connection.sendall(b"0\r\n\r\n")

    def _pass_on(self, connection: socket.socket, line: bytes) -> None:
        seen = json.loads(line)
        job = _job_of(seen["object"])
        fault = self._next("event", job, f"{seen['type']} {seen['object'].get('kind')}") if job else None
        match fault:
            case "drop":
                return
            case "delay":
                threading.Event().wait(_DELAY_SECONDS)
            case "freeze":
                _wait_until_closed(connection)
            case "410" | "error":
                error = {"type": "ERROR", "object": _status(410 if fault == "410" else 500)}
                line = json.dumps(error).encode() + b"\n"
            case "torn":
                connection.sendall(_chunk(line[: len(line) // 2]) + b"0\r\n\r\n")
                raise Cut
        connection.sendall(_chunk(line))

    def _next(self, what: What | None, job: str, asked: str) -> Fault | None:
        story = self.story
        if what is None or job != story.job:
            return None
        with self._counting:
            story.counts[what] += 1
            number = story.counts[what]
            fault = story.strikes.get((what, number))
            if fault is not None and fault != "stale":
                story.struck[what, fault] += 1
            story.log.append(f"{what} {number}: {asked}" + (f" <- {fault}" if fault else ""))
        return fault

    def _kind_of(self, request: Request) -> tuple[What | None, str]:
        """What the request counts as, and for which job; a watch counts for whatever job there is."""
        parts = urlsplit(request.target).path.split("/")
        if "events" in parts or "leases" in parts:
            return None, ""
        if request.writes:
            body = json.loads(request.body or b"{}")
            return "write", _job_of(body) or self._job_in(parts)
        if PLURAL in parts[:-1]:
            return "read", parts[-1]
        jobs = [self._names[uid] for uid in _uids_asked_for(request) if uid in self._names]
        if jobs and not _is_watch(request):
            return "list", self.story.job if self.story.job in jobs else jobs[0]
        # What remains is kopf's lists and watches, the list of the resync, and discovery.
        return (None, "") if re.fullmatch(r"v\d\w*|apis?|version", parts[-1]) else ("watch", self.story.job)

    @staticmethod
    def _job_in(parts: list[str]) -> str:
        """Of .../nexatrainingjobs/NAME/status, of .../jobs/NAME-aN, or of one beside that."""
        if PLURAL in parts:
            return parts[parts.index(PLURAL) + 1] if parts[-1] != PLURAL else ""
        return re.sub(r"-(a\d+(-room)?|removal)$", "", parts[-1])

    def _learn(self, request: Request, answer: Answer, job: str) -> None:
        """Whose UID is whose, what was created, and what lists said."""
        if request.method == "GET" and answer.status == 200 and job:
            self._answers.setdefault(request.target, []).append(answer)
            metadata = json.loads(answer.body).get("metadata", {})
            if "uid" in metadata:
                self._names[metadata["uid"]] = metadata["name"]
        if request.method == "POST" and answer.status == 201 and job == self.story.job:
            name = json.loads(request.body)["metadata"]["name"]
            self.story.created[f"{_last(request)}/{name}"] += 1

    def _earlier(self, request: Request, answer: Answer) -> Answer | None:
        """The last one that was another; None: there was none, and nothing is struck."""
        told = self._answers.get(request.target, [])
        others = (old for old in reversed(told) if _items(old) != _items(answer))
        earlier = next(others, None)
        with self._counting:
            self.story.struck["list", "stale"] += earlier is not None
            self.story.log.append("stale" if earlier else "not stale: it never was another")
        return earlier


def _job_of(body: Mapping[str, Any]) -> str:
    """The name of the NexaTrainingJob that an object is or belongs to."""
    metadata = body.get("metadata") or {}
    if body.get("kind") == "NexaTrainingJob":
        return str(metadata.get("name", ""))
    return str((metadata.get("labels") or {}).get(_LABEL_NAME, ""))


def _is_watch(request: Request) -> bool:
    return _query(request).get("watch") == ["true"]


def _uids_asked_for(request: Request) -> list[str]:
    """Of one job or of several, as its selector spells them; none where it asks for no jobs in particular."""
    found = _OF_JOBS.fullmatch(_query(request).get("labelSelector", [""])[0])
    return re.split(r",\s*", found["one"] or found["many"]) if found else []


def _query(request: Request) -> dict[str, list[str]]:
    """Decoded."""
    return parse_qs(urlsplit(request.target).query)


def _last(request: Request) -> str:
    return urlsplit(request.target).path.rpartition("/")[2]


def _items(answer: Answer) -> Any:
    return json.loads(answer.body).get("items")


def _status(code: int) -> dict[str, Any]:
    said = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "by the proxy"}
    return {**said, "reason": _REASONS[code], "code": code}


def _status_answer(code: int) -> Answer:
    return refusal(code, json.dumps(_status(code)).encode(), content_type="application/json")


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _wait_until_closed(connection: socket.socket) -> None:
    """By the client, or by the proxy's own end."""
    while not connection.recv(1):
        raise Cut

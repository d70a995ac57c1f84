"""An HTTP proxy before MinIO that counts requests and does to each what a plan says.

Stands between one client and `MinioServer`; several may stand before one server. General proxies act on bytes and
seconds; a lost reply of one definite request, or a kill between two writes, needs one that knows requests.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPResponse
from typing import Literal

from tests.cluster.http_proxy import (
    PATIENCE_SECONDS,
    Answer,
    Cut,
    HttpProxy,
    Request,
    answer_of,
    refusal,
    reset,
)

Fault = Literal[
    "reset before",  # the connection is reset and the server sees nothing
    "cut request",  # the server gets half of the body, then the connection ends
    "lost reply",  # carried out, then the connection is reset
    "cut answer",  # carried out, half of the answer is given
    "409",
    "412",
    "500",
    "503",
    "403",  # answered so, and the server sees nothing
    "500 after",  # carried out, and answered so all the same
    "slow",  # carried out a little later
    "hold",  # carried out when `release` is called, however late that is
    "unconditional",  # carried out without its If-None-Match, as by a server that ignores it
    "kill before",
    "kill during",
    "kill after",  # the client is killed: it has not been sent, half sent, carried out
]

_CODES = {
    "403": "AccessDenied",
    "409": "ConditionalRequestConflict",
    "412": "PreconditionFailed",
    "500": "InternalError",
    "503": "SlowDown",
}
_SLOW_SECONDS = 0.03

Forward = Callable[[Request, Callable[[], Answer]], Answer]


@dataclass(kw_only=True)
class FaultProxy(HttpProxy):
    """Serves from the moment it is made until `close`.

    Attributes:
        upstream: address and port of the server.
        faults: by the number of the request, counted from 1; by the number of the write if `count_writes`.
        every: what happens to each request that `faults` does not name.
        around: called for each request that is carried out, with what carries it out; tests watch and order here.
        seen: what was asked, in order, and what was done with it.
        holds: set when something is held.
    """

    upstream: tuple[str, int]
    faults: Mapping[int, Fault] = field(default_factory=dict)
    count_writes: bool = False
    every: Fault | None = None
    around: Forward = lambda request, carry_out: carry_out()
    seen: list[str] = field(default_factory=list)
    holds: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._released = threading.Event()
        self._client: int | None = None
        self._known = threading.Event()
        self._count = 0
        self.listen()

    def kills(self, pid: int) -> None:
        """Whom to kill; a request that is to be killed waits until this is known."""
        self._client = pid
        self._known.set()

    def release(self) -> None:
        """Let go what is held."""
        self._released.set()

    def close(self) -> None:
        self.release()
        super().close()

    def one(self, connection: socket.socket, request: Request) -> None:
        fault = self._next(request)
        match fault:
            case "reset before":
                reset(connection)
            case "kill before":
                self._kill()
                raise Cut
            case "cut request" | "kill during":
                self._send_half(request)
                if fault == "kill during":
                    self._kill()
                reset(connection)
            case "403" | "409" | "412" | "500" | "503":
                # Only a conditional request can meet a condition that does not hold.
                unlikely = fault in ("409", "412") and request.method != "PUT"
                connection.sendall(_refusal("503" if unlikely else fault).content)
            case _:
                self._carry_out(connection, request, fault)

    def _carry_out(self, connection: socket.socket, request: Request, fault: Fault | None) -> None:
        if fault == "hold":
            self.holds.set()
            self._released.wait(PATIENCE_SECONDS)
        if fault == "slow":
            threading.Event().wait(_SLOW_SECONDS)
        if fault == "unconditional":
            request = _without_condition(request)
        answer = self.around(request, lambda: self._forward(request))
        match fault:
            case "kill after":
                self._kill()
                raise Cut
            case "lost reply":
                reset(connection)
            case "cut answer":
                whole = answer.content
                connection.sendall(
                    whole[: len(answer.head) + 4 + len(answer.body) // 2 if answer.body else len(whole) // 2]
                )
                raise Cut
            case "500 after":
                connection.sendall(_refusal("500").content)
            case _:
                connection.sendall(answer.content)

    def _next(self, request: Request) -> Fault | None:
        with self._lock:
            counts = request.writes or not self.count_writes
            self._count += counts
            fault = self.faults.get(self._count, self.every) if counts else None
            self.seen.append(f"{request.method} {request.target}" + (f" <- {fault}" if fault else ""))
        return fault

    def _kill(self) -> None:
        self._known.wait(PATIENCE_SECONDS)
        if self._client:
            with suppress(ProcessLookupError):
                os.kill(self._client, signal.SIGKILL)

    def _forward(self, request: Request) -> Answer:
        with socket.create_connection(self.upstream, timeout=PATIENCE_SECONDS) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.sendall(request.head + b"\r\n\r\n" + request.body)
            response = HTTPResponse(server, method=request.method)
            response.begin()
            return answer_of(response, request.method)

    def _send_half(self, request: Request) -> None:
        with socket.create_connection(self.upstream, timeout=PATIENCE_SECONDS) as server:
            whole = request.head + b"\r\n\r\n" + request.body
            server.sendall(whole[: len(whole) - len(request.body) // 2 - 1])


def _refusal(status: str) -> Answer:
    body = f"<Error><Code>{_CODES[status]}</Code><Message>by the proxy</Message></Error>".encode()
    return refusal(int(status), body, content_type="application/xml")


def _without_condition(request: Request) -> Request:
    """As a server sees it that does not know the header. Signatures are over it only if the client signs it."""
    lines = [line for line in request.head.split(b"\r\n") if not line.lower().startswith(b"if-none-match:")]
    return Request(method=request.method, target=request.target, head=b"\r\n".join(lines), body=request.body)

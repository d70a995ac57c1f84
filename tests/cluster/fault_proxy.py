"""An HTTP proxy before MinIO that counts requests and does to each what a plan says.

Stands between one client and `MinioServer`; several may stand before one server. General proxies act on bytes and
seconds; a lost reply of one definite request, or a kill between two writes, needs one that knows requests.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import BinaryIO, Literal

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
_WRITES = ("PUT", "POST", "DELETE")
_SLOW_SECONDS = 0.03
_PATIENCE_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request as it came: its head without the empty line, and its body."""

    method: str
    target: str
    head: bytes
    body: bytes

    @property
    def writes(self) -> bool:
        return self.method in _WRITES


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer as it goes back."""

    status: int
    head: bytes
    body: bytes

    @property
    def content(self) -> bytes:
        return self.head + b"\r\n\r\n" + self.body


Forward = Callable[[Request, Callable[[], Answer]], Answer]


@dataclass(kw_only=True)
class FaultProxy:
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
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._released = threading.Event()
        self._client: int | None = None
        self._known = threading.Event()
        self._count = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def kills(self, pid: int) -> None:
        """Whom to kill; a request that is to be killed waits until this is known."""
        self._client = pid
        self._known.set()

    def release(self) -> None:
        """Let go what is held."""
        self._released.set()

    def close(self) -> None:
        """Returns when nothing is on its way to the server any more."""
        self.release()
        # Without the shutdown, the thread that waits in `accept` would keep the port open.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_PATIENCE_SECONDS)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._tracked(connection), suppress(OSError, HTTPException, _Cut):
            stream = connection.makefile("rb")
            while request := _read_request(stream):
                self._one(connection, request)

    @contextmanager
    def _tracked(self, connection: socket.socket) -> Iterator[None]:
        with self._lock:
            self._open.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _one(self, connection: socket.socket, request: Request) -> None:
        fault = self._next(request)
        match fault:
            case "reset before":
                _reset(connection)
            case "kill before":
                self._kill()
                raise _Cut
            case "cut request" | "kill during":
                self._send_half(request)
                if fault == "kill during":
                    self._kill()
                _reset(connection)
            case "403" | "409" | "412" | "500" | "503":
                # Only a conditional request can meet a condition that does not hold.
                unlikely = fault in ("409", "412") and request.method != "PUT"
                connection.sendall(_refusal("503" if unlikely else fault).content)
            case _:
                self._carry_out(connection, request, fault)

    def _carry_out(self, connection: socket.socket, request: Request, fault: Fault | None) -> None:
        if fault == "hold":
            self.holds.set()
            self._released.wait(_PATIENCE_SECONDS)
        if fault == "slow":
            threading.Event().wait(_SLOW_SECONDS)
        if fault == "unconditional":
            request = _without_condition(request)
        answer = self.around(request, lambda: self._forward(request))
        match fault:
            case "kill after":
                self._kill()
                raise _Cut
            case "lost reply":
                _reset(connection)
            case "cut answer":
                whole = answer.content
                connection.sendall(
                    whole[: len(answer.head) + 4 + len(answer.body) // 2 if answer.body else len(whole) // 2]
                )
                raise _Cut
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
        self._known.wait(_PATIENCE_SECONDS)
        if self._client:
            with suppress(ProcessLookupError):
                os.kill(self._client, signal.SIGKILL)

    def _forward(self, request: Request) -> Answer:
        with socket.create_connection(self.upstream, timeout=_PATIENCE_SECONDS) as server:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            server.sendall(request.head + b"\r\n\r\n" + request.body)
            return _read_answer(server, request.method)

    def _send_half(self, request: Request) -> None:
        with socket.create_connection(self.upstream, timeout=_PATIENCE_SECONDS) as server:
            whole = request.head + b"\r\n\r\n" + request.body
            server.sendall(whole[: len(whole) - len(request.body) // 2 - 1])


class _Cut(Exception):
    """Leaves a connection where it is."""


def _reset(connection: socket.socket) -> None:
    """End it with RST: no FIN, and what was sent may be lost as well."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raise _Cut


def _read_request(stream: BinaryIO) -> Request | None:
    lines = _read_head(stream)
    if not lines:
        return None
    method, target, _ = lines[0].decode().split(" ", 2)
    headers = dict(line.decode("latin-1").lower().split(":", 1) for line in lines[1:])
    size = int(headers.get("content-length", "0"))
    body = stream.read(size)
    if len(body) < size:
        return None  # the client went away in the middle of it
    return Request(method=method, target=target, head=b"\r\n".join(lines), body=body)


def _read_head(stream: BinaryIO) -> list[bytes]:
    lines: list[bytes] = []
    while line := stream.readline():
        if line == b"\r\n":
            return lines
        lines.append(line.rstrip(b"\r\n"))
    return []


def _read_answer(server: socket.socket, method: str) -> Answer:
    response = HTTPResponse(server, method=method)
    response.begin()
    body = response.read()
    kept = [(name, value) for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP]
    if response.status != 204:
        length = response.getheader("content-length", "0") if method == "HEAD" else str(len(body))
        kept.append(("Content-Length", length))
    head = [f"HTTP/1.1 {response.status} {response.reason}", *(f"{name}: {value}" for name, value in kept)]
    return Answer(status=response.status, head="\r\n".join(head).encode("latin-1"), body=body)


_HOP_BY_HOP = ("content-length", "transfer-encoding", "connection", "keep-alive")


def _refusal(status: str) -> Answer:
    body = f"<Error><Code>{_CODES[status]}</Code><Message>by the proxy</Message></Error>".encode()
    head = f"HTTP/1.1 {status} By The Proxy\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
    return Answer(status=int(status), head=head.encode(), body=body)


def _without_condition(request: Request) -> Request:
    """As a server sees it that does not know the header. Signatures are over it only if the client signs it."""
    lines = [line for line in request.head.split(b"\r\n") if not line.lower().startswith(b"if-none-match:")]
    return Request(method=request.method, target=request.target, head=b"\r\n".join(lines), body=request.body)

"""Connections of the HTTP server: how many there are, and how long a slow client may take."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import cast

Factory = Callable[[], asyncio.Protocol]


def plain_response(status: str, text: str) -> bytes:
    """A whole HTTP response, after which the connection is closed."""
    body = json.dumps({"error": text}).encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class Gate:
    """Makes the protocols of new connections, at most so many at a time.

    Args:
        inner: makes the protocol that speaks HTTP.
        max_connections: more are answered with 503 and closed.
        header_timeout_s: for the head of a request.
        write_timeout_s: for a client to take what fills its connection.
    """

    def __init__(
        self, inner: Factory, max_connections: int, header_timeout_s: float, write_timeout_s: float
    ) -> None:
        self.inner = inner
        self.max_connections = max_connections
        self.header_timeout_s = header_timeout_s
        self.write_timeout_s = write_timeout_s
        self.open = 0

    def __call__(self) -> asyncio.Protocol:
        """The protocol of a new connection."""
        if self.open >= self.max_connections:
            return _Turned()
        return TimedConnection(self)


class _Turned(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        writer = cast(asyncio.Transport, transport)
        writer.write(plain_response("503 Service Unavailable", "too many connections"))
        writer.close()


class TimedConnection(asyncio.Protocol):
    """Passes everything on to the protocol that speaks HTTP, and closes a client that stalls it.

    Args:
        gate: what made it.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        gate.open += 1  # here, as several may be made before the first of them starts
        self._inner = gate.inner()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._head: asyncio.TimerHandle | None = None
        self._write: asyncio.TimerHandle | None = None
        self._answering = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start, with a head to be received."""
        self._transport = cast(asyncio.Transport, transport)
        self._await_head()
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._gate.open -= 1
        self._cancel()
        self._inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass data on; the first after an answer begins a head."""
        if not self._answering and self._head is None:
            self._await_head()
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        """Pass the end on."""
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        """The client does not take what is written."""
        self._inner.pause_writing()
        self._write = self._loop.call_later(self._gate.write_timeout_s, self._abort)

    def resume_writing(self) -> None:
        """It does."""
        if self._write is not None:
            self._write.cancel()
            self._write = None
        self._inner.resume_writing()

    def head_received(self) -> None:
        """The head of a request is complete, and the request is being answered."""
        self._answering = True
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def answered(self) -> None:
        """The answer is made; what is received next is another request."""
        self._answering = False

    def _await_head(self) -> None:
        self._head = self._loop.call_later(self._gate.header_timeout_s, self._refuse)

    def _refuse(self) -> None:
        assert self._transport is not None
        text = f"no request within {self._gate.header_timeout_s:g} s"
        self._transport.write(plain_response("408 Request Timeout", text))
        self._transport.close()

    def _abort(self) -> None:
        assert self._transport is not None
        self._transport.abort()

    def _cancel(self) -> None:
        for timer in (self._head, self._write):
            if timer is not None:
                timer.cancel()

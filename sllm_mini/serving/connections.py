"""A client's connection: what HTTP itself allows is bounded here, before any request is one. Imports uvicorn. Chapter 11.

uvicorn waits for ever for the rest of a request's head, takes a head of any length, and closes a connection only when all
that was written has been read. Here a head has its time and its size, and a reader that takes nothing is cut off. What is no HTTP is
answered with an error object as everything else is.
"""

from __future__ import annotations

import asyncio
import secrets
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from sllm_mini.serving.errors import ApiError
from sllm_mini.serving.options import Limits


class Connection(HttpToolsProtocol):
    """On the event loop. Costs two timers a request. `limits` are the server's."""

    def __init__(self, *given: Any, limits: Limits, **named: Any) -> None:
        super().__init__(*given, **named)
        self._limits = limits
        self._due: asyncio.TimerHandle | None = None
        """By when the client must have sent what it owes: a head, or the rest of a body that nobody waits for."""
        self._stalled: asyncio.TimerHandle | None = None
        self._head_nbytes = 0
        self._in_head = True

    # Of the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # whoever sends waits for the reader, and nothing heaps up here
        self._owes()
        if len(self.connections) > self._limits.connections:
            self._refuse(ApiError(503, "overloaded", f"{self._limits.connections} connections are open, and no more are taken", retry_after=1.0))

    def connection_lost(self, exc: Exception | None) -> None:
        self._owes_nothing()
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._in_head
        super().data_received(data)
        if self.transport.is_closing():
            return
        if before and self._in_head:
            self._head_nbytes += len(data)
            if self._head_nbytes > self._limits.head_nbytes:
                return self._refuse(ApiError(431, "request_too_large", f"the head of the request has more than {self._limits.head_nbytes} bytes; send less"))
        if self._due is None and (self.cycle is None or self.cycle.response_complete):
            self._owes()  # between two requests: the base class has just forgotten that it waits for one

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    # Of the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_nbytes = True, 0
        if self._due is None:
            self._owes()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # what comes after a body in chunks (trailers) has no reader, and no bound
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._owes_nothing()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._owes_nothing()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What the base class does with bytes that are no HTTP."""
        self._refuse(ApiError(400, "invalid_http", "that is no HTTP request that can be read"))

    # Parts

    def _owes(self) -> None:
        self._owes_nothing()
        self._due = self.loop.call_later(self._limits.header_seconds, self._late)

    def _owes_nothing(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _late(self) -> None:
        if self.flow.read_paused:  # it may have come, and is not read before the answer to what came first has gone
            self._owes()
        else:
            self.transport.abort()

    def _watch(self, nbytes: int) -> None:
        self._stalled = self.loop.call_later(self._limits.stall_seconds, partial(self._look, nbytes))

    def _look(self, nbytes: int) -> None:
        """Has the reader taken any of them since?"""
        left = self.transport.get_write_buffer_size()
        if left < nbytes:
            self._watch(left)
        else:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Without a request that could be answered. Where an answer is being written, its connection ends in it."""
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            if self.cycle.response_started:
                return self.transport.abort()
            self.cycle.disconnected = True  # whoever works on it is told that nobody reads
            self.cycle.message_event.set()
        body = error.body
        headers = {**error.headers, "content-length": str(len(body)), "x-request-id": f"req_{secrets.token_hex(12)}", "connection": "close"}
        self.transport.write(b"".join((STATUS_LINE[error.status], *(f"{name}: {value}\r\n".encode() for name, value in headers.items()), b"\r\n", body)))
        self.transport.close()

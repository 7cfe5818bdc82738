"""Server-sent events: frames, comments, and an answer that ends its work when nobody reads it any more. Chapter 11.

An event is a line `data: …`; a line that begins with a colon is a comment, which clients skip and proxies take for a sign of life.
(HTML Living Standard, 9.2.)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sllm_mini.serving.errors import ApiError, shutting_down
from sllm_mini.serving.relay import until_gone

DONE = b"data: [DONE]\n\n"
_LAST_SECONDS = 1.0
_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "x-accel-buffering": "no"}


def event(json: str) -> bytes:
    """`json` has no line break, as no JSON that was written compactly has."""
    return b"data: %b\n\n" % json.encode()


def comment(text: str) -> bytes:
    line = "".join(character if character.isprintable() else " " for character in text)
    return b": %b\n\n" % line.encode(errors="replace")


def failure(error: ApiError) -> bytes:
    """The last event of a stream that cannot go on. No [DONE] comes after it."""
    return b"data: %b\n\n" % error.body


class EventStream(Response):
    """Sends each of `frames` as soon as it is there, and closes them when it ends, the client goes, or takes nothing for `stall_seconds`. While it
    cannot send it asks for no further frame, so nothing heaps up here. Cancelled, as when the server ends, it ends with an error event. `on_end` is
    called whichever way it ends, even before the first frame."""

    def __init__(self, frames: AsyncGenerator[bytes, None], stall_seconds: float, headers: Mapping[str, str], on_end: Callable[[], object] = lambda: None) -> None:
        self._frames, self._stall_seconds, self._on_end = frames, stall_seconds, on_end
        self.status_code, self.background, self.body = 200, None, b""
        self._begun = False
        self.init_headers({**_HEADERS, **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send(send))
        except asyncio.CancelledError:
            if not self._begun:
                raise
            async with asyncio.timeout(_LAST_SECONDS):
                await send({"type": "http.response.body", "body": failure(shutting_down())})
        finally:
            self._on_end()

    async def _send(self, send: Send) -> None:
        async def out(message: dict[str, object]) -> None:
            async with asyncio.timeout(self._stall_seconds):
                await send(message)

        try:
            await out({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._begun = True
            async for frame in self._frames:
                await out({"type": "http.response.body", "body": frame, "more_body": True})
            await out({"type": "http.response.body", "body": b""})
        except TimeoutError:
            return  # nobody reads: the connection closes without the end of its body
        finally:
            await self._frames.aclose()

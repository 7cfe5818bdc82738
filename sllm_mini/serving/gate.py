"""The gate before every route: who may come in, how much at once, and under which name a request is logged. Pure ASGI. Chapter 11.

Without a key the server is this machine's own, and takes no request whose Host is another name: a web page whose name is made to
lead here (DNS rebinding) is turned away, as is one that posts from another site. What is under /admin takes no request of another site's
page, key or not.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sllm_mini.serving.buckets import Buckets
from sllm_mini.serving.dashboard import FILES
from sllm_mini.serving.errors import ApiError, internal_error, shutting_down
from sllm_mini.serving.metrics import Meter
from sllm_mini.serving.options import ServeOptions, is_loopback

log = logging.getLogger("sllm_mini.serving")
_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
_FREE = ("/health", *FILES)
"""For these no key is asked."""
_LINGER_SECONDS = 1.0


class Gate:
    """Wraps an app. Each answer carries `x-request-id`: the client's where it is one, else a new one. What the app raises is logged under it and
    answered with 500, or ends the answer where that has begun. `now` gives seconds, for rates."""

    def __init__(self, app: ASGIApp, options: ServeOptions, meter: Meter, now: Callable[[], float] = time.monotonic) -> None:
        self._app, self._options, self._meter = app, options, meter
        self._keys = [_digest(key.encode()) for key in options.api_keys]
        self._rate = Buckets(options.limits.requests_per_minute, now) if options.limits.requests_per_minute else None
        self.open_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # neither lifespan nor websockets are spoken here; uvicorn takes that for an answer
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given if _ID.fullmatch(given) else b"req_" + secrets.token_hex(12).encode()
        begun, too_large = False, False

        async def answer(message: Message) -> None:
            nonlocal begun, too_large
            if message["type"] == "http.response.start":
                begun, too_large = True, message["status"] == 413
                self._meter.answered(scope, message["status"])
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name)]}
            elif too_large and not message.get("more_body", False):  # whoever is still sending would find the connection broken, and the answer with it
                await send({**message, "more_body": True})
                await _throw_away(receive)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        self.open_requests += 1
        self._meter.opened()
        try:
            scope["sllm_mini.key"] = self._check(scope["path"], headers)
            await self._app(scope, self._counted(receive), answer)
        except ApiError as error:
            self._meter.refused(error.code)
            await _refuse(answer, error)
        except asyncio.CancelledError:  # the server ends, and has waited for long enough
            if begun:
                raise
            await _refuse(answer, shutting_down())
        except Exception:
            log.exception("request %s failed", name.decode())
            self._meter.refused("internal_error")
            if not begun:
                await _refuse(answer, internal_error(name.decode()))
        finally:
            self.open_requests -= 1
            self._meter.closed()

    def _check(self, path: str, headers: dict[bytes, bytes]) -> str:
        """Which of the keys it has, "" where there is none. Raises ApiError."""
        if not self._keys and not is_loopback(_host(headers.get(b"host", b"localhost").decode("latin-1"))):
            raise ApiError(403, "host_not_allowed", "this server has no API key and answers only under a name of this machine, such as localhost")
        if not self._keys and headers.get(b"sec-fetch-site") == b"cross-site":
            raise ApiError(403, "host_not_allowed", "this server has no API key and takes no requests from other web sites")
        if path.startswith("/admin/") and headers.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin"):
            raise ApiError(403, "host_not_allowed", "a page of another site asks for this; nothing under /admin is for those")
        name = self._key(headers) if self._keys and path not in _FREE else ""
        if self.open_requests > self._options.limits.open_requests and path not in _FREE:
            raise ApiError(503, "overloaded", f"{self._options.limits.open_requests} requests are open, and no more are taken", retry_after=1.0)
        if int(headers.get(b"content-length", b"0") or b"0") > self._options.limits.body_nbytes:
            raise self._too_large()
        seconds = self._rate.take(name) if self._rate is not None and path.startswith("/v1/") else 0.0
        if seconds:
            raise ApiError(429, "rate_limit_exceeded", f"more than {self._options.limits.requests_per_minute} requests a minute came with this key", retry_after=seconds)
        return name

    def _key(self, headers: dict[bytes, bytes]) -> str:
        """Its name: its place among those that there are. Raises ApiError(401)."""
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = _digest(key.strip())
        found = [name for name, each in enumerate(self._keys) if hmac.compare_digest(given, each)]
        if kind.lower() != b"bearer" or not found:
            raise ApiError(401, "invalid_api_key", "the API key is missing or wrong; send it as authorization: Bearer KEY")
        return str(found[0])

    def _counted(self, receive: Receive) -> Receive:
        """Counts what comes, whatever length was announced."""
        count = 0

        async def counted() -> Message:
            nonlocal count
            message = await receive()
            count += len(message.get("body", b""))
            if count > self._options.limits.body_nbytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(413, "request_too_large", f"the body has more than {self._options.limits.body_nbytes} bytes; send less")


async def _refuse(send: Send, error: ApiError) -> None:
    """The connection ends with it: a body that was not read may still be coming."""
    body = error.body
    headers = {**error.headers, "content-length": str(len(body)), "connection": "close"}
    await send({"type": "http.response.start", "status": error.status, "headers": [(key.encode(), value.encode()) for key, value in headers.items()]})
    await send({"type": "http.response.body", "body": body})


async def _throw_away(receive: Receive) -> None:
    """What still comes of a body, for a while."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while (await receive()).get("more_body", False):
                pass


def _host(value: str) -> str:
    """Without its port."""
    return value if value.count(":") > 1 and not value.startswith("[") else re.sub(r":\d*$", "", value)


def _digest(key: bytes) -> bytes:
    return blake2b(key, digest_size=32).digest()

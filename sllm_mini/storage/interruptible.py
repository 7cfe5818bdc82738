"""HTTP connections whose waits end soon after nobody wants the answer any more.

A thread that waits for a server that says nothing waits in the kernel, for as long as the connection's timeout. Here it looks
up twice a second, and gives up once its load has ended (`source.unwanted`). Costs one more Python call for each receive. What
it does not cut short: the look-up of a name and a TLS handshake. Imports urllib3. Taught in chapter 03.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from sllm_mini.storage.source import Interrupted, unwanted

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_LOOK_SECONDS = 0.5
_CONNECT_SECONDS = 1.0
"""Of one attempt to connect: a server that is there answers sooner, and else the kernel would ask again after as long."""
_GIVEN_UP = "nobody waits for it any more"


class _Arriving(io.RawIOBase):
    """What a socket receives. It has the socket's timeout as a whole, and leaves it as it was."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._held = sock.makefile("rb", buffering=0)  # as for any file of a socket's: it stays open as long as this does
        self._seconds = sock.gettimeout() or 0.0
        sock.settimeout(min(self._seconds, _LOOK_SECONDS))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        end = time.monotonic() + self._seconds
        while True:
            try:
                return self._sock.recv_into(buffer)
            except TimeoutError:
                if unwanted():
                    raise Interrupted(_GIVEN_UP) from None
                if time.monotonic() >= end:
                    raise

    def close(self) -> None:
        if not self.closed:
            with suppress(OSError):  # the socket may be closed already
                self._sock.settimeout(self._seconds)
            self._held.close()
        super().close()


class _Opened:
    """A socket as far as an `http.client.HTTPResponse` wants one."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def makefile(self, mode: str) -> IO[bytes]:
        return io.BufferedReader(_Arriving(self._sock))


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(_Opened(sock), *args, **options)  # type: ignore[arg-type]


class _Connection(HTTPConnection):
    response_class = _Response

    def _new_conn(self) -> socket.socket:
        seconds = self.timeout
        end = time.monotonic() + (seconds or 0.0)
        try:
            while True:
                self.timeout = min(max(end - time.monotonic(), 0.001), _CONNECT_SECONDS)
                try:
                    sock = super()._new_conn()
                except NewConnectionError:  # refused, or no such name: a ConnectTimeoutError too, but an answer
                    raise
                except ConnectTimeoutError:
                    if unwanted():
                        raise Interrupted(_GIVEN_UP) from None
                    if time.monotonic() >= end:
                        raise
                else:
                    sock.settimeout(seconds)
                    return sock
        finally:
            self.timeout = seconds


class _SecureConnection(HTTPSConnection, _Connection):
    """`_Connection` under TLS: it stands behind HTTPSConnection in the order in which methods are found."""


class _Pool(HTTPConnectionPool):
    ConnectionCls = _Connection


class _SecurePool(HTTPSConnectionPool):
    ConnectionCls = _SecureConnection


POOLS = {"http": _Pool, "https": _SecurePool}
"""For `urllib3.PoolManager.pool_classes_by_scheme`."""
